"""One contender in a process of its own: reads a ``TrialSpec`` as JSON from its first argument, prints a result as JSON.

Order: build the workload, attach, warm up, measure memory, then the segments (a mode and an interval each), and for
Holdfast the bandwidths. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from contenders import Contender, Holdfast, make
from workload import Clockwork, Mode, Workload, calibrate

_WARM_UP: Final = 4  # a slot each, and the steps that a layout takes; one for peers, whose snapshots take seconds
_LIMIT_BYTES: Final = 1_000_000_000  # of the buffers that the limit is measured with, if the state is larger
_PAIRS: Final = 5


@dataclass(frozen=True, slots=True)
class Segment:
    """So many iterations of one mode, a snapshot at each step that *every* divides.

    Once *cap_s* has passed there are no more, save for the step after the first snapshot.
    """

    mode: Mode
    every: int
    iterations: int
    cap_s: float


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """What one process does."""

    contender: str
    state_bytes: int
    matmuls: int
    segments: list[Segment]
    folder: str
    job: str = ""
    shm: str = ""
    bandwidth: bool = False


@dataclass(slots=True)
class SegmentResult:
    """What one segment took. Lists have one entry per step.

    Attributes:
        took: whether a snapshot of that step was taken.
        ends_s: of the training thread at the end of each step, in the contender's ``step``, by our own timer.
        hooks_s: in the contender's hook before the optimizer's step. What waits there, waits for the step before.
        ends_cpu_s, hooks_cpu_s: what of it was computing; the rest is waiting: for a copy, the interpreter, a core.
        stall_s: both together, by the account of ``Checkpointer.stats``.
        copy_s: of each lazy copy.
    """

    mode: str
    every: int
    iterations: int = 0
    wall_s: float = 0.0
    took: list[bool] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    ends_s: list[float] = field(default_factory=list)
    ends_cpu_s: list[float] = field(default_factory=list)
    hooks_s: list[float] = field(default_factory=list)
    hooks_cpu_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    copy_s: list[float] = field(default_factory=list)


class Stopwatch:
    """The training thread's time in a contender's hands: around its ``step``, and around its hook on the optimizer.

    The hook before the optimizer's step belongs to the snapshot of the step before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.wall_s, self.cpu_s = 0.0, 0.0
        self._began = (0.0, 0.0)
        self._optimizer = optimizer
        optimizer.register_step_pre_hook(lambda *_: self.start())

    def end_hooks(self) -> None:
        """The hooks to be timed are registered now."""
        self._optimizer.register_step_pre_hook(lambda *_: self.stop())

    def start(self) -> None:
        self._began = (time.perf_counter(), time.thread_time())

    def stop(self) -> None:
        self.cpu_s += time.thread_time() - self._began[1]
        self.wall_s += time.perf_counter() - self._began[0]

    def lap(self) -> tuple[float, float]:
        """Wall and CPU time since the last lap."""
        lap, self.wall_s, self.cpu_s = (self.wall_s, self.cpu_s), 0.0, 0.0
        return lap


class Trial:
    """The trainer of one contender."""

    def __init__(self, spec: TrialSpec) -> None:
        torch.set_num_threads(1)
        self.spec = spec
        self.workload = Workload.of(spec.state_bytes)
        self.watch = Stopwatch(self.workload.optimizer)
        self.contender: Contender = make(
            spec.contender, self.workload, folder=Path(spec.folder), job=spec.job, shm=spec.shm
        )
        self.watch.end_hooks()
        self.now = 0

    def run(self) -> dict[str, Any]:
        """The whole trial."""
        result: dict[str, Any] = {
            "contender": self.spec.contender,
            "tensors": len(self.workload.tensors()),
            "state_bytes": self.workload.state_bytes,
        }
        for _ in range(_WARM_UP if self.spec.contender in ("none", "holdfast", "holdfast-tier") else 1):
            self._segment(Segment("sleep", 1, 1, 60.0))
        result["pss_bytes"] = _pss_bytes(os.getpid())
        if isinstance(self.contender, Holdfast):
            result["attach_s"] = self.contender.attach_s
            result["agent_pss_bytes"] = _pss_bytes(int((Path(self.spec.shm) / "agent.pid").read_text()))
        spills = self._spills()
        result["segments"] = [asdict(self._segment(segment)) for segment in self.spec.segments]
        result["spills"] = self._spills() - spills
        if self.spec.bandwidth and isinstance(self.contender, Holdfast):
            result["bandwidth"] = self._bandwidth(self.contender)
        self.contender.close()
        return result

    def _segment(self, segment: Segment) -> SegmentResult:
        """Iterate. The time from the end of the last iteration to everything being settled is not counted."""
        clock, result = Clockwork(segment.mode, self.spec.matmuls), SegmentResult(segment.mode, segment.every)
        account = _Account(self.contender)
        gc.collect()
        self.watch.lap()
        began_s = time.perf_counter()
        while result.iterations < segment.iterations and (
            result.iterations <= segment.every or time.perf_counter() - began_s < segment.cap_s
        ):
            self.now += 1
            result.iterations += 1
            clock.run()
            self.workload.optimizer.step()
            account.copied(result)
            _note(self.watch.lap(), result.hooks_s, result.hooks_cpu_s)
            self.watch.start()
            result.took.append(self.contender.step(self.now, result.iterations % segment.every == 0))
            self.watch.stop()
            _note(self.watch.lap(), result.ends_s, result.ends_cpu_s)
        result.wall_s = time.perf_counter() - began_s
        account.close(result)
        self.contender.settle()
        return result

    def _spills(self) -> int:
        """How many snapshots the agent has spilled so far."""
        if self.spec.contender != "holdfast-tier":
            return 0
        from holdfast.agent.client import AgentClient
        from holdfast.agent.settings import NodeSettings

        with AgentClient.at(NodeSettings.read({}, job=self.spec.job, shm=self.spec.shm)) as client:
            return sum(tier.spills for tier in client.status().tiers)

    # -- bandwidth ---------------------------------------------------------------------------------------------------

    def _bandwidth(self, holdfast: Holdfast) -> dict[str, Any]:
        """Copies into the slot and restores out of it, in turn with the limit. Bytes per second, lists of equal length."""
        limit = Limit(min(self.workload.state_bytes, _LIMIT_BYTES))
        result: dict[str, Any] = {"limit_bytes": limit.nbytes, "limit": [], "into_slot": []}
        nbytes = self.workload.state_bytes
        for _ in range(_PAIRS):
            before = limit.measure(threads=1)
            self.now += 1
            ticket = holdfast.ckpt.snapshot(self.now)
            if ticket.id is None:
                continue
            holdfast.ckpt.wait(ticket)
            result["into_slot"].append(nbytes / holdfast.ckpt.stats().copy_s)
            result["limit"].append(statistics.mean((before, limit.measure(threads=1))))
        result["limit_all_threads"] = statistics.median(limit.measure(os.cpu_count() or 1) for _ in range(_PAIRS))
        result["restore"], result["restore_limit"], result["restore_split_s"] = [], [], []
        for _ in range(_PAIRS):
            before = limit.measure(threads=1)
            with Split() as split:
                holdfast.ckpt.restore()
            result["restore"].append(nbytes / (holdfast.ckpt.stats().restore_s or float("inf")))
            result["restore_limit"].append(statistics.mean((before, limit.measure(threads=1))))
            result["restore_split_s"].append({"all": holdfast.ckpt.stats().restore_s, **split.seconds})
        return result


