"""The beat: what ranks tell each other once per step, and what they all conclude from it. Pure.

Every rank contributes ``Facts`` to one ``all_reduce(MIN)``; ``settle`` turns the reduced facts and what was agreed so
far into what is agreed now. The beats form one sequence, the same on every rank, and what is agreed is a function of
that sequence alone: however late a rank learns of a beat, it concludes what the others did. A rank that cannot carry
out a conclusion (too late, the copy was torn, the agent is gone) says so in its next facts, and all discard the snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NONE = -1  # "no step"
UNKNOWN = 1 << 62  # "no digest": neutral in the reduction


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank contributes; or, after the reduction, what holds of all of them.

    Attributes:
        first_beat, last_beat: ordinal of the beat; reduced, the range over all ranks. Equal unless ranks are out of step.
        first_taken, last_taken: the newest step agreed to be taken; ranks that name their steps differently differ here.
        complete: the newest agreed step such that it and all older outstanding ones are complete here, or ``NONE``.
        discarded: the oldest step taken before that this rank had to give up, or ``NONE``. The oldest, as there may be
            another one each beat, and then none but the newest would ever be heard of.
        able: no objection to a snapshot at this step.
        relayout: the structure of this rank's state changed, so a new layout is needed.
        stop, all_stop: a preemption notice arrived here; reduced, at any rank, and at all of them.
        busy_us: how long this rank's last step took, in microseconds.
        low_digest, high_digest: of a sample of what all ranks should hold alike, at the newest step taken; reduced, the
            range. ``UNKNOWN`` where a rank has none.
        due: how many tiers, from the nearest on, the next snapshot is to be spilled to; reduced, the most that any rank asks.
        free: to how many it can be, as the next one is still busy with the last; reduced, the fewest.
        low_persisted, high_persisted: the newest step whose image of this rank lies in the nearest tier, or ``NONE``; reduced,
            the range. Images are spilled in order, so if all name the same step, the whole snapshot is there.
    """

    first_beat: int
    last_beat: int
    first_taken: int = NONE
    last_taken: int = NONE
    complete: int = NONE
    discarded: int = NONE
    able: bool = True
    relayout: bool = False
    stop: bool = False
    all_stop: bool = False
    busy_us: int = 0
    low_digest: int = UNKNOWN
    high_digest: int = UNKNOWN
    due: int = 0
    free: int = UNKNOWN
    low_persisted: int = NONE
    high_persisted: int = NONE

    def to_vector(self) -> list[int]:
        """int64 values whose elementwise minimum over the ranks is the vector of the reduced facts."""
        return [
            self.first_beat,
            -self.last_beat,
            self.first_taken,
            -self.last_taken,
            self.complete,
            self.discarded if self.discarded != NONE else UNKNOWN,
            int(self.able),
            -int(self.relayout),
            -int(self.stop),
            int(self.all_stop),
            -self.busy_us,
            self.low_digest,
            -self.high_digest if self.high_digest != UNKNOWN else UNKNOWN,
            -self.due,
            self.free,
            self.low_persisted,
            -self.high_persisted,
        ]

    @classmethod
    def from_vector(cls, vector: Sequence[int]) -> Facts:
        """Inverse of ``to_vector``."""
        first, last, taken, last_taken, complete, discarded, able, relayout, *others = vector
        stop, all_stop, busy, low, high, due, free, low_persisted, high_persisted = others
        return cls(
            first, -last, taken, -last_taken, complete, discarded if discarded != UNKNOWN else NONE,
            bool(able), bool(relayout), bool(stop), bool(all_stop), -busy, low, -high if high != UNKNOWN else UNKNOWN,
            -due, free, low_persisted, -high_persisted,
        )  # fmt: skip


