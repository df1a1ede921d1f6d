"""Where a slot stands, as its trainer sees it, and which slot may be overwritten next. Pure.

A snapshot is sealed when two things have happened, in either order: the agent has checksummed the image and written
its record (*prepared*), and the trainer has passed the fence with no tensor touched since the copy began (*fenced*)::

            OPEN            FENCED             PREPARED
    FREE ────────▶ COPYING ────────▶ CLEAN ───────────────▶ SEALED
                      │    PREPARED            FENCED          ▲
                      └──────────▶ RECORDED ───────────────────┘

DISCARDED leads from everywhere back to FREE; OPEN leads from SEALED to COPYING: the slot is overwritten. A slot too
small for the image is OUTGROWN, and FREE again once the agent has replaced it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from .record import SnapshotId


class Stage(Enum):
    """Where a slot stands."""

    FREE = auto()  # holds nothing
    COPYING = auto()  # being filled; neither fenced nor prepared
    CLEAN = auto()  # fenced: the copy is exact; the record is outstanding
    RECORDED = auto()  # prepared: the record is written; the copy may still turn out torn
    SEALED = auto()  # holds a snapshot
    GROWING = auto()  # being replaced by a larger one; holds nothing


class Event(Enum):
    """What happens to a slot."""

    OPEN = auto()
    FENCED = auto()
    PREPARED = auto()
    DISCARDED = auto()
    OUTGROWN = auto()


_TRANSITIONS: Final[dict[tuple[Stage, Event], Stage]] = {
    (Stage.FREE, Event.OPEN): Stage.COPYING,
    (Stage.SEALED, Event.OPEN): Stage.COPYING,
    (Stage.COPYING, Event.FENCED): Stage.CLEAN,
    (Stage.COPYING, Event.PREPARED): Stage.RECORDED,
    (Stage.CLEAN, Event.PREPARED): Stage.SEALED,
    (Stage.RECORDED, Event.FENCED): Stage.SEALED,
    (Stage.FREE, Event.OUTGROWN): Stage.GROWING,
    (Stage.SEALED, Event.OUTGROWN): Stage.GROWING,
    **{(stage, Event.DISCARDED): Stage.FREE for stage in Stage},
}


@dataclass(frozen=True, slots=True)
class SlotState:
    """One slot: its stage, and which snapshot it holds or is being filled with (None if free)."""

    stage: Stage = Stage.FREE
    id: SnapshotId | None = None

    def after(self, event: Event, id: SnapshotId | None = None) -> SlotState:
        """The state after *event*; OPEN says for which snapshot. An event that cannot happen here is our own bug."""
        stage = _TRANSITIONS.get((self.stage, event))
        assert stage is not None, f"{event.name} cannot happen to a slot that is {self.stage.name} ({self.id})"
        assert (id is not None) == (event is Event.OPEN)
        if stage in (Stage.FREE, Stage.GROWING):
            return SlotState(stage)
        return SlotState(stage, id or self.id)


def find(slots: Sequence[SlotState], id: SnapshotId) -> int | None:
    """The index of the slot that holds, or is being filled with, snapshot *id*."""
    return next((i for i, slot in enumerate(slots) if slot.id == id), None)


def overwritable(
    slots: Sequence[SlotState], watermark: SnapshotId | None, pinned: Collection[SnapshotId] = ()
) -> int | None:
    """The slot to fill next: a free one, else the oldest sealed one that is older than the watermark, else None.

    The watermark itself, and everything newer, is never offered: until a newer snapshot is complete on every rank, that
    is what the job would go back to. Nor is what is *pinned*: it is being spilled.
    """
    free = next((i for i, slot in enumerate(slots) if slot.stage is Stage.FREE), None)
    if free is not None or watermark is None:
        return free
    old = [
        (slot.id, i)
        for i, slot in enumerate(slots)
        if slot.stage is Stage.SEALED and slot.id is not None and slot.id < watermark and slot.id not in pinned
    ]
    return min(old)[1] if old else None
