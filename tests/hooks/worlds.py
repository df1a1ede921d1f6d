"""Jobs of several ranks, each a process: what runs in a rank, and how a test runs them and hears of what they found.

A rank starts warm. Scenarios are functions of this module; what they return
travels back to the test.
"""

from __future__ import annotations

import contextlib
import logging
import random
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from holdfast import Checkpointer
from holdfast.errors import HoldfastError, SnapshotSkipped
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.partition import share
from holdfast.snapshot.replicas import confirmed, sums
from holdfast.snapshot.state import TrainingState
from holdfast.tests.hooks.nodes import WAIT_S, Node, bits, bits_of_models, bits_of_optimizers, until
from holdfast.tests.warm import server
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Rank:
    """What a scenario has: who it is, the node, what the test has said, and what was logged."""

    def __init__(self, rank: int, world: int, job: str, said: Any = None) -> None:
        self.rank, self.world, self.node, self.said = rank, world, Node(job), said
        self.logged: list[str] = []

    def barrier(self) -> None:
        dist.barrier()


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _main(
    scenario: Callable[[Rank], Any], rank: int, world: int, job: str, store: str, said: Connection, told: Any
) -> None:
    torch.set_num_threads(1)
    here = Rank(rank, world, job, told)
    logging.getLogger("holdfast").addHandler(_Listener(here.logged))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        said.send((scenario(here), None))
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - it is shown where the test fails
        said.send((None, f"rank {rank}:\n{traceback.format_exc()}\n" + "\n".join(here.logged)))


def run_world(scenario: Callable[[Rank], Any], world: int, node: Node, told: Any = None) -> list[Any]:
    """Run *scenario* on *world* ranks of *node*; what each returned. Fails with the first rank's traceback.

    *scenario* is a function of a module; it finds *told* in ``Rank.said``.
    """
    with tempfile.TemporaryDirectory() as folder:
        ears, ranks = [], []
        for rank in range(world):
            ear, mouth = server.Pipe(duplex=False)
            process = server.Process(
                target=_main, args=(scenario, rank, world, node.job, f"{folder}/store", mouth, told), daemon=True
            )
            process.start()
            mouth.close()
            ears.append(ear)
            ranks.append(process)
        try:
            answers = [ear.recv() if ear.poll(WAIT_S) else (None, "no answer in time") for ear in ears]
        except EOFError:
            answers = [(None, f"a rank died: {[process.exitcode for process in ranks]}")]
        failed = [error for _, error in answers if error]
        for process in ranks:
            if failed:
                process.kill()
            process.join(WAIT_S)
        for ear in ears:
            ear.close()
    assert not failed, "\n\n".join(failed)
    return [result for result, _ in answers]


# -- jobs ----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Uneven on purpose: 7 and 5 rows divide by nothing. The names are those that tensor parallelism asks for."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 7)
        self.odd, self.last = nn.Linear(7, 5, bias=False), nn.Linear(5, 6)
        self.norm: nn.Module = nn.BatchNorm1d(6) if normed else nn.LayerNorm(6)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(torch.relu(self.up(x)))
        out: torch.Tensor = self.norm(self.last(self.odd(self.drop(x))))
        return out


