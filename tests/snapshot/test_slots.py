"""Slots: every event in every stage, and which slot may be overwritten, against an obvious twin."""

from __future__ import annotations

from itertools import product

import pytest
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.slots import Event, SlotState, Stage, find, overwritable

OLD, OTHER = SnapshotId(1, 4, "aa"), SnapshotId(1, 5, "aa")
ALLOWED = {
    (Stage.FREE, Event.OPEN): Stage.COPYING,
    (Stage.SEALED, Event.OPEN): Stage.COPYING,
    (Stage.COPYING, Event.FENCED): Stage.CLEAN,
    (Stage.COPYING, Event.PREPARED): Stage.RECORDED,
    (Stage.CLEAN, Event.PREPARED): Stage.SEALED,
    (Stage.RECORDED, Event.FENCED): Stage.SEALED,
    (Stage.FREE, Event.OUTGROWN): Stage.GROWING,
    (Stage.SEALED, Event.OUTGROWN): Stage.GROWING,
} | {(stage, Event.DISCARDED): Stage.FREE for stage in Stage}


def state(stage: Stage, id: SnapshotId = OLD) -> SlotState:
    return SlotState(stage, None if stage in (Stage.FREE, Stage.GROWING) else id)


@pytest.mark.parametrize(("stage", "event"), [*product(Stage, Event)], ids=lambda value: value.name)
def test_every_event_in_every_stage(stage: Stage, event: Event) -> None:
    id = OTHER if event is Event.OPEN else None
    if (stage, event) not in ALLOWED:
        with pytest.raises(AssertionError, match=f"{event.name} cannot happen"):
            state(stage).after(event, id)
        return
    after = state(stage).after(event, id)
    assert after.stage is ALLOWED[stage, event]
    assert after.id == (None if after.stage in (Stage.FREE, Stage.GROWING) else id or OLD)


def test_only_opening_says_for_what() -> None:
    with pytest.raises(AssertionError):
        SlotState().after(Event.OPEN)
    with pytest.raises(AssertionError):
        SlotState(Stage.COPYING, OLD).after(Event.FENCED, OTHER)


@pytest.mark.parametrize("order", [(Event.FENCED, Event.PREPARED), (Event.PREPARED, Event.FENCED)])
def test_sealed_takes_both_in_either_order(order: tuple[Event, Event]) -> None:
    slot = SlotState().after(Event.OPEN, OLD).after(order[0])
    assert slot.stage is not Stage.SEALED
    assert slot.after(order[1]) == SlotState(Stage.SEALED, OLD)


def test_nothing_is_sealed_without_both() -> None:
    """Every sequence of up to five events: SEALED is reached by OPEN, FENCED and PREPARED only, and kept by none."""
    for events in product(Event, repeat=5):
        slot, seen = SlotState(), set[Event]()
        for event in events:
            if (slot.stage, event) not in ALLOWED:
                break
            seen = {Event.OPEN} if event is Event.OPEN else seen | {event}
            slot = slot.after(event, OLD if event is Event.OPEN else None)
            assert (slot.stage is Stage.SEALED) == (seen == {Event.OPEN, Event.FENCED, Event.PREPARED})
            if event in (Event.DISCARDED, Event.OUTGROWN):
                seen = set()


def test_find() -> None:
    slots = [SlotState(), SlotState(Stage.COPYING, OTHER), SlotState(Stage.SEALED, OLD)]
    assert find(slots, OLD) == 2
    assert find(slots, OTHER) == 1
    assert find(slots, SnapshotId(2, 4, "aa")) is None
    assert find([], OLD) is None


IDS = [SnapshotId(1, 4, "aa"), SnapshotId(1, 9, "aa"), SnapshotId(2, 5, "bb")]  # by age
STATES = [SlotState(), SlotState(Stage.GROWING)] + [
    SlotState(stage, id) for stage in (Stage.COPYING, Stage.CLEAN, Stage.RECORDED, Stage.SEALED) for id in IDS
]


@pytest.mark.parametrize("watermark", [None, *IDS], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_overwritable_in_every_situation(count: int, watermark: SnapshotId | None) -> None:
    """A free slot if there is one; else the oldest sealed one, if that is older than the watermark; else none."""
    for slots in product(STATES, repeat=count):
        free = [i for i in range(count) if slots[i].stage is Stage.FREE]
        old = [i for i in range(count) if slots[i].stage is Stage.SEALED and watermark and slots[i].id in
               IDS[: IDS.index(watermark)]]  # fmt: skip
        old.sort(key=lambda i: (IDS.index(slots[i].id or IDS[0]), i))
        assert overwritable(slots, watermark) == next(iter(free + old), None)
