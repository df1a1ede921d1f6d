"""The training loop of the demo: an ordinary one, with a Checkpointer in it where the task says so.

Everything random is in play, so that a restore which forgot any of it could not pass: the loader's order, torch's
dropout, NumPy's and Python's choice of masked bytes, each different on every rank.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from .journal import Journal, LifeStarted, StepDone, Stopped, finish
from .model import GPT, Shape
from .stopwatch import Stopwatch
from .text import TextLoader, read_corpus

if TYPE_CHECKING:
    from ...hooks.checkpointer import Checkpointer

BATCH: Final = 16
LEARNING_RATE: Final = 3e-3
COLLECTIVE_TIMEOUT: Final = datetime.timedelta(seconds=60)
_MOST_MASKED: Final = 4
_SPILLS: Final = 10  # of a run, besides those that a preemption asks for


@dataclass(frozen=True, slots=True)
class Task:
    """What one process has to train. ``strategy`` is ddp or fsdp2; ``protect`` puts a Checkpointer into the loop.

    ``tier`` is where that spills to, ``grace_s`` the time that it has after a preemption notice; without, it listens to none.
    ``store`` is where the ranks find each other: host and port of torchrun's key-value store, or a file of this life.
    """

    out: Path
    steps: int
    strategy: str
    seed: int
    protect: str | None
    tier: str | None
    grace_s: float | None
    rank: int
    world: int
    life: int
    store: tuple[str, int] | Path


@dataclass(slots=True)
class Training:
    """The live objects of a training run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: CosineAnnealingLR
    loader: TextLoader


