"""What a snapshot costs when one percent of the state is trained: what is copied, pulled and computed, against what changes.

    python benchmarks/lora.py [--size 400MB] [--ranks 3] [--steps 12] [--quick]

Each rank is a process with an agent of its own, on loopback addresses; they protect each other, any one of them may be lost. The
same job runs twice: once with nothing known to be frozen, so that all is copied, checksummed and pulled every time, and once
as it is. Figures are per snapshot and rank: bytes of the last one, medians of the times, CPU seconds of the agent. Every
snapshot is waited for until it is protected, so nothing overlaps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import uuid
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from cluster import start_agent
from holdfast import Checkpointer
from holdfast.agent.client import AgentClient
from holdfast.agent.settings import NodeSettings
from holdfast.snapshot import state
from torch import nn

_WIDTH: Final = 2048
_WARM_UP: Final = 8  # snapshots until what stands still is known to
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_LIMIT: Final = 1.1


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank does."""

    rank: int
    ranks: int
    layers: int
    steps: int
    whole: bool  # nothing is known to be frozen
    job: str
    base: str


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one rank, per snapshot."""

    image_bytes: int
    changing_bytes: int
    copied_bytes: int
    pulled_bytes: int
    stall_s: float
    copy_s: float
    agent_cpu_s: float


class Layer(nn.Module):
    """A frozen matrix, and a correction that is trained: with the moments of its optimizer, a hundredth of that size."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.rand(_WIDTH, _WIDTH), requires_grad=False)
        self.correction = nn.Parameter(torch.rand(_WIDTH, _WIDTH // 300))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=400, help="of each rank's state, in MB")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="64 MB, four steps")
    options = parser.parse_args()
    layers = max(1, (64 if options.quick else options.size) * 10**6 // (4 * _WIDTH**2))
    steps = 4 if options.quick else options.steps
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.ranks} ranks of {layers} layers, {steps} steps"
    )
    runs = {
        name: _run(options.ranks, layers, steps, whole)
        for name, whole in (("all of it", True), ("what changes", False))
    }
    _show(runs)


def _run(ranks: int, layers: int, steps: int, whole: bool) -> Figures:
    """The middle rank's figures; all do the same."""
    job = f"bench-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as store:
        context = multiprocessing.get_context("spawn")
        pipes = []
        for rank in range(ranks):
            ear, mouth = context.Pipe(duplex=False)
            plan = Plan(rank, ranks, layers, steps, whole, job, f"/dev/shm/{job}")
            process = context.Process(target=_rank, args=(plan, f"{store}/store", mouth))
            process.start()
            mouth.close()
            pipes.append((process, ear))
        try:
            figures: list[Figures] = [ear.recv() for _, ear in pipes]
        finally:
            for process, _ in pipes:
                process.join()
            shutil.rmtree(f"/dev/shm/{job}", ignore_errors=True)
    return figures[ranks // 2]


def _rank(plan: Plan, store: str, told: Connection) -> None:
    """One rank and its agent."""
    torch.set_num_threads(1)
    shm = Path(plan.base) / f"node{plan.rank}"
    shm.mkdir(parents=True, mode=0o700)
    agent = start_agent(plan.rank, plan.job, shm)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=plan.rank, world_size=plan.ranks)
        told.send(_measure(plan, shm, agent.pid))
        dist.barrier()
        dist.destroy_process_group()
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()


def _measure(plan: Plan, shm: Path, agent: int) -> Figures:
    if plan.whole:
        setattr(state, "may_stand_still", lambda source, local: False)  # noqa: B010 - what the module imports
    torch.manual_seed(plan.rank)
    model = nn.Sequential(*(Layer() for _ in range(plan.layers)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    settings = NodeSettings.read({}, job=plan.job, shm=str(shm))
    with Checkpointer(model, optimizer, job=plan.job, shm=str(shm), protect=f"{plan.ranks - 1}+1") as ckpt:
        copies, began_s = list[float](), 0.0
        for step in range(1, _WARM_UP + plan.steps + 1):
            if step == _WARM_UP + 1:
                began_s = _cpu_s(agent)
            for parameter in trained:
                parameter.grad = torch.rand_like(parameter)
            optimizer.step()
            ticket = ckpt.snapshot(step)
            if ticket.skipped is None:
                ckpt.wait(ticket, "protected")
                copies.append(ckpt.stats().copy_s)
        spent_s = _cpu_s(agent) - began_s
        with AgentClient.at(settings) as client:
            pulled_bytes = client.status(60.0).group.pulled_bytes
        stats = ckpt.stats()
        moments = [t.nbytes for values in optimizer.state.values() for t in values.values()]
        return Figures(
            stats.image_bytes,
            sum(p.nbytes for p in trained) + sum(moments),
            stats.copied_bytes,
            pulled_bytes,
            statistics.median(list(stats.stall_s)[-plan.steps :]),
            statistics.median(copies[-plan.steps :]),
            spent_s / plan.steps,
        )


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _show(runs: dict[str, Figures]) -> None:
    print(f"\n{'':28}" + "".join(f"{name:>16}" for name in runs))
    rows = {
        "image, MB": [f.image_bytes / 1e6 for f in runs.values()],
        "of which changes, MB": [f.changing_bytes / 1e6 for f in runs.values()],
        "copied, MB": [f.copied_bytes / 1e6 for f in runs.values()],
        "pulled for parity, MB": [f.pulled_bytes / 1e6 for f in runs.values()],
        "copy, ms": [f.copy_s * 1e3 for f in runs.values()],
        "agent, CPU ms": [f.agent_cpu_s * 1e3 for f in runs.values()],
        "training thread, ms": [f.stall_s * 1e3 for f in runs.values()],
    }
    for name, figures in rows.items():
        print(f"{name:28}" + "".join(f"{figure:16.2f}" for figure in figures))
    now = runs["what changes"]
    ratio = now.copied_bytes / now.changing_bytes
    print(f"\ncopied / changed: {ratio:.2f} (limit {_LIMIT}) {'ok' if ratio <= _LIMIT else 'MISSED'}")
    print(
        f"pulled / changed: {now.pulled_bytes / now.changing_bytes:.2f}; checksummed in blocks of about a hundredth of an image"
    )


if __name__ == "__main__":
    main()
