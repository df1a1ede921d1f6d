"""What fits into a tier, asked before training and before each spill."""

from __future__ import annotations

import pytest
from holdfast.errors import BudgetExceeded
from holdfast.storage.budget import check_budget, no_room, spilled_bytes
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
