"""A small real training job that can be killed anywhere, and the judgement of what it did.

Ranks are real processes that start warm, so that a life costs a third of a second. Every step they append loss, digest of the
whole state and what they know to be complete to a log, unbuffered, so that it survives SIGKILL. ``reference`` trains the same
job without Holdfast; ``judge`` compares bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP would warn of what it is told to do

import numpy as np
import psutil
import torch
import torch.distributed as dist
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import AgentClient
from holdfast.agent.settings import NodeSettings
from holdfast.storage.tiers import Tier
from holdfast.tests.warm import Agent, server
from torch import nn

DEADLINE_S = 120.0
POLL_S = 0.002  # between two looks at what ranks have logged


class Loader:
    """A shuffled, stateful source of batches that draws from its own NumPy generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(64)
        self.position = 0

    def next(self) -> torch.Tensor:
        if self.position + 4 > len(self.order):
            self.order, self.position = self.rng.permutation(64), 0
        rows = self.order[self.position : self.position + 4]
        self.position += 4
        return torch.from_numpy(np.sin(np.outer(rows + 1, np.arange(1, 17)))).float()

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "order": self.order, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.order, self.position = state["order"], state["position"]


@dataclass(slots=True)
class Training:
    """Everything that makes up the state of one rank, and one step of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: Loader
    python: dict[str, Any]

    @classmethod
    def build(cls, strategy: str, rank: int) -> Training:
        torch.manual_seed(11)
        random.seed(rank)
        np.random.seed(rank)
        model: nn.Module = nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 33), nn.Linear(33, 16)
        )
        if strategy == "ddp":
            # Otherwise the first step of each life has other buckets than later ones, and sums round differently.
            model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        elif strategy == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model[0])  # type: ignore[index]
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        torch.manual_seed(100 + rank)  # dropout differs from rank to rank
        return cls(model, optimizer, scheduler, Loader(rank), {"draws": 0.0})

    def step(self) -> float:
        batch = self.loader.next() + random.random() + float(np.random.rand())
        loss = (self.model(batch) - batch).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.python["draws"] += random.random()
        return float(loss.item())

    def extras(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "loader": self.loader, "python": self.python}

    def digest(self) -> str:
        """Of every byte that matters for how training goes on."""
        found = hashlib.sha256()
        with torch.no_grad():
            for tensor in [*self.model.state_dict().values(), *self._moments()]:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                found.update(local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found.update(torch.get_rng_state().numpy().tobytes())
        for value in (random.getstate(), np.random.get_state(legacy=False), self.scheduler.state_dict()):
            found.update(repr(value).encode())
        found.update(repr([group["lr"] for group in self.optimizer.param_groups]).encode())
        found.update(repr((self.loader.state_dict(), self.python)).encode())
        return found.hexdigest()[:16]

    def _moments(self) -> Iterator[torch.Tensor]:
        for state in self.optimizer.state.values():
            yield from (state[key] for key in sorted(state))


@dataclass(frozen=True, slots=True)
class Spec:
    """What one life of a rank is told."""

    folder: str
    shm: str
    job: str
    world: int
    steps: int
    strategy: str
    life: int
    step_s: float
    crash: str = ""
    protect: str = "auto"
    protect_s: float = DEADLINE_S
    agent: str | None = None  # socket of an agent that is started again by others, not by the trainers
    tiers: tuple[Tier, ...] = ()
    grace: str | None = None
    spill_s: float = DEADLINE_S


def train(spec: Spec, rank: int) -> None:
    """One life of one rank; the entry of its process."""
    from holdfast import Checkpointer, Deadlines, crashpoints

    log = os.open(f"{spec.folder}/rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stderr = open(f"{spec.folder}/rank{rank}.err", "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    _prepare(spec, rank)
    crashpoints.arm(spec.crash)
    training = Training.build(spec.strategy, rank)
    checkpointer = Checkpointer(
        training.model,
        training.optimizer,
        training.extras(),
        job=spec.job,
        shm=spec.shm,
        agent=spec.agent,
        protect=spec.protect,
        tiers=spec.tiers,
        grace=spec.grace,
        deadlines=Deadlines(attach=DEADLINE_S, restore=DEADLINE_S, protect=spec.protect_s, spill=spec.spill_s),
    )
    with checkpointer as ckpt:
        restored = ckpt.restore() or 0
        _write(log, life=spec.life, restored=restored, digest=training.digest() if restored else None, pid=os.getpid())
        for step in range(restored + 1, spec.steps + 1):
            loss = training.step()
            digest = training.digest()
            ckpt.step(step)
            stats = ckpt.stats()
            _write(
                log, life=spec.life, step=step, loss=loss.hex(), digest=digest, taken=stats.taken,
                skipped=dict(stats.skipped), watermark=ckpt.watermark or 0, persisted=ckpt.persisted or 0,
            )  # fmt: skip
            if ckpt.should_stop:
                break
            if spec.world == 1 and os.path.exists(f"{spec.folder}/enough"):
                break
            time.sleep(spec.step_s)  # the device computes
        stopped = ckpt.should_stop
    _write(log, life=spec.life, done=True, stopped=stopped)


def _prepare(spec: Spec, rank: int) -> None:
    torch.set_num_threads(1)
    if spec.world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{spec.folder}/store-{spec.life}", rank=rank, world_size=spec.world
        )


def train_reference(spec: Spec, rank: int) -> None:
    """The same training without Holdfast."""
    log = os.open(f"{spec.folder}/reference{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _prepare(spec, rank)
    training = Training.build(spec.strategy, rank)
    for step in range(1, spec.steps + 1):
        loss = training.step()
        _write(log, step=step, loss=loss.hex(), digest=training.digest())


def _write(log: int, **entry: Any) -> None:
    os.write(log, json.dumps(entry).encode() + b"\n")


@dataclass(slots=True)
class Log:
    """What a rank has logged. It only grows, so every line is parsed once, however often the log is looked at."""

    path: Path
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _read_bytes: int = 0

    def read(self) -> Sequence[dict[str, Any]]:
        """The whole lines so far; one cut off by a kill is not there. The same list each time, which grows."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
        except FileNotFoundError:
            return self._entries
        whole = text[: text.rfind(b"\n") + 1]
        self._entries += map(json.loads, whole.splitlines())
        self._read_bytes += len(whole)
        return self._entries


