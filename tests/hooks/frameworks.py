"""Jobs of other frameworks: trained undisturbed, without Holdfast; then trained, killed, and started again until they end.

    python -m holdfast.tests.hooks.frameworks lightning FOLDER

A framework takes seconds to import, so this process imports it once and forks a process for each rank of each life. What
they see is logged, one JSON line after the other, unbuffered, into ``FOLDER/<job>.<life>.<rank>``; "whole" is the life of the
undisturbed job. ``test_frameworks`` judges.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from holdfast.tests.hooks.nodes import QUICK, WAIT_S, Node
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Life:
    """One rank's part of one life of a job.

    Attributes:
        end: the place at which it dies, or nothing.
        node: where Holdfast is, or None without.
    """

    log: Path
    end: str
    node: Node | None
    rank: int = 0
    world: int = 1

    def saw(self, what: str, **values: Any) -> None:
        """Log one thing that must be the same, bit for bit, whenever it comes again."""
        line = json.dumps({"what": what, **{k: v.item() if torch.is_tensor(v) else v for k, v in values.items()}})
        with self.log.open("a") as file:
            file.write(line + "\n")

    def at(self, place: str) -> None:
        if place == self.end and self.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def options(self) -> dict[str, Any]:
        assert self.node is not None
        return {"job": self.node.job, "shm": str(self.node.shm), "deadlines": QUICK, "strict": True}


@dataclass(frozen=True)
class Job:
    """What is trained, and the places at which its lives end, one after the other, before the last one goes through."""

    train: Callable[[Life], None]
    ends: tuple[str, ...]
    world: int = 1


class Noisy(Dataset[torch.Tensor]):
    """*count* vectors that the global generator stirs each time they are loaded."""

    def __init__(self, count: int, *, stirred: bool = True) -> None:
        self.count, self.stirred = count, stirred

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        plain = torch.sin(torch.arange(1, 9) * (index + 1.0))
        return plain + 0.1 * torch.rand(1) if self.stirred else plain


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 8))


def bits(model: nn.Module) -> float:
    """A sum over all parameters and buffers; equal sums of 64 bits mean equal bytes here."""
    return sum(float(tensor.double().sum()) for tensor in model.state_dict().values())


# -- Lightning -----------------------------------------------------------------------------------------------------------


def _module(life: Life, manual: bool) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = net(), not manual

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = (self.net(batch) - batch).square().mean()
            place = f"{self.current_epoch}.{index}"
            life.saw(f"train {place}", loss=loss, step=self.global_step)
            life.at(place)
            if manual:
                self._step_both(loss, index)
            return loss

        def _step_both(self, loss: torch.Tensor, index: int) -> None:
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            if index % 2:
                second.step()
            self.lr_schedulers().step()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            loss = (self.net(batch) - batch).square().mean()
            self.log("loss", loss, sync_dist=True)
            if not self.trainer.sanity_checking:
                place = f"validation {self.current_epoch}.{index} after {self.global_step}"
                life.saw(place, loss=loss)
                life.at(place)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.net[3].parameters() if manual else self.parameters(), lr=1e-2)
            step = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"}
            if manual:
                return [optimizer, torch.optim.SGD(self.net[0].parameters(), lr=0.1)], [step]
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return [optimizer], [step, {"scheduler": plateau, "monitor": "loss", "interval": "epoch"}]

    return Module()


def _lightning(life: Life, *, manual: bool = False, length: int = 20, workers: int = 0, **options: Any) -> None:
    import holdfast
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping

    pl.seed_everything(3, verbose=False)
    module, callbacks = _module(life, manual), [EarlyStopping("loss", patience=99, min_delta=9.0)]
    if life.node is not None:
        callbacks.append(holdfast.HoldfastCallback(**life.options))
    trainer = pl.Trainer(
        max_epochs=3, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    data = Noisy(2 * length * life.world, stirred=not workers)
    training = DataLoader(data, batch_size=2, shuffle=True, num_workers=workers)
    trainer.fit(module, training, DataLoader(Noisy(8), batch_size=4))
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    waited = callbacks[0].state_dict()["wait_count"]
    life.saw("end", bits=bits(module), rates=rates, waited=waited, loops=trainer.fit_loop.state_dict())


def lightning_accumulates(life: Life) -> None:
    """Eleven batches an epoch, three a step: the last step of an epoch has two. Validation twice an epoch."""
    _lightning(life, length=11, accumulate_grad_batches=3, val_check_interval=0.5)


def lightning_by_hand(life: Life) -> None:
    """Two optimizers that do not step alike, an end that is a number of steps, batches from another process."""
    _lightning(life, manual=True, max_steps=70, workers=1)


def lightning_ddp(life: Life) -> None:
    _lightning(life, length=8, strategy="ddp", devices=2)


# -- Hugging Face --------------------------------------------------------------------------------------------------------


def trainer_accumulates(life: Life) -> None:
    """Eleven batches an epoch, two a step, evaluated every third step."""
    import holdfast
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.count = net(), 0

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.net(x)
            loss = (y - labels).square().mean()
            step = trainer.state.global_step
            self.count = self.count + 1 if self.training else 0
            life.saw(f"{'train' if self.training else 'evaluate'} {step}", loss=loss)
            life.at(f"{step}, batch {self.count % 2}" if self.training else f"evaluation after {step}")
            return {"loss": loss, "logits": y}

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack(rows), "labels": torch.stack(rows)}

    arguments = TrainingArguments(
        str(life.log.parent / "out"), num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, eval_strategy="steps", eval_steps=3,
        save_strategy="no", learning_rate=1e-2, metric_for_best_model="loss", remove_unused_columns=False, seed=5,
    )  # fmt: skip
    torch.manual_seed(5)
    trainer = Trainer(
        Module(), arguments, data_collator=collate, train_dataset=Noisy(22, stirred=False),
        eval_dataset=Noisy(8), callbacks=[EarlyStoppingCallback(99, 9.0)],
    )  # fmt: skip
    if life.node is None:
        trainer.train()
    else:
        holdfast.HoldfastTrainerCallback(**life.options).train(trainer)
    log = [
        [entry.get(key) for key in ("step", "loss", "eval_loss", "learning_rate")]
        for entry in trainer.state.log_history
    ]
    waited = [one.early_stopping_patience_counter for one in trainer.callback_handler.callbacks
              if isinstance(one, EarlyStoppingCallback)]  # fmt: skip
    life.saw("end", bits=bits(trainer.model), waited=waited, log=log[:-1])  # the last entry is about this life alone


def accelerate_ddp(life: Life) -> None:
    """Seven batches an epoch, two a step; the rest of an epoch is a step, too."""
    import holdfast
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(7)
    model: Any = net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    loader: Any = DataLoader(Noisy(14 * life.world, stirred=False), batch_size=2, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    torch.manual_seed(70 + life.rank)
    batches: Any = holdfast.Batches(loader)
    ckpt: Any = contextlib.nullcontext()
    step = 0
    if life.node is not None:
        ckpt = holdfast.accelerated(accelerator, model, optimizer, scheduler, batches, **life.options)
        step = ckpt.restore() or 0
    with ckpt:
        for epoch in range(batches.epoch, 4):
            for batch in batches:
                with accelerator.accumulate(model):
                    loss = (model(batch) - batch).square().mean()
                    life.saw(f"train {epoch}, {step}, {accelerator.sync_gradients}", loss=loss)
                    accelerator.backward(loss)
                    life.at(f"{step}, {accelerator.sync_gradients}")
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    step += 1
                    if life.node is not None:
                        ckpt.step(step)
    life.saw("end", bits=bits(model), rate=scheduler.get_last_lr(), random=torch.rand(2).tolist())


# -- lives ---------------------------------------------------------------------------------------------------------------

JOBS = {
    "lightning": {
        "lightning_accumulates": Job(lightning_accumulates, ("1.4", "validation 1.1 after 7", "2.9")),
        "lightning_by_hand": Job(lightning_by_hand, ("1.7",)),
        "lightning_ddp": Job(lightning_ddp, ("1.3",), world=2),
    },
    "transformers": {
        "trainer_accumulates": Job(trainer_accumulates, ("8, batch 1", "evaluation after 12", "14, batch 0")),
    },
    "accelerate": {"accelerate_ddp": Job(accelerate_ddp, ("5, False", "12, True"), world=2)},
}
MODULES = {"lightning": "lightning.pytorch", "transformers": "transformers.trainer", "accelerate": "accelerate"}
_fork = multiprocessing.get_context("fork")


def main(framework: str, folder: Path) -> None:
    """All jobs of one framework, and its example."""
    torch.set_num_threads(1)
    for module in (MODULES[framework], "torch._dynamo", "torch.distributed.checkpoint", "holdfast.hooks.checkpointer"):
        importlib.import_module(module)
    for name, job in JOBS[framework].items():
        _play(folder / f"{name}.whole", job, "", None)
        with _node() as node:
            for life, end in enumerate((*job.ends, "")):
                _play(folder / f"{name}.{life}", job, end, node)
    with _node() as node:
        for life in range(2):  # the second goes on where the first has ended
            _play(folder / f"example.{life}", Job(_example(framework), ()), "", node)


def _example(framework: str) -> Callable[[Life], None]:
    def run(life: Life) -> None:
        assert life.node is not None
        os.environ.update(HOLDFAST_JOB=life.node.job, HOLDFAST_SHM=str(life.node.shm))
        os.chdir(life.log.parent)
        runpy.run_path(str(ROOT / f"examples/with_{framework}.py"), run_name="__main__")

    return run


@contextlib.contextmanager
def _node() -> Iterator[Node]:
    node = Node()
    try:
        yield node
    finally:
        node.remove()


def _play(log: Path, job: Job, end: str, node: Node | None) -> None:
    """One life. The ranks that did not die of themselves are killed: nobody waits for them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lives = [Life(Path(f"{log}.{rank}"), end, node, rank, job.world) for rank in range(job.world)]
    ranks: list[BaseProcess] = [_fork.Process(target=_be, args=(job, life, port)) for life in lives]
    for process in ranks:
        process.start()
    ranks[0].join(WAIT_S)
    for process in ranks:
        process.join(0 if end else WAIT_S)
        process.kill()
        process.join()
    codes = [process.exitcode for process in ranks]
    expected = [-signal.SIGKILL] if end else [0] * job.world
    assert codes[: len(expected)] == expected, f"{log.name}: {codes}\n" + Path(f"{log}.0.out").read_text()[-4000:]


def _be(job: Job, life: Life, port: int) -> None:
    with Path(f"{life.log}.out").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    warnings.simplefilter("ignore")
    if job.world > 1:
        os.environ.update(
            RANK=str(life.rank), LOCAL_RANK=str(life.rank), GROUP_RANK="0", WORLD_SIZE=str(job.world),
            LOCAL_WORLD_SIZE=str(job.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
    job.train(life)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
