"""What a training loop passes to a Checkpointer, and gets from it: deadlines, tickets, figures."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

from ..snapshot.record import SnapshotId

State = Literal["sealed", "protected", "persisted"]


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each kind of wait may take, in seconds.

    Attributes:
        attach: at construction: starting the agent, reserving and prefaulting memory; all ranks arriving.
        restore: each stage of a restore, for the slowest rank.
        protect: for a snapshot to be protected; after that it is given up.
        beat: at the end of a step, for the other ranks' beat; after that the snapshot is skipped.
        spill: for a snapshot that is due in a tier to get there; its slot is left alone for so long.
        last: at the last step before a preemption, for the slowest rank.
        fence: before an optimizer step, for the copies; after that the snapshot is discarded.
        close: at the end, for the last snapshot to be sealed.
    """

    attach: float = 120.0
    restore: float = 600.0
    protect: float = 60.0
    beat: float = 1.0
    spill: float = 600.0
    last: float = 30.0
    fence: float = 60.0
    close: float = 30.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """One asked-for snapshot. ``skipped`` is the reason if it was not taken, else None."""

    step: int
    skipped: str | None = None
    id: SnapshotId | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """What the last restore brought back to this rank.

    Attributes:
        step, run: of the snapshot.
        world: how many ranks took it.
        fresh_streams: the ranks that there were not then. They draw from random streams of their own, seeded with the SHA-256 of
            run, step and rank; empty if all ranks drew the same numbers, as then the new ones do, too.
        missing, unexpected, mismatched: names of tensors that are live only, in the snapshot only, or different in both; empty
            unless ``restore(strict=False)``.
        read_bytes: put into live tensors.
        pulled_bytes: of what was read, what came from other nodes or from tiers.
        proved_bytes: if other ranks or meshes came back: how much of the images is found again in the live tensors of all ranks
            together, by the checksums that were taken when they were sealed.
    """

    step: int
    run: str
    world: int
    fresh_streams: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    read_bytes: int = 0
    pulled_bytes: int = 0
    proved_bytes: int = 0


@dataclass(slots=True)
class Stats:
    """What happened so far. Times in seconds.

    Attributes:
        taken: snapshots begun.
        skipped: how often no snapshot was taken or kept, by reason.
        stall_s: training-thread time in our calls, per step; the newest 10,000.
        copy_s: duration of the last lazy copy.
        image_bytes: length of this rank's image in the last snapshot.
        copied_bytes: how much of it was copied; the rest, which nothing trains, lay in its slot already.
        restore_s: duration of the last restore, None if there was none.
        restored: what it brought back.
        reprotect_s: how much of it went into protecting the restored snapshot again; None if there is nobody to do so.
    """

    taken: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    stall_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    copy_s: float = 0.0
    image_bytes: int = 0
    copied_bytes: int = 0
    restore_s: float | None = None
    restored: Restored | None = None
    reprotect_s: float | None = None
