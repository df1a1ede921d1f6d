"""When snapshots are spilled to which tier."""

from __future__ import annotations

from math import inf, sqrt

import pytest
from holdfast.storage.schedule import Begun, after, due, ended, indices, interval_s
from holdfast.storage.tiers import Auto, Every, EverySeconds, EverySteps, TierSettings


def tier(every: Every, milestone_steps: int | None = None) -> TierSettings:
    return TierSettings("memory://x", every, 3, milestone_steps)


STEPS, TIME, AUTO = tier(EverySteps(100)), tier(EverySeconds(60.0)), tier(Auto(10800.0))


@pytest.mark.parametrize(
    ("last", "step", "wanted"),
    [(0, 99, 0), (0, 100, 1), (0, 103, 1), (100, 199, 0), (103, 200, 1), (199, 450, 1), (150, 199, 0), (150, 200, 1)],
)
def test_multiples_of_steps_or_the_first_after(last: int, step: int, wanted: int) -> None:
    assert due([STEPS], [Begun(last)], step=step, now_s=0.0) == wanted
    assert due([STEPS], [Begun(last, 0.0)], step=step, now_s=inf) == wanted


def test_time() -> None:
    assert due([TIME], [Begun(7)], step=8, now_s=5.0) == 1, "the first one at once"
    assert due([TIME], [Begun(7, 5.0)], step=8, now_s=64.0) == 0
    assert due([TIME], [Begun(7, 5.0)], step=8, now_s=65.0) == 1
    assert due([TIME], [Begun(7, 5.0)], step=8, now_s=4.0) == 1, "a clock that went back says nothing"


def test_auto_measures_first() -> None:
    assert due([AUTO], [Begun(7)], step=8, now_s=0.0) == 1
    assert due([AUTO], [Begun(7, 0.0, cost_s=2.0)], step=8, now_s=interval_s(2.0, 10800.0) - 0.1) == 0
    assert due([AUTO], [Begun(7, 0.0, cost_s=2.0)], step=8, now_s=interval_s(2.0, 10800.0)) == 1
    assert due([AUTO], [Begun(7, 0.0, cost_s=None)], step=8, now_s=0.0) == 1, "given up, so still not measured"


def test_a_slower_tier_takes_the_faster_ones_along() -> None:
    begun = [Begun(1, 0.0), Begun(1, 0.0), Begun(1, 0.0)]
    assert due([TIME, STEPS, TIME], begun, step=100, now_s=1.0) == 0b011
    assert due([TIME, TIME, STEPS], begun, step=100, now_s=1.0) == 0b111
    assert due([STEPS, TIME, TIME], begun, step=100, now_s=1.0) == 0b001
    assert due([], [], step=100, now_s=1.0) == 0


def test_a_busy_tier_holds_up_itself_and_slower_ones() -> None:
    begun = [Begun(1, 0.0), Begun(1, 0.0, busy=True), Begun(1, 0.0)]
    assert due([TIME] * 3, begun, step=5, now_s=100.0) == 0b001
    begun[1] = ended(begun[1], 3.0)
    assert due([TIME] * 3, begun, step=5, now_s=100.0) == 0b111


def test_milestones_come_when_they_come() -> None:
    slow = tier(EverySeconds(1e9), milestone_steps=1000)
    assert due([slow], [Begun(900, 0.0)], step=999, now_s=1.0) == 0
    assert due([slow], [Begun(900, 0.0)], step=1000, now_s=1.0) == 1
    assert due([slow], [Begun(900, 0.0)], step=1007, now_s=1.0) == 1
    assert due([slow], [Begun(1007, 0.0)], step=1999, now_s=1.0) == 0


def test_the_same_step_is_not_spilled_twice() -> None:
    assert due([TIME], [Begun(8, 0.0)], step=8, now_s=100.0) == 0


def test_what_was_begun_is_remembered() -> None:
    begun = after([Begun(0), Begun(0, cost_s=2.0)], 0b10, step=7, now_s=3.0)
    assert begun == (Begun(0), Begun(7, 3.0, 2.0, busy=True))
    assert ended(begun[1], None) == Begun(7, 3.0, 2.0)
    assert ended(begun[1], 4.0) == Begun(7, 3.0, 4.0)
    assert indices(0b1011) == (0, 1, 3)


def test_young_and_daly() -> None:
    assert interval_s(0.0, 3600.0) == 0.0
    assert interval_s(2.0, 10800.0) == pytest.approx(sqrt(2 * 2 * 10800), rel=0.01)
    # Daly (2006), equation 37: 30 minutes to write, 6 hours between failures; from begin to begin.
    assert interval_s(1800.0, 21600.0) == pytest.approx(
        sqrt(2 * 1800 * 21600) * (1 + sqrt(1 / 24) / 3 + 1 / 24 / 9), rel=1e-9
    )
    assert interval_s(10.0, 5.0) == 15.0
