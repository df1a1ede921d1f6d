"""Plays as many schedules as asked for, on all cores: ``make soak``, or ``python -m holdfast.tests.simulation.soak [schedules]``.

HOLDFAST_SEED is the first seed; without it, one that was never used. Ends with the stories of what failed, if anything did.
"""

from __future__ import annotations

import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import cycle

from holdfast.tests.simulation.schedules import DIETS, play, schedule

CHUNK = 500
SCHEDULES = 1_000_000
FAILURES_LIMIT = 5


def soak(diet: str, first: int, count: int) -> list[str]:
    """The stories of those that fail of *count* schedules."""
    stories = []
    for seed in range(first, first + count):
        try:
            play(schedule(seed, DIETS[diet]))
        except AssertionError as error:
            stories.append(f"diet {diet}, {error}")
    return stories


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else SCHEDULES
    first = int(os.environ.get("HOLDFAST_SEED") or random.SystemRandom().randrange(1 << 48))
    print(f"{count} schedules, HOLDFAST_SEED={first}", flush=True)
    began_s = said_s = time.monotonic()
    done, stories = 0, list[str]()
    with ProcessPoolExecutor() as pool:
        chunks = zip(range(first, first + count, CHUNK), cycle(DIETS))
        sizes = {
            pool.submit(soak, diet, at, size): size for at, diet in chunks if (size := min(CHUNK, first + count - at))
        }
        for work in as_completed(sizes):
            done += sizes[work]
            stories += work.result()
            if time.monotonic() - said_s > 60 or len(stories) >= FAILURES_LIMIT or done == count:
                said_s = time.monotonic()
                print(f"{done} schedules, {done / (said_s - began_s):.0f} a second, {len(stories)} failed", flush=True)
            if len(stories) >= FAILURES_LIMIT:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    sys.exit("\n\n".join(stories[:FAILURES_LIMIT]) if stories else 0)


if __name__ == "__main__":
    main()
