"""Random schedules, how they are played, and how a failing one is shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from .world import Fault, Pace, Taste, World

Schedule = tuple[Taste, tuple[Fault, ...]]

NETWORK = {"slow": 2.0, "cut": 2.0, "torn": 1.0, "unable": 0.5, "fails": 0.5}
PROCESSES = {"agent": 3.0, "stream": 3.0, "wipe": 1.0, "trainer": 1.0, "torn": 1.0, "slow": 0.5}
NODES = {"node": 3.0, "trainer": 2.0, "slow": 1.0, "cut": 0.5, "torn": 0.5}
DIETS: Mapping[str, Mapping[str, float]] = {
    "network": NETWORK,
    "processes": PROCESSES,
    "nodes": NODES,
    "everything": dict.fromkeys(NETWORK | PROCESSES | NODES, 1.0),
}
"""How often each kind of fault comes, relative to the others."""

FAULTS_LIMIT = 8
SHOWN_LINES = 200
_PROTECT = {"auto": 30, "1+1": 10, "2+1": 20, "2+2": 20, "3+2": 15, "off": 5}


def schedule(seed: int, diet: Mapping[str, float]) -> Schedule:
    """The schedule of that seed. Each has its own pace of everything, so that rare meetings come about in some."""
    rng = random.Random(seed)
    nodes = rng.choices(range(2, 9), (20, 30, 20, 12, 8, 5, 5))[0]

    def about(seconds: float) -> float:
        return seconds * rng.choice((0.1, 0.5, 1.0, 1.0, 3.0))

    pace = Pace(
        compute_s=0.1,
        copy_s=about(0.03),
        checksum_s=about(0.02),
        message_s=about(0.01),
        pull_s=about(0.04),
        beat_s=rng.choice((0.02, 0.3, 1.0)),
        timeout_s=rng.choice((0.5, 1.0, 3.0)),
        lost=rng.choice((0.0, 0.0, 0.1, 0.3)),
        doubled=rng.choice((0.0, 0.0, 0.2)),
        long=rng.choice((0.0, 0.05, 0.2)),
    )
    taste = Taste(
        seed=seed,
        ranks=tuple(rng.choices((1, 2), (4, 1))[0] for _ in range(nodes)),
        protect=rng.choices(list(_PROTECT), list(_PROTECT.values()))[0],
        slots=rng.choice((2, 2, 2, 3)),
        every=rng.choice((1, 1, 2)),
        racks=rng.choice((1, 2, nodes)),
        pace=pace,
        events=nodes * rng.randrange(15, 55),
    )
    weights = [weight * rng.choice((0.1, 1, 1, 5)) for weight in diet.values()]
    kinds = rng.choices(list(diet), weights, k=rng.randrange(1, FAULTS_LIMIT + 1))
    faults = [Fault(rng.randrange(taste.events), kind, rng.getrandbits(8), rng.random()) for kind in kinds]
    return taste, tuple(faults)


def play(schedule: Schedule) -> World:
    """Play it. AssertionError, with the shortest story that still goes wrong, if something does not hold."""
    world = World(*schedule)
    try:
        world.run()
    except AssertionError as error:
        raise AssertionError(explain(cut_down(schedule))) from error
    return world


def failure(schedule: Schedule) -> tuple[str, list[str]] | None:
    """What does not hold, and the transcript; None if all does."""
    world = World(*schedule, tell=True)
    try:
        world.run()
    except AssertionError as error:
        return str(error), world.log or []
    return None


def cut_down(schedule: Schedule, fails: Callable[[Schedule], bool] = lambda s: failure(s) is not None) -> Schedule:
    """A schedule that still fails, and of which no fault can be left out."""
    taste, faults = schedule
    for calmer in (replace(taste.pace, lost=0.0, doubled=0.0), replace(taste.pace, long=0.0)):
        if fails((replace(taste, pace=calmer), faults)):
            taste = replace(taste, pace=calmer)
    index = 0
    while index < len(faults):
        fewer = faults[:index] + faults[index + 1 :]
        if fails((taste, fewer)):
            faults, index = fewer, 0
        else:
            index += 1
    return taste, faults


def explain(schedule: Schedule) -> str:
    """A failing schedule and its transcript, which ends where something does not hold."""
    found = failure(schedule)
    assert found is not None, "not deterministic"
    words, log = found
    taste, faults = schedule
    shape = (
        f"{len(taste.ranks)} nodes with {', '.join(map(str, taste.ranks))} ranks in {taste.racks} racks, protect "
        f"{taste.protect}, {taste.slots} slots, every {taste.every}, {taste.pace}"
    )
    left_out = [f"  ({len(log) - SHOWN_LINES} lines before)"] if len(log) > SHOWN_LINES else []
    return "\n".join([f"seed {taste.seed}: {words}", shape, *map(str, faults), *left_out, *log[-SHOWN_LINES:]])
