"""The beat: facts as vectors, their reduction, and what all ranks conclude, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest
from holdfast.snapshot.beat import NONE, UNKNOWN, VECTOR_LENGTH, Agreed, Facts, Verdict, complete_here, settle

CALM = Facts(5, 5)


def facts(agreed: Agreed, complete: int | None = None, **changes: int | bool) -> Facts:
    """What holds of ranks that are all where *agreed* says, with *complete* complete everywhere."""
    newest = max([agreed.watermark, *agreed.outstanding])
    done = agreed.watermark if complete is None else complete
    return replace(Facts(5, 5, newest, newest, done), **changes)  # type: ignore[arg-type]


def settled(
    agreed: Agreed, reduced: Facts, step: int = 9, slots: int = 2, wanted: bool = True
) -> tuple[Agreed, Verdict]:
    return settle(agreed, reduced, step=step, wanted=wanted, slots=slots)


def reduced(*all_facts: Facts) -> Facts:
    """As ``all_reduce(MIN)`` does it."""
    return Facts.from_vector([min(column) for column in zip(*(f.to_vector() for f in all_facts), strict=True)])


def test_vectors_round_trip() -> None:
    told = Facts(3, 4, 5, 6, 7, 8, able=False, relayout=True, stop=True, busy_us=9, low_digest=10, high_digest=11)
    assert Facts.from_vector(told.to_vector()) == told
    assert Facts.from_vector(CALM.to_vector()) == CALM
    assert len(told.to_vector()) == VECTOR_LENGTH
    assert all(type(number) is int for number in told.to_vector())


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({"able": True}, {"able": False}, {"able": False}),
        ({"relayout": True}, {"relayout": False}, {"relayout": True}),
        ({"stop": False}, {"stop": True}, {"stop": True}),
        ({"busy_us": 7}, {"busy_us": 900}, {"busy_us": 900}),
        ({"complete": 4}, {"complete": NONE}, {"complete": NONE}),
        ({"discarded": 4}, {"discarded": NONE}, {"discarded": 4}),
        ({"discarded": 4}, {"discarded": 6}, {"discarded": 4}),
        ({"first_beat": 5, "last_beat": 5}, {"first_beat": 8, "last_beat": 8}, {"first_beat": 5, "last_beat": 8}),
        ({"low_digest": 3, "high_digest": 3}, {"low_digest": 3, "high_digest": 3}, {"low_digest": 3, "high_digest": 3}),
        ({"low_digest": 3, "high_digest": 3}, {"low_digest": 9, "high_digest": 9}, {"low_digest": 3, "high_digest": 9}),
        ({"low_digest": 3, "high_digest": 3}, {}, {"low_digest": 3, "high_digest": 3}),
        ({"low_digest": 2**32 - 1, "high_digest": 2**32 - 1}, {}, {"low_digest": 2**32 - 1, "high_digest": 2**32 - 1}),
        ({"low_digest": 0, "high_digest": 0}, {"low_digest": UNKNOWN}, {"low_digest": 0, "high_digest": 0}),
        ({"first_taken": 5, "last_taken": 5}, {"first_taken": 8, "last_taken": 8}, {"first_taken": 5, "last_taken": 8}),
    ],
    ids=str,
)  # fmt: skip
def test_one_rank_speaks_for_all(one: dict[str, int], other: dict[str, int], both: dict[str, int]) -> None:
    first, second = replace(CALM, **one), replace(CALM, **other)  # type: ignore[arg-type]
    assert reduced(first, second) == reduced(second, first) == replace(CALM, **both)  # type: ignore[arg-type]


def test_the_first_snapshot() -> None:
    assert settled(Agreed(), CALM) == (Agreed(NONE, (9,)), Verdict(True))


def test_nothing_is_wanted() -> None:
    assert settled(Agreed(), CALM, wanted=False) == (Agreed(), Verdict(False))


def test_complete_everywhere_becomes_the_watermark_and_makes_room() -> None:
    before = Agreed(7, (8,))
    assert settled(before, facts(before, 8)) == (Agreed(8, (9,)), Verdict(True))


def test_a_watermark_is_noticed_even_if_no_snapshot_is_wanted() -> None:
    before = Agreed(7, (8,))
    assert settled(before, facts(before, 8), wanted=False) == (Agreed(8), Verdict(False))


@pytest.mark.parametrize(
    ("before", "slots", "take"),
    [
        (Agreed(), 2, True), (Agreed(NONE, (7,)), 2, True), (Agreed(NONE, (7, 8)), 2, False), (Agreed(7), 2, True),
        (Agreed(7, (8,)), 2, False), (Agreed(7, (8,)), 3, True), (Agreed(6, (7, 8)), 3, False),
    ],
)  # fmt: skip
def test_as_many_as_there_are_slots(before: Agreed, slots: int, take: bool) -> None:
    """The watermark, what is outstanding, and this one: the formula of the design."""
    after, verdict = settled(before, facts(before), slots=slots)
    assert verdict == (Verdict(True) if take else Verdict(False, "slots-busy"))
    assert after.outstanding == (*before.outstanding, *([9] if take else []))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"able": False}, "not-able"),
        ({"relayout": True}, "new-layout"),
        ({"first_beat": 4}, "ranks-apart"),
        ({"last_taken": 8}, "ranks-apart"),
        ({"able": False, "relayout": True}, "new-layout"),
    ],
    ids=str,
)
def test_one_rank_objects(changes: dict[str, int], reason: str) -> None:
    before = Agreed(7)
    after, verdict = settled(before, facts(before, **changes))
    assert (verdict.take, verdict.reason) == (False, reason)
    assert after.outstanding == ()


@pytest.mark.parametrize("step", [6, 7, 8])
def test_steps_must_grow(step: int) -> None:
    before = Agreed(7, (8,))
    assert settled(before, facts(before), step, slots=3)[1] == Verdict(False, "step-not-newer")


def test_what_one_rank_gave_up_all_give_up() -> None:
    before = Agreed(7, (8,))
    assert settled(before, facts(before, discarded=8)) == (Agreed(7, (9,)), Verdict(True))


def test_one_is_given_up_and_another_complete() -> None:
    before = Agreed(5, (6, 7, 8))
    assert settled(before, facts(before, 6, discarded=8), slots=4) == (Agreed(6, (7, 9)), Verdict(True))


def test_what_is_given_up_never_becomes_the_watermark() -> None:
    before = Agreed(5, (6,))
    assert settled(before, facts(before, 6, discarded=6), wanted=False)[0] == Agreed(5)


def test_ranks_out_of_step_wait_for_the_last() -> None:
    """What is outstanding can still become complete meanwhile."""
    before = Agreed(7, (8,), 3)
    after, verdict = settled(before, facts(before, 8, first_beat=11, last_beat=14))
    assert after == Agreed(8, (), 15)
    assert verdict == Verdict(False, "ranks-apart")


def test_a_beat_in_step_keeps_the_ordinal_to_resume_at() -> None:
    before = Agreed(7, (), 3)
    assert settled(before, facts(before))[0].resume_at == 3


def test_ranks_that_name_steps_differently_complete_nothing() -> None:
    before = Agreed(7, (8,))
    after, verdict = settled(before, facts(before, 8, last_taken=12))
    assert after == Agreed(7)
    assert verdict == Verdict(False, "ranks-apart")


def test_replicas_that_drifted_apart_complete_nothing_and_lay_out_anew() -> None:
    """Each copied a part of what is no longer the same: what was put together is the state of none of them."""
    before = Agreed(7, (8,))
    after, verdict = settled(before, facts(before, 8, low_digest=1, high_digest=2))
    assert after == Agreed(7)
    assert verdict == Verdict(False, "new-layout", relayout=True)


def test_replicas_that_are_alike_or_unknown_go_on() -> None:
    before = Agreed(7, (8,))
    for digest in (0, 1, 2**32 - 1, UNKNOWN):
        assert settled(before, facts(before, 8, low_digest=digest, high_digest=digest)) == (
            Agreed(8, (9,)),
            Verdict(True),
        )


def test_the_verdict_passes_on_what_any_rank_said() -> None:
    said = facts(Agreed(7), busy_us=1234, relayout=True, due=2)
    assert settled(Agreed(7), said, wanted=False)[1] == Verdict(False, None, relayout=True, busy_us=1234, due=2)


def test_a_preemption_notice_at_one_rank_makes_the_next_step_the_last() -> None:
    noticed, verdict = settled(Agreed(7), facts(Agreed(7), 7, stop=True), wanted=False)
    assert (noticed, verdict) == (Agreed(7, stopping=True), Verdict(take=False))
    assert settled(noticed, facts(noticed, 7), wanted=False)[1] == Verdict(True, None, stop=True)
    unable = facts(noticed, 7, able=False)
    assert settled(noticed, unable, wanted=False)[1] == Verdict(False, "not-able", stop=True)


def test_a_preemption_notice_at_all_ranks_makes_this_step_the_last() -> None:
    said = facts(Agreed(7), 7, stop=True, all_stop=True)
    assert settled(Agreed(7), said, wanted=False)[1] == Verdict(True, None, stop=True)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(NONE, NONE, 3), (NONE, 5, 3), (5, 6, 3), (5, 5, 5), (2, 2, 3)], ids=str
)
def test_a_snapshot_is_persisted_once_all_ranks_name_it(low: int, high: int, expected: int) -> None:
    before = Agreed(7, persisted=3)
    said = facts(before, 7, low_persisted=low, high_persisted=high)
    assert settled(before, said, wanted=False)[0].persisted == expected


@pytest.mark.parametrize(
    ("agreed", "sealed", "expected"),
    [
        (Agreed(), set(), NONE), (Agreed(), {3}, NONE), (Agreed(3), set(), 3), (Agreed(3, (4,)), {4}, 4),
        (Agreed(3, (4, 5)), {4}, 4), (Agreed(3, (4, 5)), {4, 5}, 5), (Agreed(3, (4, 5)), {5}, 3),
        (Agreed(NONE, (4,)), {4, 9}, 4),
    ],
    ids=str,
)  # fmt: skip
def test_complete_here_needs_all_older_ones(agreed: Agreed, sealed: set[int], expected: int) -> None:
    """Else one rank's newer and another's older snapshot would look like one that both have."""
    assert complete_here(agreed, frozenset(sealed)) == expected


def test_what_is_due_goes_no_farther_than_the_slowest_rank_has_room_for() -> None:
    said = reduced(facts(Agreed(7), 7, due=2), facts(Agreed(7), 7, free=1), facts(Agreed(7), 7))
    assert settled(Agreed(7), said)[1] == Verdict(True, due=1)