@dataclass
class Trained:
    """One rank of a distributed job."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    extras: dict[str, Any] = field(default_factory=dict)

    def turn(self) -> None:
        self.optimizer.zero_grad()
        noise = random.random() + float(np.random.rand())
        loss = (self.model(torch.randn(4, 6)) - noise).square().mean()
        loss.backward()
        self.optimizer.step()

    def bits(self) -> Any:
        rng = bits([torch.get_rng_state(), np.random.get_state(legacy=False), list(random.getstate()[1])])
        return [bits_of_models({"": self.model}), bits_of_optimizers({"": self.optimizer}), rng]

    def attach(self, here: Rank, **options: Any) -> Checkpointer:
        return here.node.attach(self.model, self.optimizer, self.extras, **options)


def build(kind: str, here: Rank, seed: int) -> Trained:
    torch.manual_seed(seed)
    model: nn.Module = Net(normed=kind == "ddp")
    match kind:
        case "ddp" | "ddp-alike":
            model = nn.parallel.DistributedDataParallel(model)
        case "fsdp2":
            for layer in (model.down, model.odd):
                fully_shard(layer)  # type: ignore[arg-type]
            fully_shard(model)
        case "hsdp":
            mesh = init_device_mesh("cpu", (2, here.world // 2), mesh_dim_names=("replicate", "shard"))
            fully_shard(model.down, mesh=mesh)  # type: ignore[arg-type]
            fully_shard(model, mesh=mesh)
        case "tp":
            _tensor_parallel(model, init_device_mesh("cpu", (here.world,)))
        case "fsdp2-tp":
            both = init_device_mesh("cpu", (2, here.world // 2), mesh_dim_names=("dp", "tp"))
            _tensor_parallel(model, both["tp"])
            fully_shard(model, mesh=both["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=kind not in ("tp", "fsdp2-tp"))
    # Random numbers differ from rank to rank, but for ranks that compute one thing together.
    apart = seed + (0 if kind == "tp" else here.rank // 2 if kind == "fsdp2-tp" else here.rank)
    torch.manual_seed(1000 + apart)
    random.seed(2000 + apart)
    np.random.seed(3000 + apart)
    return Trained(model, optimizer)


def _tensor_parallel(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def sealed(here: Rank, ckpt: Checkpointer, step: int) -> bool:
    """Take a snapshot and see it sealed on every rank; False if all skipped it."""
    ticket = ckpt.snapshot(step)
    if ticket.skipped is None:
        with contextlib.suppress(SnapshotSkipped):
            ckpt.wait(ticket)
    here.barrier()
    until(lambda: ckpt._holding.objection() not in ("slot-growing", "agent-away"), "a slot")
    here.barrier()
    return ticket.skipped is None


def own_layout(here: Rank) -> tuple[list[tuple[str, Any, Any, int, Any]], int]:
    """What this rank's newest image holds, as its slot says: (name, start, extent, bytes, members); and its tensor bytes."""
    newest: tuple[Any, Layout] | None = None
    for slot in here.node.slots():
        record = slot.sealed_record()
        if record is not None and record.rank == here.rank and (newest is None or record.id > newest[0]):
            newest = record.id, slot.read_layout(record)
        slot.close()
    assert newest is not None
    parts = [(p.slice.name, p.slice.start, p.slice.extent, p.slice.nbytes, p.slice.members) for p in newest[1].placed]
    return parts, sum(part[3] for part in parts)


# -- scenarios -----------------------------------------------------------------------------------------------------------


def _there_and_back(kind: str, here: Rank, goes_on: bool = True) -> dict[str, Any]:
    """Train, snapshot, train on; then freshly built, restored, and trained on alike. What differs is what is wrong."""
    job = build(kind, here, seed=1)
    ckpt = job.attach(here)
    for step in (1, 2, 3):
        job.turn()
        assert sealed(here, ckpt, step), ckpt.stats().skipped
    taken, layout = job.bits(), own_layout(here)
    ckpt.close(ended=False)
    for _ in range(3):
        job.turn()
    truth = job.bits()
    again = build(kind, here, seed=2)
    again_before = again.bits()
    ckpt = again.attach(here)
    restored = ckpt.restore()
    back = again.bits()
    for _ in range(3):
        again.turn()
    found = again.bits()
    ckpt.close()
    return {
        "restored": restored,
        "differed": again_before != taken,
        "same": back == taken,
        "goes on": found == truth or not goes_on,
        "rng": taken[2],
        "taken": taken[0],
        "layout": layout[0],
        "bytes": layout[1],
        "logged": here.logged,
    }


def ddp(here: Rank) -> dict[str, Any]:
    # Of four ranks, gloo sums in an order that depends on DDP's buckets, which a fresh DDP lays out anew.
    return _there_and_back("ddp", here, goes_on=here.world == 2)


def fsdp2(here: Rank) -> dict[str, Any]:
    return _there_and_back("fsdp2", here)


def hsdp(here: Rank) -> dict[str, Any]:
    return _there_and_back("hsdp", here)


def tensor_parallel(here: Rank) -> dict[str, Any]:
    return _there_and_back("tp", here)


def fsdp2_and_tensor_parallel(here: Rank) -> dict[str, Any]:
    return _there_and_back("fsdp2-tp", here)


def laid_out(here: Rank) -> dict[str, dict[str, Any]]:
    """Of every kind of job: this rank's layout, the image that it makes, and the whole tensors that all of them hold parts of."""
    kinds = ("ddp", "fsdp2", "hsdp", "tp", "fsdp2-tp") if here.world == 4 else ("ddp", "fsdp2", "tp")
    return {kind: _laid_out(build(kind, here, seed=1), here) for kind in kinds}


