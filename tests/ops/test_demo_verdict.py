"""The verdict notices every way in which an attacked run can differ from the reference, and counts what kills cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import pytest
from holdfast.ops.demo.journal import LifeRecord, RankRecord, StepDone, Stopped
from holdfast.ops.demo.schedule import Landed, Target
from holdfast.ops.demo.verdict import Verdict, judge
from hypothesis import given
from hypothesis import strategies as st

STEPS = 12
RANKS = 2
DIGESTS = {"parameters": "aa", "optimizer": "bb"}


def loss_of(rank: int, step: int) -> float:
    return 3.0 / step + rank


def life(rank: int, number: int, start: int, stop: int, *, began_s: float = 0.0) -> LifeRecord:
    """A faultless life that continues from *start* and ends after step *stop*, one step per second."""
    split_s = {"import": 1.0, "restore": 0.25 * (rank + 1), "re-protect": 0.125} if number else {"import": 1.0}
    steps = [
        StepDone(number, step, loss_of(rank, step).hex(), began_s + step - start, stall_ms=float(step))
        for step in range(start + 1, stop + 1)
    ]
    return LifeRecord(number, start, began_s, split_s, steps)


def run(*spans: tuple[int, int], digests: Mapping[str, str] = DIGESTS) -> list[RankRecord]:
    """A run whose lives cover *spans*, (start, stop) each; a hundred seconds lie between two lives' beginnings."""
    return [
        RankRecord(
            rank,
            [life(rank, number, *span, began_s=100.0 * number) for number, span in enumerate(spans)],
            {"digests": dict(digests)},
        )
        for rank in range(RANKS)
    ]


def judged(attacked: Sequence[RankRecord], *landed: Landed, moved: Collection[int] = ()) -> Verdict:
    return judge(run((0, STEPS)), attacked, landed, steps=STEPS, moved=moved)


def kill(target: Target, *, life: int, step: int, wall_s: float) -> Landed:
    return Landed(target, life, step, wall_s, ["rank 0"])


def test_an_undisturbed_run_is_exact() -> None:
    verdict = judged(run((0, STEPS)))
    assert verdict.bit_exact
    assert verdict.losses_compared == RANKS * STEPS
    assert (verdict.lives, verdict.repeated_steps, verdict.costs) == (1, 0, [])


def test_a_run_that_repeats_steps_after_a_kill_is_exact_and_the_cost_is_counted() -> None:
    verdict = judged(run((0, 7), (5, STEPS)), kill(Target.TRAINER, life=0, step=6, wall_s=90.0))
    assert verdict.bit_exact
    assert (verdict.lives, verdict.repeated_steps) == (2, RANKS * 2)
    (cost,) = verdict.costs
    assert (cost.newest_step, cost.restored_step, cost.lost_steps) == (7, 5, 2)
    assert cost.restore_s == 0.5, "the slowest rank's"
    assert cost.recovery_s == 11.0
    assert cost.reprotect_s == 0.125
    assert cost.split_s == {"import": 1.0, "restore": 0.5, "re-protect": 0.125}


def test_lost_nodes_are_told_by_name() -> None:
    lost = replace(kill(Target.NODE, life=0, step=6, wall_s=90.0), nodes=["n1", "n4.1"])
    summary = judged(run((0, 7), (5, STEPS)), lost).summary()
    assert (summary["killed"], summary["lost_nodes"]) == (["node,node"], [["n1", "n4.1"]])
    assert (summary["lost_steps"], summary["restore_s"], summary["reprotect_s"]) == ([2], [0.5], [0.125])


def test_a_killed_agent_costs_no_step_and_no_restore() -> None:
    verdict = judged(run((0, STEPS)), kill(Target.AGENT, life=0, step=4, wall_s=4.5))
    (cost,) = verdict.costs
    assert (cost.newest_step, cost.restored_step, cost.lost_steps) == (4, None, 0)
    assert (cost.restore_s, cost.reprotect_s, cost.recovery_s) == (None, None, None)
    assert verdict.summary()["lost_steps"] == [0]
    assert verdict.summary()["restore_s"] == []


NOTICE = Landed(Target.PREEMPT, 0, 5, 50.0, ["rank 1"], exit_s=0.75)


def stopped(ranks: list[RankRecord], *steps: int | None) -> list[RankRecord]:
    """*ranks*, of which each ended its first life after its one of *steps*, as it was preempted."""
    for record, step in zip(ranks, steps, strict=True):
        record.lives[0].stopped = None if step is None else Stopped(0, step, NOTICE.wall_s + 0.25 * (record.rank + 1))
    return ranks


def test_a_preemption_that_costs_no_step_is_as_promised() -> None:
    verdict = judged(stopped(run((0, 7), (7, STEPS)), 7, 7), NOTICE, moved=[0])
    assert (verdict.bit_exact, verdict.broken) == (True, [])
    summary = verdict.summary()
    assert (summary["killed"], summary["lost_steps"], summary["repeated_steps"]) == (["preempt"], [0], 0)
    assert summary["preempted"] == [
        {
            "notice_to": "rank 1",
            "notice_at_step": 5,
            "stopped_at_step": 7,
            "restored_step": 7,
            "lost_steps": 0,
            "stop_s": 0.5,
            "exit_s": 0.75,
        }
    ]
    assert judged(run((0, STEPS))).summary()["preempted"] == []


