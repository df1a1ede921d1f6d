"""Which snapshots stay in a tier."""

from __future__ import annotations

import pytest
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.retention import Present, decide

A, B = "a" * 32, "b" * 32


def at(step: int, generation: int = 1, run: str = A, *, complete: bool = True, in_use: bool = False) -> Present:
    return Present(SnapshotId(generation, step, run), complete, in_use)


def stay(present: list[Present], keep: int = 2, milestone_steps: int | None = None) -> list[tuple[int, int]]:
    """Generation and step of those that do."""
    verdicts = decide(present, keep, milestone_steps)
    return [(verdict.id.generation, verdict.id.step) for verdict in verdicts if not verdict.goes]


def test_the_newest_few_stay() -> None:
    assert stay([at(30), at(10), at(20), at(40)]) == [(1, 30), (1, 40)]
    assert stay([]) == []


def test_the_newest_complete_one_stays_and_whatever_is_newer() -> None:
    present = [at(10), at(20), at(25, complete=False), at(30), at(40, complete=False), at(50, 2, B, complete=False)]
    assert stay(present, keep=1) == [(1, 30), (1, 40), (2, 50)]
    assert stay([at(10, complete=False), at(20, complete=False)]) == [(1, 10), (1, 20)], "none is complete yet"


def test_a_later_run_makes_room_for_itself() -> None:
    present = [at(100), at(110), at(120, complete=False), at(90, 2, B), at(95, 2, B, complete=False)]
    assert stay(present) == [(1, 110), (2, 90), (2, 95)]


def test_of_what_is_newer_the_newest_two_stay() -> None:
    """Else nothing would ever make room in a tier in which snapshots no longer get complete."""
    late = [at(step, complete=False) for step in range(20, 30)]
    assert stay([at(10), *late]) == [(1, 10), (1, 28), (1, 29)]
    assert stay(late) == [(1, 28), (1, 29)], "none is complete yet"
    assert stay([at(10), *late, at(5, run=B, complete=False)]) == [(1, 5), (1, 10), (1, 28), (1, 29)]
    assert decide([at(10), *late], 1)[1].reason == "incomplete, and newer ones have been begun"


def test_lives_that_complete_nothing_do_not_fill_a_tier() -> None:
    lives = [at(20 + step, life, f"{life:032x}", complete=False) for life in range(2, 30) for step in (0, 1, 2)]
    assert stay([at(10), *lives]) == [(1, 10), (28, 21), (28, 22), (29, 21), (29, 22)]


def test_what_other_disks_may_rely_on_stays() -> None:
    here = [Present(SnapshotId(1, step, A), complete=False, elsewhere=True) for step in range(20, 30)]
    assert len(stay([at(10), *here])) == 11


def test_what_is_read_stays() -> None:
    assert stay([at(10, in_use=True), at(15, complete=False, in_use=True), at(20), at(30)], keep=1) == [
        (1, 10),
        (1, 15),
        (1, 30),
    ]


def test_runs_of_one_generation_do_not_count_against_each_other() -> None:
    present = [at(10), at(20), at(30), at(5, run=B), at(6, run=B), at(7, run=B), at(8, run=B, complete=False)]
    verdicts = decide(present, 1)
    assert {(one.id.run[0], one.id.step) for one in verdicts if not one.goes} == {("a", 30), ("b", 7), ("b", 8)}


def test_a_run_without_any_complete_one_may_yet_have_one() -> None:
    assert stay([at(10), at(20), at(5, run=B, complete=False)], keep=1) == [(1, 5), (1, 20)]


def test_milestones() -> None:
    steps = [at(step) for step in (5, 95, 103, 110, 199, 200, 290, 300, 310)]
    assert stay(steps, 1, 100) == [(1, 103), (1, 200), (1, 300), (1, 310)]
    assert stay([at(100, complete=False), *steps], 1, 100) == [(1, 103), (1, 200), (1, 300), (1, 310)]


def test_a_run_that_goes_on_has_no_milestone_twice() -> None:
    """The second run went back to 140: it saw 103, so 150 is no milestone; it did 205 itself, where the first was at 201."""
    present = [at(103), at(140), at(201), at(150, 2, B), at(205, 2, B), at(290, 2, B), at(295, 2, B)]
    assert stay(present, 1, 100) == [(1, 103), (1, 201), (2, 205), (2, 295)]


def test_reasons() -> None:
    present = [at(5, complete=False), at(10), at(100), at(110, in_use=True), at(120), at(130), at(140, complete=False)]
    assert [verdict.reason for verdict in decide(present, 2, 100)] == [
        "incomplete, and a newer one is complete",
        "older than the newest 2",
        "a milestone of every 100 steps",
        "somebody reads it",
        "one of the newest 2",
        "the newest complete one",
        "newer than the newest complete one",
    ]


def test_none_at_all_is_not_to_be_had() -> None:
    with pytest.raises(ValueError, match="always stays"):
        decide([], 0)
