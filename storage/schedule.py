"""When a snapshot is spilled to which tier. Pure: a function of steps, of one clock and of what a spill has cost.

Rank 0 alone asks, with its own clock, and its answer travels on the beat as a bit mask (bit i: the i-th tier, nearest
first), so that all ranks spill the same snapshots. Its clock may jump: that costs a spill too many, never one too few.

Slower tiers are copied to from faster ones. So where a tier is due, all faster ones are due at the same step; and as long as
a tier is still busy with the last one, neither it nor a slower one is begun again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from .tiers import Auto, EverySeconds, EverySteps, TierSettings


@dataclass(frozen=True, slots=True)
class Begun:
    """The last spill to one tier that this run began.

    Attributes:
        step: its step; before the first one, the step at which the run began.
        at_s: when it was begun, by rank 0's clock; None before the first one.
        cost_s: how long the last one that ended took, on the slowest rank; None if none has ended yet.
        busy: it has neither ended nor been given up.
    """

    step: int
    at_s: float | None = None
    cost_s: float | None = None
    busy: bool = False


def due(tiers: Sequence[TierSettings], begun: Sequence[Begun], *, step: int, now_s: float) -> int:
    """The tiers to which the snapshot of *step* is to be spilled, as a bit mask; 0 for none.

    Args:
        tiers: nearest first.
        begun: of each of them.
        step: of the snapshot in question, which is newer than all that were begun.
        now_s: by the clock that ``Begun.at_s`` is of.
    """
    mask = 0
    for index, (tier, last) in enumerate(zip(tiers, begun, strict=True)):
        if last.busy:
            break
        if _is_due(tier, last, step, now_s):
            mask = (2 << index) - 1
    return mask


def after(begun: Sequence[Begun], mask: int, *, step: int, now_s: float) -> tuple[Begun, ...]:
    """*begun*, once spills of *step* were begun to the tiers in *mask*."""
    return tuple(
        replace(last, step=step, at_s=now_s, busy=True) if mask >> index & 1 else last
        for index, last in enumerate(begun)
    )


def ended(last: Begun, cost_s: float | None) -> Begun:
    """*last*, once it took *cost_s*; or, with None, was given up: what one costs is then known as well as before."""
    return replace(last, busy=False, cost_s=last.cost_s if cost_s is None else cost_s)


def indices(mask: int) -> tuple[int, ...]:
    """Which tiers a mask means."""
    return tuple(index for index in range(mask.bit_length()) if mask >> index & 1)


def interval_s(cost_s: float, mtbf_s: float) -> float:
    """From one spill's begin to the next one's, so that least is lost: between failures that come every *mtbf_s* on average.

    Young: ``sqrt(2·d·M)``; with the higher terms of J. T. Daly, "A higher order estimate of the optimum checkpoint interval
    for restart dumps" (2006), whose interval is between the end of one and the begin of the next, so d is added here. It
    is never shorter than a spill takes.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s + cost_s
    ratio = cost_s / (2 * mtbf_s)
    return sqrt(2 * cost_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9)


def _is_due(tier: TierSettings, last: Begun, step: int, now_s: float) -> bool:
    if step <= last.step and last.at_s is not None:
        return False
    if tier.milestone_steps is not None and _crossed(tier.milestone_steps, last.step, step):
        return True
    match tier.every:
        case EverySteps(steps):
            return _crossed(steps, last.step, step)
        case EverySeconds(seconds):
            return _passed(seconds, last.at_s, now_s)
        case Auto(mtbf_s):
            # With nothing measured yet, the first one is the measurement.
            return _passed(0.0 if last.cost_s is None else interval_s(last.cost_s, mtbf_s), last.at_s, now_s)


def _crossed(multiple: int, last_step: int, step: int) -> bool:
    """Whether a multiple lies in ``(last_step, step]``: the snapshot at the multiple itself may have been skipped."""
    return step // multiple > last_step // multiple


def _passed(seconds: float, since_s: float | None, now_s: float) -> bool:
    """A clock that went back says nothing of how long it was: then it is time."""
    return since_s is None or not 0 <= now_s - since_s < seconds