VECTOR_LENGTH = len(Facts(0, 0).to_vector())


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks have concluded so far.

    Attributes:
        watermark: the newest step known complete on every rank (or the one restored from), ``NONE`` before the first.
        outstanding: steps taken after it, oldest first, not known complete everywhere.
        resume_at: no beat of a lower ordinal is started; brings ranks whose beats fell out of step together again.
        persisted: the newest step known to lie in the nearest tier as a whole, ``NONE`` before the first.
        stopping: a preemption notice arrived at some rank. Who takes part in a beat has concluded the one before; so from
            the next one on all ranks know of it before they wait for the others, and can wait for as long as it takes.
    """

    watermark: int = NONE
    outstanding: tuple[int, ...] = ()
    resume_at: int = 0
    persisted: int = NONE
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a beat decided. ``reason`` says why no snapshot is taken, None if one is, or if none was wanted.

    ``due``: how many tiers it is to be spilled to, from the nearest on. ``stop``: this is the last step, as all ranks know.
    """

    take: bool
    reason: str | None = None
    relayout: bool = False
    stop: bool = False
    busy_us: int = 0
    due: int = 0


def settle(agreed: Agreed, facts: Facts, *, step: int, wanted: bool, slots: int) -> tuple[Agreed, Verdict]:
    """Conclude from the reduced *facts* of one beat.

    Args:
        agreed: what the beats before this one led to.
        facts: reduced over all ranks.
        step: the step that the beat belongs to.
        wanted: whether a snapshot of it is asked for (``every``); the same on all ranks. The last step asks for one too.
        slots: how many slots each rank has; the same on all ranks.

    Returns:
        What is agreed now, and the verdict on *step*. With ``take``, the step is outstanding.
    """
    aligned, last = facts.first_beat == facts.last_beat, agreed.stopping or facts.all_stop
    wanted = wanted or last
    if facts.first_taken == facts.last_taken:
        outstanding = tuple(s for s in agreed.outstanding if s != facts.discarded)
        watermark = max([agreed.watermark, *(s for s in outstanding if s <= facts.complete)])
    else:  # no two ranks mean the same by their steps: nothing outstanding can become complete
        outstanding, watermark, aligned = (), agreed.watermark, False
    drifted = facts.low_digest != facts.high_digest
    if drifted:  # replicas that shared their copies out no longer hold the same: what was put together is of no rank
        outstanding, watermark = (), agreed.watermark
    outstanding = tuple(s for s in outstanding if s > watermark)
    relayout = facts.relayout or drifted
    reason = _objection(facts, aligned, relayout, step, watermark, outstanding, slots) if wanted else None
    take = wanted and reason is None
    resume_at = agreed.resume_at if facts.first_beat == facts.last_beat else facts.last_beat + 1
    persisted = facts.low_persisted if facts.low_persisted == facts.high_persisted else NONE
    now = Agreed(
        watermark,
        (*outstanding, step) if take else outstanding,
        resume_at,
        max(agreed.persisted, persisted),
        agreed.stopping or facts.stop,
    )
    return now, Verdict(take, reason, relayout, last, facts.busy_us, min(facts.due, facts.free))


def _objection(
    facts: Facts,
    aligned: bool,
    relayout: bool,
    step: int,
    watermark: int,
    outstanding: tuple[int, ...],
    slots: int,
) -> str | None:
    """Why no snapshot is taken, or None. The words are those of metrics and logs."""
    held = (watermark != NONE) + len(outstanding)
    objections = {
        "ranks-apart": not aligned,
        "new-layout": relayout,
        "not-able": not facts.able,
        "step-not-newer": step <= max([watermark, *outstanding]),
        "slots-busy": held + 1 > slots,
    }
    return next((reason for reason, holds in objections.items() if holds), None)


def complete_here(agreed: Agreed, sealed: frozenset[int]) -> int:
    """The ``complete`` fact of a rank on which the steps *sealed* are complete: the prefix rule of ``Facts.complete``."""
    newest = agreed.watermark
    for step in agreed.outstanding:
        if step not in sealed:
            break
        newest = step
    return newest