def _laid_out(job: Trained, here: Rank) -> dict[str, Any]:
    job.turn()
    survey = TrainingState({"": job.model}, {"": job.optimizer}, {}).survey()
    gathered: list[list[int]] = [[] for _ in range(here.world)]
    dist.all_gather_object(gathered, sums(survey.items))
    held, split = confirmed([item.slice for item in survey.items], gathered, here.rank)
    assert split == []
    layout = Layout.of(1, share(held, here.rank))
    tensors = {item.slice.name: item for item in survey.items}
    image = np.full(layout.values_offset, 0xA5, np.uint8)
    for placed in layout.placed:
        item = tensors[placed.slice.name]
        first = placed.slice.start[0] - item.slice.start[0] if placed.slice.start else 0
        part = item.tensor[first : first + placed.slice.rows] if placed.slice.extent else item.tensor
        image[placed.offset : placed.end] = np.frombuffer(as_bytes(part), np.uint8)
    whole = {
        item.slice.name: as_bytes(item.source.full_tensor() if isinstance(item.source, DTensor) else item.source)
        for item in survey.items
    }
    return {"layout": layout.to_text(), "image": image.tobytes(), "whole": whole}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def disagreeing(here: Rank) -> dict[str, Any]:
    """One rank's weights are not what DDP believes them to be."""
    job = build("ddp", here, seed=1)
    with torch.no_grad():
        if here.rank == 1:
            job.model.module.odd.weight.add_(0.125)  # type: ignore[union-attr,operator]
    ckpt = job.attach(here)
    for step in (1, 2):
        job.turn()
        assert sealed(here, ckpt, step)
    taken, layout = job.bits(), own_layout(here)
    ckpt.close(ended=False)
    again = build("ddp", here, seed=2)
    ckpt = again.attach(here)
    restored = ckpt.restore()
    ckpt.close()
    return {
        "restored": restored, "same": again.bits() == taken, "taken": taken[0], "layout": layout[0],
        "logged": here.logged,
    }  # fmt: skip


def changing(here: Rank) -> dict[str, Any]:
    """State appears late, layers are added and unfrozen, the model outgrows its slots: on both ranks alike."""
    job = build("fsdp2", here, seed=1)
    ckpt = job.attach(here)
    assert sealed(here, ckpt, 0)
    taken, watermarks = [], []
    for step in range(1, 24):
        job.turn()
        if step == 8:
            _extended(job)
        if sealed(here, ckpt, step):
            taken.append(step)
        watermarks.append(ckpt.watermark or 0)
    wanted = job.bits()
    skipped = dict(ckpt.stats().skipped)
    ckpt.close(ended=False)
    again = build("fsdp2", here, seed=2)
    _extended(again)
    ckpt = again.attach(here)
    restored = ckpt.restore()
    ckpt.close()
    return {
        "taken": taken, "watermarks": watermarks, "skipped": skipped, "restored": restored,
        "same": again.bits() == wanted,
    }  # fmt: skip


def _extended(job: Trained) -> None:
    wide = nn.Linear(6, 150_000)
    fully_shard(wide)
    job.model.wide = wide
    job.optimizer.add_param_group({"params": list(wide.parameters()), "lr": 1e-3})
    for parameter in wide.parameters():
        parameter.grad = torch.zeros_like(parameter)


def torn_on_one(here: Rank) -> dict[str, Any]:
    """Rank 1 touches a weight inside the window; both give the snapshot up, and the next is taken."""
    job = build("fsdp2", here, seed=1)
    ckpt = job.attach(here)
    for step in (1, 2):
        job.turn()
        assert sealed(here, ckpt, step)
    wanted = job.bits()
    job.turn()
    assert ckpt.snapshot(3).skipped is None
    if here.rank == 1:
        with torch.no_grad():
            next(iter(job.model.parameters())).to_local().mul_(2.0)  # type: ignore[attr-defined]
    ckpt.close(ended=False)
    here.barrier()
    again = build("fsdp2", here, seed=2)
    ckpt = again.attach(here)
    restored = ckpt.restore()
    same = again.bits() == wanted
    taken = []
    for step in (3, 4, 5):
        again.turn()
        ticket = ckpt.snapshot(step)
        if here.rank == 1 and step == 3:
            with torch.no_grad():
                next(iter(again.model.parameters())).to_local().mul_(2.0)  # type: ignore[attr-defined]
        if ticket.skipped is None:
            with contextlib.suppress(SnapshotSkipped):
                ckpt.wait(ticket)
                taken.append(step)
        here.barrier()
    skipped = dict(ckpt.stats().skipped)
    ckpt.close()
    return {"restored": restored, "same": same, "taken": taken, "skipped": skipped}


def refused_on_one(here: Rank) -> Any:
    """Rank 1 alone has something that cannot be captured: both learn of it at attach."""
    job = build("fsdp2", here, seed=1)
    if here.rank == 1:
        job.extras["odd"] = 3
    try:
        job.attach(here)
    except HoldfastError as error:
        return [type(error).__name__, str(error)]
    return None
