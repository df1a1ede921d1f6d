"""Kills are planned from a seed alone, fit into the run, and never land twice without progress in between."""

from __future__ import annotations

from itertools import pairwise

import pytest
from holdfast.errors import ConfigError
from holdfast.ops.demo.schedule import (
    STEPS_PER_KILL,
    STEPS_TO_STOP,
    Aim,
    Landed,
    Planned,
    Progress,
    Target,
    advanced,
    due,
    plan_kills,
)
from hypothesis import given
from hypothesis import strategies as st

AIMS = [*map(Aim, Target), Aim(Target.NODE, 2)]
targets_strategy = st.lists(st.sampled_from(AIMS), min_size=1, max_size=5, unique=True)


@given(
    seed=st.integers(0, 2**31 - 1),
    kills=st.integers(0, 10),
    targets=targets_strategy,
    spare=st.integers(0, 300),
    ranks=st.integers(1, 8),
    nodes=st.integers(2, 8),
)
def test_a_plan_fits_into_the_run_and_repeats(
    seed: int, kills: int, targets: list[Aim], spare: int, ranks: int, nodes: int
) -> None:
    spared = STEPS_TO_STOP if kills and Aim(Target.PREEMPT) in targets else STEPS_PER_KILL
    steps = STEPS_PER_KILL * kills + spared + spare
    plan = plan_kills(seed, kills=kills, targets=targets, steps=steps, ranks=ranks, nodes=nodes)
    assert plan == plan_kills(seed, kills=kills, targets=targets, steps=steps, ranks=ranks, nodes=nodes)
    assert len(plan) == kills
    assert all(1 <= planned.step <= steps - spared for planned in plan)
    assert all(before.step < after.step for before, after in pairwise(plan))
    assert all(0 <= planned.fraction < 1 and 0 <= planned.rank < ranks for planned in plan)
    assert {Aim(planned.target, len(planned.nodes)) for planned in plan} == set(targets[:kills])
    for planned in plan:
        assert list(planned.nodes) == sorted(set(planned.nodes) & set(range(nodes)))


def test_another_seed_plans_otherwise() -> None:
    plans = [plan_kills(seed, kills=5, targets=AIMS[:5], steps=200, ranks=2) for seed in range(2)]
    assert plans[0] != plans[1]


def test_a_plan_that_cannot_be_carried_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 kills need at least 16 steps, 15 were asked for"):
        plan_kills(0, kills=3, targets=[Aim(Target.RANK)], steps=15, ranks=2)
    with pytest.raises(ConfigError, match="1 kills need at least 20 steps, 19 were asked for"):
        plan_kills(0, kills=1, targets=[Aim(Target.RANK), Aim(Target.PREEMPT)], steps=19, ranks=2)
    with pytest.raises(ConfigError, match="nothing to kill"):
        plan_kills(0, kills=1, targets=[], steps=100, ranks=2)
    with pytest.raises(ConfigError, match="2 nodes cannot be killed, as there are 1"):
        plan_kills(0, kills=1, targets=[Aim(Target.NODE, 2)], steps=100, ranks=2)


@pytest.mark.parametrize(
    ("text", "aim"),
    [
        *((target.value, Aim(target)) for target in Target),
        ("node,node", Aim(Target.NODE, 2)),
        ("node,node,node", Aim(Target.NODE, 3)),
    ],
)
def test_what_to_kill_is_read_and_written_alike(text: str, aim: Aim) -> None:
    assert Aim.parse(text) == aim
    assert str(aim) == text


@pytest.mark.parametrize(
    "text", ["", "power", "rank,rank", "node,rank", "preempt,preempt", "node,preempt", "node,", ",node", "Node"]
)
def test_what_cannot_be_killed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="node,node"):
        Aim.parse(text)


PLANNED = Planned(Target.TRAINER, step=10, fraction=0.5, rank=0)


def landed(target: Target, *, life: int, step: int) -> Landed:
    return Landed(target, life, step, wall_s=0.0, victims=[])


def test_a_kill_is_due_once_its_step_is_reached() -> None:
    assert not due(PLANNED, Progress(), None)
    assert not due(PLANNED, Progress(life=0, step=9), None)
    assert due(PLANNED, Progress(life=0, step=10), None)


@pytest.mark.parametrize("target", [Target.RANK, Target.PREEMPT])
def test_after_a_kill_of_ranks_a_new_life_has_to_pass_what_any_old_one_reached(target: Target) -> None:
    last = landed(target, life=0, step=10)
    progress = Progress(life=0, step=10)
    progress = advanced(progress, 0, 11)
    assert not due(PLANNED, progress, last), "a line read late is no progress"
    progress = advanced(progress, 1, 10)
    assert not due(PLANNED, progress, last), "the life has started, no more"
    progress = advanced(progress, 1, 11)
    assert not due(PLANNED, progress, last), "a step that had been trained before"
    assert due(PLANNED, advanced(progress, 1, 12), last)


def test_after_a_kill_of_the_agent_the_same_life_has_to_go_on() -> None:
    last = landed(Target.AGENT, life=0, step=10)
    assert not due(PLANNED, Progress(life=0, step=10), last)
    assert due(PLANNED, Progress(life=0, step=11), last)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=20))
def test_progress_is_the_newest_step_of_the_newest_life(sightings: list[tuple[int, int]]) -> None:
    progress = Progress()
    for life, step in sightings:
        progress = advanced(progress, life, step)
    newest = max((life for life, _ in sightings), default=-1)
    assert progress.life == newest
    assert progress.step == max((step for life, step in sightings if life == newest), default=0)
    assert progress.step_before == max((step for life, step in sightings if life < newest), default=0)
    assert progress.newest_step == max((step for _, step in sightings), default=0)


def test_the_loss_shown_is_the_last_one_known() -> None:
    progress = advanced(Progress(), 0, 1, loss=2.5)
    assert advanced(progress, 0, 2).loss == 2.5
    assert advanced(progress, 1, 1).loss == 2.5
    assert advanced(progress, 0, 2, loss=2.25).loss == 2.25