@pytest.mark.parametrize(
    ("spans", "stops", "moved", "words"),
    [
        ([(0, 7), (5, STEPS)], (7, 7), [0], "stopped after step 7, and went on from step 5"),
        ([(0, 7), (7, STEPS)], (7, 7), [], "did not end because of it"),
        ([(0, 7), (7, STEPS)], (7, 6), [0], "after different steps: {0: 7, 1: 6}"),
        ([(0, 7), (7, STEPS)], (7, None), [0], "after different steps: {0: 7, 1: None}"),
        ([(0, 7), (7, STEPS)], (6, 6), [0], "after different steps"),
        ([(0, STEPS)], (None, None), [], "did not end because of it"),
        ([(0, STEPS)], (STEPS, STEPS), [0], "did not go on"),
    ],
)
def test_a_preemption_that_went_otherwise_is_told(
    spans: list[tuple[int, int]], stops: tuple[int | None, int | None], moved: list[int], words: str
) -> None:
    verdict = judged(stopped(run(*spans), *stops), NOTICE, moved=moved)
    assert verdict.bit_exact, "steps that are trained again come out the same"
    (text,) = verdict.broken
    assert text.startswith("notice to rank 1 at step 5: ")
    assert words in text


def test_other_kills_promise_nothing_of_the_kind() -> None:
    assert judged(run((0, 7), (5, STEPS)), kill(Target.RANK, life=0, step=6, wall_s=90.0)).broken == []


def test_a_life_that_died_before_its_first_line_is_skipped_over() -> None:
    ranks = run((0, 7), (7, STEPS))
    for record in ranks:
        record.lives[1].life = 3  # lives 1 and 2 were killed while they started
    (cost,) = judged(ranks, kill(Target.ALL, life=0, step=7, wall_s=8.0)).costs
    assert (cost.restored_step, cost.lost_steps) == (7, 0)


def test_stalls_are_summed_up_over_ranks_and_lives() -> None:
    assert judged(run((0, 7), (5, STEPS))).summary()["stall_ms"] == {"median": 6.5, "max": 12.0}
    none = [replace(record, lives=[]) for record in run((0, STEPS))]
    assert judged(none).summary()["stall_ms"] == {"median": None, "max": None}


@given(
    rank=st.integers(0, RANKS - 1),
    number=st.integers(0, 1),
    data=st.data(),
    upward=st.booleans(),
)
def test_one_flipped_bit_of_one_loss_is_found_and_named(
    rank: int, number: int, data: st.DataObject, upward: bool
) -> None:
    ranks = run((0, 7), (5, STEPS))
    steps = ranks[rank].lives[number].steps
    index = data.draw(st.integers(0, len(steps) - 1))
    right = steps[index]
    wrong = math.nextafter(float.fromhex(right.loss), math.inf if upward else 0.0)
    steps[index] = replace(right, loss=wrong.hex())
    verdict = judged(ranks)
    assert not verdict.bit_exact
    (difference,) = verdict.differences
    assert f"rank {rank}, life {number}, step {right.step}:" in difference


def test_a_nan_in_place_of_a_loss_is_found() -> None:
    ranks = run((0, STEPS))
    ranks[0].lives[0].steps[3] = replace(ranks[0].lives[0].steps[3], loss=math.nan.hex())
    assert not judged(ranks).bit_exact


@pytest.mark.parametrize("index", [0, 5, STEPS - 1])
def test_a_missing_step_is_found(index: int) -> None:
    ranks = run((0, STEPS))
    del ranks[1].lives[0].steps[index]
    verdict = judged(ranks)
    assert not verdict.bit_exact
    assert all(text.startswith("rank 1") for text in verdict.differences)


def test_a_run_that_skips_ahead_after_a_kill_is_found() -> None:
    verdict = judged(run((0, 5), (7, STEPS)))
    assert [text for text in verdict.differences if "continues from step 7, trained only to 5" in text]


def test_a_run_that_ends_early_is_found() -> None:
    assert any("ended at step 9" in text for text in judged(run((0, 9))).differences)


def test_ranks_that_continued_from_different_steps_are_found() -> None:
    ranks = run((0, 7), (6, STEPS))
    ranks[1] = run((0, 7), (7, STEPS))[1]
    assert judged(ranks).differences == ["life 1: ranks continued from different steps: {0: 6, 1: 7}"]


@pytest.mark.parametrize("digests", [{**DIGESTS, "optimizer": "b0"}, {"parameters": "aa"}, {**DIGESTS, "more": "cc"}])
def test_a_wrong_final_state_is_found(digests: Mapping[str, str]) -> None:
    assert len(judged(run((0, STEPS), digests=digests)).differences) == RANKS


def test_a_run_without_a_final_state_is_found() -> None:
    ranks = run((0, STEPS))
    ranks[0] = replace(ranks[0], final=None)
    assert judged(ranks).differences == ["rank 0: has no final state"]


def test_a_reference_that_proves_nothing_is_refused() -> None:
    assert not judge(run((0, 3)), run((0, 3)), [], steps=STEPS).bit_exact
    assert not judge([], [], [], steps=STEPS).bit_exact
    assert not judge(run((0, STEPS)), run((0, STEPS))[:1], [], steps=STEPS).bit_exact


def test_a_summary_spells_out_the_first_differences_only() -> None:
    ranks = run((0, STEPS))
    for record in ranks:
        record.lives[0].steps[:] = [replace(done, loss=(0.0).hex()) for done in record.lives[0].steps]
    summary = judged(ranks).summary()
    assert summary["bit_exact"] is False
    assert (summary["difference_count"], len(summary["differences"])) == (RANKS * STEPS, 20)
