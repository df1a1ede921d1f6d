"""What fits into a tier, asked before training and before each spill."""

from __future__ import annotations

import pytest
from holdfast.errors import BudgetExceeded
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.budget import Underway, check_budget, no_room, spilled_bytes
from holdfast.storage.tiers import EverySteps, TierSettings

SNAPSHOT = 1 << 30
ONE = spilled_bytes(SNAPSHOT)


def tier(limit: int | None = None) -> TierSettings:
    return TierSettings("file:///nvme/x", EverySteps(1), 3, limit_bytes=limit)


def test_what_is_kept_and_what_is_written_must_fit() -> None:
    check_budget(tier(4 * ONE), SNAPSHOT, 4 * ONE)
    check_budget(tier(), SNAPSHOT, None)
    check_budget(tier(), SNAPSHOT, ONE, held_bytes=3 * ONE)
    with pytest.raises(
        BudgetExceeded, match=f"keep 3 snapshots while it writes another: that is {4 * ONE} bytes, its limit"
    ):
        check_budget(tier(4 * ONE - 1), SNAPSHOT, None)
    with pytest.raises(BudgetExceeded, match="are free"):
        check_budget(tier(), SNAPSHOT, ONE, held_bytes=3 * ONE - 1)


def test_one_more_must_fit() -> None:
    assert no_room(tier(2 * ONE), SNAPSHOT, ONE, ONE) is None
    assert no_room(tier(), SNAPSHOT, None, 1 << 60) is None
    assert no_room(tier(2 * ONE), SNAPSHOT, ONE, ONE + 1) == (
        f"tier file:///nvme/x holds {ONE + 1} of {2 * ONE} bytes, {ONE} more are needed"
    )
    assert no_room(tier(), SNAPSHOT, ONE - 1, 0) == f"tier file:///nvme/x has {ONE - 1} bytes free, {ONE} are needed"


def held(text: str | None) -> tuple[int, int]:
    """What a refusal says: the bytes that are held, and those that are needed."""
    assert text is not None
    words = text.split()
    return int(words[words.index("holds") + 1]), int(words[words.index("more") - 1])


OLD, ID = (SnapshotId(1, step, "a" * 32) for step in (1, 2))
MIB = 1 << 20


def test_what_is_under_way_counts_once_whether_it_shows_or_not() -> None:
    none, coming = tier(1), Underway()
    coming.begin(ID, 0, 64 * MIB, 0)
    assert held(coming.no_room(none, {OLD: MIB}, None)) == (MIB, spilled_bytes(64 * MIB))
    coming.begin(ID, 1, 64 * MIB, 0)
    assert held(coming.no_room(none, {OLD: MIB}, None)) == (MIB, spilled_bytes(128 * MIB))
    coming.wrote(ID, 0, 64 * MIB)
    for shown in ({OLD: MIB}, {OLD: MIB, ID: 64 * MIB}):
        assert held(coming.no_room(none, shown, None)) == (65 * MIB, spilled_bytes(64 * MIB))
    coming.end(ID, 0, done=True)
    coming.end(ID, 1, done=False)
    assert held(coming.no_room(none, {OLD: MIB, ID: 64 * MIB}, None)) == (65 * MIB, spilled_bytes(0))
    coming.begin(OLD, 0, MIB, MIB)
    assert coming.ids == [OLD]


def test_one_node_counts_for_all_where_all_write_to_one_place() -> None:
    none, coming = tier(1), Underway()
    coming.begin(ID, 0, 64 * MIB, 0)
    assert held(coming.no_room(none, {}, None, world=4)) == (0, spilled_bytes(256 * MIB))
    assert held(coming.no_room(none, {ID: 192 * MIB}, None, world=4)) == (192 * MIB, spilled_bytes(64 * MIB))
    assert coming.no_room(tier(), {}, spilled_bytes(256 * MIB), world=4) is None
