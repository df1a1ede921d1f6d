"""A complete training script that survives ``kill -9``. The lines marked with ``# <-`` are all that Holdfast adds.

    python examples/train.py                                                      # one process
    torchrun --standalone --nproc-per-node 2 --max-restarts 9 examples/train.py   # two, restarted when one dies

Kill it in any way, start it again the same way: it continues at the step it had reached, with the same losses as if
nothing had happened. Torch's data loaders do not remember their position; this one does, in five lines.

Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun: else restarted ranks may look for the dead ones, and have to be
restarted again (https://github.com/pytorch/pytorch/issues/135712).
"""
# mypy: allow-untyped-calls

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import holdfast  # <-
import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, CONTEXT, BATCH, WIDTH = 2000, 32, 32, 128


class Loader:
    """Random pieces of text, other ones on every rank, and a memory of how many were handed out."""

    def __init__(self, text: Tensor, seed: int) -> None:
        self.text, self.seed, self.count = text, seed, 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next ``(inputs, targets)``: ``int64[BATCH, CONTEXT]`` and ``int64[BATCH]``, the byte that follows."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.count)
        self.count += 1
        starts = torch.randint(len(self.text) - CONTEXT, (BATCH, 1), generator=generator)
        pieces = self.text[starts + torch.arange(CONTEXT + 1)].long()
        return pieces[:, :-1], pieces[:, -1]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def main() -> None:
    distributed = "RANK" in os.environ
    if distributed:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if distributed else 0

    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Embedding(256, 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, WIDTH),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(WIDTH, 256),
    )
    if distributed:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    loader = Loader(text, seed=rank)

    extras = {"scheduler": scheduler, "loader": loader}  # <- everything else with a state_dict
    with holdfast.Checkpointer(model=model, optimizer=optimizer, extras=extras, every=1) as ckpt:  # <-
        start = ckpt.restore() or 0  # <- the newest step that can be had, or None
        print(f"rank {rank} starts at step {start}", flush=True)
        for step in range(start, STEPS):
            inputs, targets = loader.next_batch()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            ckpt.step(step + 1)  # <- returns at once
            if rank == 0 and step % 100 == 99:
                print(f"step {step + 1}: loss {loss.item():.6f}", flush=True)

    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