@dataclass(slots=True)
class Job:
    """A training job on one node, over all its lives."""

    folder: Path
    world: int = 1
    steps: int = 60
    strategy: str = "plain"
    step_s: float = 0.003
    tiers: tuple[Tier, ...] = ()
    grace: str | None = None
    lives: int = 0
    kills: int = 0
    cuts: set[int] = field(default_factory=set)  # lives that began after a power cut
    damaged: set[int] = field(
        default_factory=set
    )  # those that found tiers damaged: what they restore is looked at elsewhere
    place: str = ""  # to tell several nodes apart
    name: str = field(default_factory=lambda: f"fault-{uuid.uuid4().hex[:8]}")
    ranks: list[BaseProcess] = field(default_factory=list)
    agent: Agent | None = None
    _logs: dict[str, Log] = field(default_factory=dict)

    @property
    def shm(self) -> Path:
        return Path(f"/dev/shm/{self.name}{self.place}")

    def spec(self, crash: str = "") -> Spec:
        return Spec(
            str(self.folder), str(self.shm), self.name, self.world, self.steps, self.strategy, self.lives,
            self.step_s, crash, tiers=self.tiers, grace=self.grace,
        )  # fmt: skip

    # -- running -----------------------------------------------------------------------------------------------------

    def reference(self) -> list[dict[int, dict[str, Any]]]:
        """Train as far without interruption, and without Holdfast; returns each rank's log by step."""
        self.lives += 1
        spec = replace(self.spec(), steps=max(e.get("step", 0) for e in self.log()))
        processes = [server.Process(target=train_reference, args=(spec, r)) for r in range(self.world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE_S)
            assert process.exitcode == 0
        return [{e["step"]: e for e in self._log(f"reference{r}").read()} for r in range(self.world)]

    def start(self, crash: str = "", crash_rank: int = 0) -> None:
        """Begin a life; *crash* is where one of its ranks dies."""
        self.lives += 1
        self.ranks = [
            server.Process(target=train, args=(self.spec(crash if r == crash_rank else ""), r), daemon=True)
            for r in range(self.world)
        ]
        for process in self.ranks:
            process.start()

    def start_agent(self, crash: str = "") -> None:
        """Start an agent that dies where *crash* says; the trainers restart one without that wish."""
        self.agent = Agent(
            ["--job", self.name, "--shm", str(self.shm), "--idle-exit", "never"],
            self.folder / "agent.err",
            {**os.environ, "HOLDFAST_CRASH": crash},
        )
        self.agent.stdout.readline()  # the ready line, or nothing if it died before

    def wait_death(self, rank: int = 0) -> None:
        """Until *rank* has died of SIGKILL, which counts as a kill; then end the others, as torchrun does."""
        self.ranks[rank].join(DEADLINE_S)
        assert self.ranks[rank].exitcode == -signal.SIGKILL, f"exit code {self.ranks[rank].exitcode}\n{self.errors()}"
        self.kills += 1
        self.end_ranks()

    def end_ranks(self) -> None:
        for process in self.ranks:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.ranks:
            process.join(DEADLINE_S)
        self.ranks = []

    def kill_ranks(self, *which: int) -> None:
        """SIGKILL, now."""
        for rank in which or range(self.world):
            pid = self.ranks[rank].pid
            assert pid is not None
            with contextlib.suppress(ProcessLookupError):  # it ended just now, by itself
                os.kill(pid, signal.SIGKILL)
                self.kills += 1

    def agent_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.shm / "agent.pid").read_text())
        return None

    def signal_agent(self, number: int = signal.SIGKILL) -> None:
        pid = self.agent_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                self.kills += number == signal.SIGKILL

    def cut_power(self) -> None:
        """All at once: nothing runs any more, and nothing is left in memory."""
        self.end_ranks()
        self._end_agents()
        shutil.rmtree(self.shm, ignore_errors=True)
        self.cuts.add(self.lives + 1)

    def _end_agents(self) -> None:
        """SIGKILL the agent, and any that trainers have started, or are just starting, in its place; see them gone."""
        for process in psutil.process_iter(["cmdline"]):
            if str(self.shm) in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    self.kills += 1
                await_gone(process.pid)
        agent, self.agent = self.agent, None
        if agent is not None:
            self.kills += agent.poll() is None
            agent.kill()
            agent.wait(DEADLINE_S)
            agent.stdout.close()

    def finish(self, *, enough: bool = False) -> None:
        """Until all ranks have ended well. *enough*: after the step they are at (one rank only)."""
        if enough:
            (self.folder / "enough").touch()
        for process in self.ranks:
            process.join(DEADLINE_S)
        codes = [process.exitcode for process in self.ranks]
        assert codes == [0] * self.world, f"exit codes {codes}\n{self.errors()}"

    def remove(self) -> None:
        """Leave nothing behind."""
        self.end_ranks()
        self._end_agents()
        shutil.rmtree(self.shm, ignore_errors=True)

    def status(self) -> wire.StatusReport:
        with AgentClient.at(NodeSettings.read({}, job=self.name, shm=str(self.shm))) as client:
            return client.status(DEADLINE_S)

    # -- watching ----------------------------------------------------------------------------------------------------

    def log(self, rank: int = 0) -> Sequence[dict[str, Any]]:
        return self._log(f"rank{rank}").read()

    def _log(self, name: str) -> Log:
        return self._logs.setdefault(name, Log(self.folder / f"{name}.jsonl"))

    def errors(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("*.err")))

    def wait_for(self, what: str, condition: Callable[[Sequence[dict[str, Any]]], bool], rank: int = 0) -> None:
        """Until the log of *rank* says so; fails after the deadline, or if the rank ended before."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition(self.log(rank)):
            assert time.monotonic() < deadline_s, f"no {what} within {DEADLINE_S} s\n{self.errors()}"
            ended = wait([self.ranks[rank].sentinel], POLL_S)
            assert not ended or condition(self.log(rank)), f"ended before {what}\n{self.errors()}"

    def wait_progress(self, steps: int, rank: int = 0) -> None:
        """Until *rank* has made so many steps in this life."""
        self.wait_for(
            f"{steps} steps of life {self.lives}",
            lambda log: sum(e["life"] == self.lives and "step" in e for e in log) >= steps,
            rank,
        )

    def wait_newer(self) -> None:
        """Until the trainer knows of a complete snapshot that is newer than what it knows of now."""
        newest = max((e.get("watermark", 0) for e in self.log()), default=0)
        self.wait_for("newer snapshot", lambda log: any(e.get("watermark", 0) > newest for e in log))

    # -- judging -----------------------------------------------------------------------------------------------------

    def _safe(self, life: int) -> int:
        """The newest step that any rank had reported as persisted before that life, and since tiers were damaged."""
        since = max((one for one in self.damaged if one <= life), default=0)
        logs = (self.log(rank) for rank in range(self.world))
        return max((e.get("persisted", 0) for log in logs for e in log if since <= e["life"] < life), default=0)

    def judge(self) -> list[int]:
        """Every step of every life is bit for bit the reference's, and nothing that any rank knew to be safe was lost: complete
        snapshots, and after a power cut those known to be persisted. Returns the steps that lives began from."""
        began: list[int] = []
        restored: dict[int, int] = {}
        for rank, truth in enumerate(self.reference()):
            complete = last = 0
            for entry in self.log(rank):
                if any(last < cut <= entry["life"] for cut in self.cuts):
                    complete = self._safe(entry["life"])  # what only memory had is gone
                last = entry["life"]
                if "restored" in entry:
                    step = entry["restored"]
                    assert step >= complete, f"rank {rank} went back to {step}; {complete} was safe\n{self.errors()}"
                    assert step == 0 or entry["digest"] == truth[step]["digest"], (
                        f"rank {rank}: another state at {step}"
                    )
                    assert restored.setdefault(entry["life"], step) == step, f"ranks restored different steps: {entry}"
                    began += [step] if rank == 0 else []
                    complete = step
                elif "step" in entry:
                    wanted = truth[entry["step"]]
                    assert entry["loss"] == wanted["loss"], f"rank {rank} step {entry['step']}: another loss"
                    assert entry["digest"] == wanted["digest"], f"rank {rank} step {entry['step']}: another state"
                    complete = max(complete, entry["watermark"])
            assert self.log(rank)[-1].get("done"), f"rank {rank} did not finish\n{self.errors()}"
        return began


def await_gone(pid: int) -> None:
    """Until a process that was killed holds nothing any more; its parent may be slow to hear of it."""
    deadline_s = time.monotonic() + DEADLINE_S
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline_s, f"process {pid} does not end"
            time.sleep(0.001)