def train(task: Task, watch: Stopwatch) -> None:
    """Train *task* to its end, from wherever the newest snapshot stands; leave a journal and a final file.

    If the job is preempted, return after the step that the Checkpointer says: the journal ends with ``Stopped``, and there is
    no final file.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    with _process_group(task), contextlib.ExitStack() as stack:
        training = _build(task)
        watch.lap("setup")
        ckpt, start = None, 0
        if task.protect:
            ckpt = stack.enter_context(_checkpointer(task, training))
            watch.lap("attach")
            start = ckpt.restore() or 0
            watch.lap("restore")
            if (again_s := ckpt.stats().reprotect_s) is not None:
                watch.divide("restore", "re-protect", again_s)
        journal = stack.enter_context(Journal(task.out, task.rank))
        journal.write(LifeStarted(task.life, start, time.time(), watch.split_s))
        for step in range(start + 1, task.steps + 1):
            loss = _train_step(training)
            stall_ms = round(ckpt.stats().stall_s[-1] * 1e3, 4) if ckpt and ckpt.stats().stall_s else None
            # Before the snapshot: no snapshot holds a step that the journal does not.
            journal.write(StepDone(task.life, step, loss.hex(), time.time(), stall_ms))
            if ckpt and _was_last(ckpt, step) and step < task.steps:
                journal.write(Stopped(task.life, step, time.time()))
                return
        final: dict[str, Any] = {"life": task.life, "step": task.steps, "digests": _digests(training)}
        if ckpt:
            final |= {"taken": ckpt.stats().taken, "skipped": dict(ckpt.stats().skipped)}
        finish(task.out, task.rank, final)


def _checkpointer(task: Task, training: Training) -> Checkpointer:
    # Not at the top: the reference run must not even import what it is there to check.
    from ...hooks.checkpointer import Checkpointer
    from ...storage.tiers import Tier

    return Checkpointer(
        training.model,
        training.optimizer,
        {"scheduler": training.scheduler, "loader": training.loader},
        every=1,
        slots=3 if task.tier else 2,  # with a third one, snapshots go on while one is spilled
        protect=task.protect,
        tiers=[Tier(task.tier, every=max(1, task.steps // _SPILLS))] if task.tier else [],
        grace=task.grace_s,
    )


def _was_last(ckpt: Checkpointer, step: int) -> bool:
    """Take the snapshot of *step*; whether the job has to end here."""
    ckpt.step(step)
    return ckpt.should_stop


@contextlib.contextmanager
def _process_group(task: Task) -> Iterator[None]:
    # torchrun keeps one store over all restarts (pytorch issue 135712): without a prefix of its own for every life, gloo
    # finds the addresses of the last life's dead processes in it, and fails to connect or hangs.
    store = dist.PrefixStore(f"life-{task.life}", _shared_store(task))  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.world, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield
        dist.barrier()  # who leaves sooner closes connections that another's last collective may still need
    finally:
        dist.destroy_process_group()


def _shared_store(task: Task) -> Any:
    if isinstance(task.store, Path):
        return dist.FileStore(str(task.store), task.world)  # type: ignore[attr-defined]
    host, port = task.store
    return dist.TCPStore(host, port, is_master=False, timeout=COLLECTIVE_TIMEOUT)  # type: ignore[attr-defined]


def _build(task: Task) -> Training:
    torch.manual_seed(task.seed)  # the same on every rank: FSDP2 shards the weights, it does not spread rank 0's
    shape = Shape()
    model = _distributed(GPT(shape), task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = CosineAnnealingLR(optimizer, T_max=task.steps)
    loader = TextLoader(
        read_corpus(), context=shape.context, batch=BATCH, seed=task.seed, rank=task.rank, world=task.world
    )
    for seed_with in (torch.manual_seed, random.seed, np.random.seed):
        seed_with((task.seed + 1 + task.rank) % (1 << 32))
    return Training(model, optimizer, scheduler, loader)


def _distributed(model: GPT, task: Task) -> nn.Module:
    if task.strategy == "ddp":
        # Otherwise DDP lays its buckets out anew after the first backward of every life, and from three ranks on gradients are
        # summed in another order then: no restart would continue bit for bit, whatever it restored.
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (task.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _train_step(training: Training) -> float:
    inputs, targets = next(training.loader)
    training.optimizer.zero_grad()
    logits = training.model(_masked(inputs))
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    training.scheduler.step()
    return float(loss.item())


def _masked(inputs: Tensor) -> Tensor:
    """*inputs* with a few bytes of every row zeroed, as an augmentation that uses NumPy's and Python's randomness."""
    count = random.randint(0, _MOST_MASKED)  # noqa: S311  # the global generator on purpose: a restore must bring it back
    places = np.random.randint(inputs.shape[1], size=(inputs.shape[0], count))
    return inputs.scatter(1, torch.from_numpy(places), 0)


def _digests(training: Training) -> dict[str, str]:
    """SHA-256 of every part of the state that this rank holds; of sharded tensors, its own shard."""
    model = training.model
    parts: dict[str, Any] = {
        "parameters": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "loader": training.loader.state_dict(),
        "random states": [torch.get_rng_state(), np.random.get_state(), random.getstate()],
    }
    return {name: hashlib.sha256(b"".join(_bytes_of(part))).hexdigest() for name, part in parts.items()}


def _bytes_of(value: Any) -> Iterator[bytes]:
    """An encoding of *value* in which different values of the training state differ."""
    match value:
        case Tensor():
            local = value.to_local() if isinstance(value, DTensor) else value
            yield from _bytes_of(local.detach().cpu().contiguous().numpy())
        case np.ndarray():
            yield f"{value.dtype}{value.shape}".encode()
            yield value.tobytes()
        case str():
            yield f"{len(value)}:{value}".encode()
        case float():
            yield value.hex().encode() if math.isfinite(value) else repr(value).encode()
        case Mapping():
            yield f"{{{len(value)}".encode()
            for key in sorted(value, key=str):
                yield from _bytes_of(str(key))
                yield from _bytes_of(value[key])
        case Sequence():
            yield f"[{len(value)}".encode()
            for item in value:
                yield from _bytes_of(item)
        case _:
            yield f"{type(value).__name__}={value!r};".encode()
