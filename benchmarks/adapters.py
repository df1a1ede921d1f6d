"""What the adapters of frameworks cost per step, beside a bare ``Checkpointer`` in the same loop.

    python benchmarks/adapters.py [--steps 300] [--rounds 5]

For Lightning and Hugging Face's Trainer: the same small model is trained by the framework with the adapter, and by the
framework with a bare ``Checkpointer`` called from the simplest callback there could be, which keeps no progress, no position
and resumes nowhere. For Accelerate: with ``holdfast.accelerated`` and ``Batches``, and with a ``Checkpointer`` made by hand.
Lives are interleaved; figures are medians over all steps of all rounds, from one training step to the next: of the time that
passed, and of the training thread's CPU time, which says more on a machine that is busy with other things.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import holdfast
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

_TARGET_S: Final = 0.2e-3
_WARM_UP: Final = 20  # steps that are not counted


class Clock:
    """The times from one step to the next: of the wall, and of the training thread's CPU."""

    def __init__(self) -> None:
        self.began_s: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.began_s.append((time.perf_counter(), time.thread_time()))

    def steps_s(self) -> list[tuple[float, float]]:
        counted = self.began_s[_WARM_UP:]
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(counted)]


def _data(steps: int) -> TensorDataset:
    return TensorDataset(torch.randn(4 * steps, 256))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))


_folders: list[Path] = []


def _job() -> dict[str, Any]:
    job = f"holdfast-bench-{uuid.uuid4().hex[:8]}"
    _folders.append(Path("/dev/shm") / job)
    return {"job": job, "shm": str(_folders[-1])}


def _clean() -> None:
    """End the agents of all jobs so far; what they held goes."""
    while _folders:
        shm = _folders.pop()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((shm / "agent.pid").read_text()), signal.SIGTERM)
        shutil.rmtree(shm, ignore_errors=True)


def lightning(steps: int, adapter: bool) -> list[tuple[float, float]]:
    import lightning.pytorch as pl

    clock = Clock()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            clock.tick()
            return (self.net(batch[0]) - batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    class Bare(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.checkpointer = holdfast.Checkpointer(trainer.model, trainer.optimizers[0], **_job())

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.checkpointer.step(trainer.global_step)

        def on_train_end(self, *_: Any) -> None:
            self.checkpointer.close()

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[holdfast.HoldfastCallback(**_job()) if adapter else Bare()],
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(_data(steps), batch_size=4, shuffle=True))
    return clock.steps_s()


def transformers(steps: int, adapter: bool) -> list[tuple[float, float]]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = Clock()

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            clock.tick()
            return {"loss": (self.net(x) - x).square().mean()}

    class Bare(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            self.checkpointer = holdfast.Checkpointer(model, optimizer.optimizer, **_job())

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            self.checkpointer.step(state.global_step)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.checkpointer.close()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            Module(), arguments, data_collator=lambda rows: {"x": torch.stack([row[0] for row in rows])},
            train_dataset=_data(steps),
        )  # fmt: skip
        if adapter:
            holdfast.HoldfastTrainerCallback(**_job()).train(trainer)
        else:
            trainer.add_callback(Bare())
            trainer.train()
    return clock.steps_s()


def accelerate(steps: int, adapter: bool) -> list[tuple[float, float]]:
    from accelerate import Accelerator

    accelerator, clock, model = Accelerator(cpu=True), Clock(), _net()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    loader: Any = DataLoader(_data(steps), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if adapter:
        loader = holdfast.Batches(loader)
        ckpt = holdfast.accelerated(accelerator, model, optimizer, loader, **_job())
    else:
        ckpt = holdfast.Checkpointer(model, optimizer.optimizer, **_job())
    with ckpt:
        for step, (batch,) in enumerate(loader, 1):
            clock.tick()
            accelerator.backward((model(batch) - batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            ckpt.step(step)
    return clock.steps_s()


FRAMEWORKS: dict[str, Callable[[int, bool], list[tuple[float, float]]]] = {
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds of {options.steps} steps")
    for name, train in FRAMEWORKS.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name:12s} is not installed")
            continue
        measured: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for turn in range(options.rounds):
            for adapter in (turn % 2 == 0, turn % 2 == 1):
                measured[adapter] += train(options.steps, adapter)
                _clean()
        for kind, what in enumerate(("wall", "CPU")):
            bare_s, adapter_s = (
                statistics.median(step[kind] for step in measured[adapter]) for adapter in (False, True)
            )
            more_s = adapter_s - bare_s
            print(
                f"{name:12s} {what:4s} per step: bare {bare_s * 1e3:6.3f} ms, adapter {adapter_s * 1e3:6.3f} ms: "
                f"{more_s * 1e3:+.3f} ms ({adapter_s / bare_s:.2f} x)  <= {_TARGET_S * 1e3:.1f} ms  "
                f"{'ok' if more_s <= _TARGET_S else 'MISSED'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
