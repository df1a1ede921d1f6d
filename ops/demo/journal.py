"""What a run leaves in its folder, written so that a SIGKILL at any instant leaves it readable.

    losses-rank0.jsonl   one JSON line per event, appended whole:
                         {"event": "life", "life": 1, "start": 17, "entered_s": 175.1, "split_s": {"import": 1.9, …}}
                         {"event": "step", "life": 1, "step": 18, "loss": "0x1.6p+1", "wall_s": 176.2, "stall_ms": 0.2}
                         {"event": "stop", "life": 1, "step": 40, "wall_s": 181.9}
    pid-rank0.json       {"pid": 4711, "started_ticks": 162342, "life": 1}; replaced at the start of every life
    final-rank0.json     {"life": 1, "step": 120, "digests": {"parameters": "…", …}, …}; at the end of training
    run.log              what torchrun and the ranks printed
    agent-n2.log         what the agent of a simulated node logged
    store-life1          by which the ranks of simulated nodes meet

Beside the folders of both runs lies ``tier``, to which the attacked run spills if no other place was named.

A *life* is one process of a rank, numbered alike on every rank. ``start`` is the step that the life continues from; the
loss of step s is that of the s-th optimizer step, 1-based, written after it. ``stop`` is the last line of a life that ended by
itself after a preemption notice: it has not finished, whatever its exit code. ``stall_ms`` is what the calls of the
Checkpointer took in the last step that has been accounted for, null where there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

LOG_NAME: Final = "run.log"
TIER_NAME: Final = "tier"
_OF_A_TIER: Final = ("entries", "snapshots", "readers", "deleted")
_OURS: Final = ("losses-rank*.jsonl", "pid-rank*.json", "final-rank*.json", "agent-*.log", "store-life*", LOG_NAME)
_TAIL_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class LifeStarted:
    """A process of a rank is ready to train. ``split_s`` names the phases up to here, in order, in seconds."""

    life: int
    start: int
    entered_s: float
    split_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step. ``loss`` is exact (``float.hex``); times are seconds since the epoch."""

    life: int
    step: int
    loss: str
    wall_s: float
    stall_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """The Checkpointer said that *step* is to be the last one of this life, as the job is preempted."""

    life: int
    step: int
    wall_s: float


Event = LifeStarted | StepDone | Stopped
_EVENTS: Final[Mapping[str, type[Event]]] = {"life": LifeStarted, "step": StepDone, "stop": Stopped}
_NAMES: Final = {kind: name for name, kind in _EVENTS.items()}


@dataclass(slots=True)
class LifeRecord:
    """All that one life of one rank wrote; ``steps`` in the order in which they were written.

    ``stopped``: its last line, if it ended because of a preemption notice, or None.
    """

    life: int
    start: int
    entered_s: float
    split_s: Mapping[str, float]
    steps: list[StepDone] = field(default_factory=list)
    stopped: Stopped | None = None


@dataclass(frozen=True, slots=True)
class RankRecord:
    """All lives of one rank, oldest first, and its final file if it came that far."""

    rank: int
    lives: Sequence[LifeRecord]
    final: Mapping[str, Any] | None


class Journal:
    """Appends the events of one rank, each in a single write, so that a kill tears at most the last line."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._fd = os.open(_journal_path(folder, rank), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._drop_torn_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, event: Event) -> None:
        os.write(self._fd, json.dumps({"event": _NAMES[type(event)], **asdict(event)}).encode() + b"\n")

    def _drop_torn_line(self) -> None:
        # Otherwise the first line of this life would be glued to what a kill left of the last one.
        size = os.fstat(self._fd).st_size
        offset = max(0, size - _TAIL_BYTES)
        tail = os.pread(self._fd, _TAIL_BYTES, offset)
        os.ftruncate(self._fd, offset + tail.rfind(b"\n") + 1)


class Follower:
    """Reads the events of one rank as they are appended."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = _journal_path(folder, rank)
        self._offset = 0

    def news(self) -> Iterator[Event]:
        """The events written whole since the last call. A line without its end is left for later."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            yield _EVENTS[entry.pop("event")](**entry)


def announce(folder: Path, rank: int, life: int) -> None:
    """Write down which process this rank is now. First of all, so that a life can be killed from its beginning."""
    pid = os.getpid()
    _replace(folder / f"pid-rank{rank}.json", {"pid": pid, "started_ticks": started_ticks(pid), "life": life})


def announced(folder: Path, rank: int) -> Mapping[str, int] | None:
    """What ``announce`` wrote last for *rank*, or None."""
    return _read(folder / f"pid-rank{rank}.json")


def started_ticks(pid: int) -> int | None:
    """When process *pid* started, in clock ticks since boot, or None if there is none. With the pid it is unique."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the command in parentheses, may itself hold spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def finish(folder: Path, rank: int, final: Mapping[str, Any]) -> None:
    """Write the final file of *rank*; its presence says that training ended."""
    _replace(_final_path(folder, rank), final)


def finished(folder: Path, ranks: int) -> bool:
    """Whether all of *ranks* ranks came to the end of training. Exit codes do not tell: a preempted rank exits with 0 too."""
    return all(_final_path(folder, rank).exists() for rank in range(ranks))


def read_run(folder: Path, ranks: int) -> list[RankRecord]:
    """Everything that the run in *folder* left, by rank."""
    return [
        RankRecord(rank, _lives(Follower(folder, rank).news()), _read(_final_path(folder, rank)))
        for rank in range(ranks)
    ]


def clear(folder: Path) -> None:
    """Make *folder*, and remove what an earlier run left there; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _OURS:
        for path in folder.glob(pattern):
            path.unlink()


def clear_tier(out: Path) -> None:
    """Remove the tier that an earlier demo made in *out*, and nothing else that may be in that folder."""
    for name in _OF_A_TIER:
        shutil.rmtree(out / TIER_NAME / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (out / TIER_NAME).rmdir()


def _lives(events: Iterator[Event]) -> list[LifeRecord]:
    lives: list[LifeRecord] = []
    for event in events:
        if isinstance(event, LifeStarted):
            lives.append(LifeRecord(event.life, event.start, event.entered_s, event.split_s))
        elif isinstance(event, StepDone):
            lives[-1].steps.append(event)
        else:
            lives[-1].stopped = event
    return lives


def _journal_path(folder: Path, rank: int) -> Path:
    return folder / f"losses-rank{rank}.jsonl"


def _final_path(folder: Path, rank: int) -> Path:
    return folder / f"final-rank{rank}.json"


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content))
    draft.rename(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content
