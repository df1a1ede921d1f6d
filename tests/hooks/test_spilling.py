"""What one rank asks to be spilled, and when."""

from __future__ import annotations

from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import error_text, wire_id
from holdfast.errors import HoldfastError, TierFull, TierUnreachable
from holdfast.hooks.spilling import Spilling
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.tiers import Tier, parse_tiers

RUN = "a" * 32


class Clocked:
    """A rank with a tier that is due every hour, and a clock of its own."""

    def __init__(self, *, asks: bool = True) -> None:
        self.now_s, self.step = 0.0, 0
        self.spilling = Spilling(parse_tiers([Tier("/near", every="1h")]), asks=asks, clock=lambda: self.now_s)
        self.spilling.begin_run(RUN, 0)

    def spilled(self, error: HoldfastError | None) -> None:
        """The next step is spilled, with that answer."""
        self.step += 1
        id = SnapshotId(1, self.step, RUN)
        self.spilling.begin(id, 1)
        self.spilling.step_ended(self.step)
        assert self.spilling.due() == 0
        text = error_text(error) if error is not None else ""
        self.spilling.told(wire.Spilled(id=wire_id(id), tier=0, error=text, seconds=1.0))

    def due_in(self, seconds: float) -> bool:
        self.now_s += seconds
        return self.spilling.due() == 1


def test_another_is_spilled_soon_instead_of_one_that_failed() -> None:
    rank = Clocked()
    assert rank.due_in(0)
    for pause_s in (15, 30, 60, 120, 240, 480, 900, 900):
        rank.spilled(TierUnreachable("by the test"))
        assert not rank.due_in(pause_s - 1)
        assert rank.due_in(1)
    rank.spilled(None)
    assert not rank.due_in(3500)
    assert rank.due_in(100)
    rank.spilled(TierUnreachable("by the test"))
    assert rank.due_in(15)


def test_a_rank_whose_clock_does_not_count_asks_for_it_too() -> None:
    rank = Clocked(asks=False)
    assert not rank.due_in(0)
    rank.spilled(TierUnreachable("by the test"))
    assert rank.due_in(15)


def test_a_full_tier_is_left_alone_until_the_next_is_due() -> None:
    rank = Clocked()
    rank.spilled(TierFull("by the test"))
    assert not rank.due_in(3599)
    assert rank.due_in(1)
