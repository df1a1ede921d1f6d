"""Lightning with Holdfast. Kill it in any way, start it again: ``fit`` goes on as if nothing had happened."""

import logging

import holdfast
import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader, TensorDataset


class Autoencoder(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 16))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


logging.basicConfig(level=logging.INFO)
lightning.seed_everything(0)
loader = DataLoader(TensorDataset(torch.randn(160, 16)), batch_size=8, shuffle=True)
survival = holdfast.HoldfastCallback()  # <- every optimizer step from now on survives
trainer = lightning.Trainer(
    max_epochs=5, accelerator="cpu", logger=False, callbacks=[survival], enable_checkpointing=False
)
trainer.fit(Autoencoder(), loader)
