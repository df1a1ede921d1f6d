"""Whatever is lost, late, doubled, cut off, killed or removed: what ``truth`` says holds after every event."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from holdfast.tests.simulation.schedules import DIETS, cut_down, failure, play, schedule
from holdfast.tests.simulation.world import Fault, World

SEED = int(os.environ.get("HOLDFAST_SEED", "20261121"))
PARTS = 8
SCHEDULES = 20_000


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS // len(DIETS)))
@pytest.mark.parametrize("diet", DIETS)
def test_what_is_protected_survives(diet: str, part: int) -> None:
    """All parts together play 20,000 schedules."""
    count = SCHEDULES // PARTS
    first = SEED + part * count
    print(f"HOLDFAST_SEED={SEED}: seeds from {first}")
    restarts = protected = 0
    for seed in range(first, first + count):
        world = play(schedule(seed, DIETS[diet]))
        restarts += world.runs - 1
        protected += world.truth.promise is not None
    assert protected == count
    assert restarts > count / 5 or diet == "network"  # the schedules are not idle


def test_a_schedule_is_the_same_each_time() -> None:
    """Two worlds of one seed write the same transcript, event by event."""
    taste, faults = schedule(SEED, DIETS["everything"])
    first, second = World(taste, faults, tell=True), World(taste, faults, tell=True)
    first.run()
    second.run()
    assert first.log == second.log
    assert first.number == second.number


def test_without_faults_nothing_is_given_up() -> None:
    """In time, and in order: every snapshot that is taken becomes protected."""
    for seed in range(SEED, SEED + 50):
        taste, _ = schedule(seed, DIETS["network"])
        pace = replace(taste.pace, lost=0.0, doubled=0.0, long=0.0, beat_s=1.0, timeout_s=3.0)
        world = World(replace(taste, pace=pace), tell=True)
        world.run()
        assert world.runs == 1
        assert not [line for line in world.log or [] if "gives" in line]


def test_a_failure_is_cut_down_and_told() -> None:
    """Of many faults those are left without which all would be well; here, one."""
    taste, faults = schedule(SEED, DIETS["everything"])
    guilty = Fault(7, "node", 0, 0.1)
    _, left = cut_down((taste, (*faults, guilty)), lambda part: guilty in part[1])
    assert left == (guilty,)
    assert failure((taste, ())) is None
