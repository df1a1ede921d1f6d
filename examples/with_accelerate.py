"""Accelerate with Holdfast, in a loop of one's own. The lines marked with ``# <-`` are all that Holdfast adds."""
# mypy: allow-untyped-calls

import holdfast
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 3
torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 16))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(torch.randn(80, 16)), batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
batches = holdfast.Batches(loader)  # <- remembers how far it is
with holdfast.accelerated(accelerator, model, optimizer, batches) as ckpt:  # <-
    step = ckpt.restore() or 0  # <-
    print(f"training goes on from step {step}")
    for _ in range(batches.epoch, EPOCHS):  # <- from the epoch that was interrupted
        for (inputs,) in batches:
            with accelerator.accumulate(model):
                accelerator.backward((model(inputs) - inputs).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                ckpt.step(step)  # <-
