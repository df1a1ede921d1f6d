"""A model on a CUDA device, trained, lost and continued bit for bit. Skipped without a device."""

from __future__ import annotations

import pytest
import torch
from holdfast.tests.hooks.nodes import Node, bits, bits_of_models, bits_of_optimizers
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.2), nn.BatchNorm1d(64), nn.Linear(64, 8)).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def turn(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
    """One step; the bits of its loss."""
    optimizer.zero_grad()
    loss = model(torch.randn(32, 64, device="cuda")).square().sum()
    loss.backward()
    optimizer.step()
    return bits(loss.detach().cpu())


def test_the_loss_goes_on_bit_for_bit(node: Node) -> None:
    """Dropout draws from the device's generator, so that has to come back too."""
    model, optimizer = make(1)
    with node.attach(model, optimizer) as ckpt:
        for step in range(1, 7):
            turn(model, optimizer)
            ticket = ckpt.snapshot(step)
        assert ticket.skipped is None, ticket
        ckpt.wait(ticket)
        state = bits_of_models({"": model}), bits_of_optimizers({"": optimizer})
        wanted = [turn(model, optimizer) for _ in range(5)]
        ckpt.close(ended=False)
    again, its_optimizer = make(2)
    with node.attach(again, its_optimizer) as ckpt:
        assert ckpt.restore() == 6
        assert (bits_of_models({"": again}), bits_of_optimizers({"": its_optimizer})) == state
        assert [turn(again, its_optimizer) for _ in range(5)] == wanted