class _Account:
    """What ``Checkpointer.stats`` says of one segment, for contenders that are a Checkpointer."""

    def __init__(self, contender: Contender) -> None:
        self._stats = contender.ckpt.stats() if isinstance(contender, Holdfast) else None
        if self._stats is not None:
            self._skipped = dict(self._stats.skipped)
            self._stats.stall_s.clear()

    def copied(self, result: SegmentResult) -> None:
        """Note the copy of the step before, if there was one; its fence has passed."""
        if self._stats is not None and result.took and result.took[-1]:
            result.copy_s.append(self._stats.copy_s)

    def close(self, result: SegmentResult) -> None:
        """The segment is over."""
        if self._stats is not None:
            before = self._skipped
            result.skipped = {r: n - before.get(r, 0) for r, n in self._stats.skipped.items() if n > before.get(r, 0)}
            # The first entry also has what was waited for between the segments.
            result.stall_s = list(self._stats.stall_s)[1:]


def _note(lap: tuple[float, float], wall_s: list[float], cpu_s: list[float]) -> None:
    wall_s.append(lap[0])
    cpu_s.append(lap[1])


class Limit:
    """What memory gives: one ``torch.Tensor.copy_`` between two resident buffers."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // 4 * 4
        self._source = torch.ones(self.nbytes // 4)
        self._target = torch.ones(self.nbytes // 4)

    def measure(self, threads: int) -> float:
        """Bytes per second, with so many threads of torch's."""
        torch.set_num_threads(threads)
        began_s = time.perf_counter()
        self._target.copy_(self._source)
        taken_s = time.perf_counter() - began_s
        torch.set_num_threads(1)
        return self.nbytes / taken_s


class Split:
    """Where a restore's time goes, by timers around functions of the package; those it no longer has are left out.

    Attributes:
        seconds: by stage. Opening and planning are part of ``prepare``; ``checksums``, summed over the threads that
            compute them, of ``verify and copy``.
    """

    _STAGES: Final = {
        "open the images": ("holdfast.hooks.restore", "SourceImage"),
        "plan": ("holdfast.hooks.restore", "assemble"),
        "verify and copy": ("holdfast.hooks.restore", "apply"),
        "checksums": ("holdfast.snapshot.live", "crc32c_at"),
    }
    _METHODS: Final = {
        "ask the agents": ("holdfast.hooks.checkpointer", "Checkpointer", "_begin_run"),
        "prepare": ("holdfast.hooks.restore", "Restorer", "_prepare"),
        "values": ("holdfast.hooks.restore", "Restorer", "_finish"),
        "compare": ("holdfast.hooks.restore", "Restorer", "_compare"),
    }

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Split:
        for stage, (module, name) in self._STAGES.items():
            self._time(stage, importlib.import_module(module), name)
        for stage, (module, kind, name) in self._METHODS.items():
            self._time(stage, getattr(importlib.import_module(module), kind, None), name)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _time(self, stage: str, owner: Any, name: str) -> None:
        timed = getattr(owner, name, None)
        if timed is None:
            return

        def timing(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return timed(*args, **kwargs)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began_s

        setattr(owner, name, timing)
        self._undo.callback(setattr, owner, name, timed)


def _pss_bytes(pid: int) -> int:
    """Proportional set size: shared pages count in equal parts for those who map them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise LookupError(f"no Pss of pid {pid}")


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Whatever libraries print goes to standard error: standard output carries the result alone."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def main() -> None:
    """Run what the first argument says."""
    given = json.loads(sys.argv[1])
    given["segments"] = [Segment(**segment) for segment in given["segments"]]
    spec = TrialSpec(**given)
    with _stdout_to_stderr():
        result = {"matmuls": calibrate()} if spec.contender == "calibrate" else Trial(spec).run()
    print(json.dumps(result), flush=True)
    # Peers' background processes and threads may linger; there is nothing left to wait for.
    os._exit(0)


if __name__ == "__main__":
    main()
