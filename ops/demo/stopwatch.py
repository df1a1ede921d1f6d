"""Where a starting process spends its time."""

from __future__ import annotations

import os
import time

from .journal import started_ticks


class Stopwatch:
    """Splits the time since this process began into named phases, in seconds; ``start`` is the one up to here."""

    def __init__(self) -> None:
        ticks = started_ticks(os.getpid())
        began_s = ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
        self.split_s: dict[str, float] = {"start": round(time.clock_gettime(time.CLOCK_BOOTTIME) - began_s, 3)}
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End *phase* here."""
        now = time.perf_counter()
        self.split_s[phase], self._mark = round(now - self._mark, 3), now

    def divide(self, phase: str, part: str, part_s: float) -> None:
        """The last *part_s* seconds of *phase* were *part*."""
        self.split_s[phase] = round(self.split_s[phase] - part_s, 3)
        self.split_s[part] = round(part_s, 3)
