"""Drives the beat: at most one under way, begun at the fence, harvested at the end of the same step.

What is concluded is decided in ``snapshot.beat``; here is only when to start, how long to wait, and what this rank owes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..snapshot.beat import NONE, UNKNOWN, Agreed, Facts, Verdict, complete_here, settle
from .ranks import Pending, Ranks


@dataclass(slots=True)
class _UnderWay:
    """One beat: its ordinal, its operation, and, once the step's end was reached, which step that was.

    ``stop``: it is known here that it may make its step the last one.
    """

    ordinal: int
    pending: Pending[list[list[int]]]
    stop: bool
    step: int | None = None
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """What this rank can say of itself for the next beat.

    Attributes:
        held: steps of this run that are in this rank's slots or on their way there; and whether they are sealed.
        able: no objection to a snapshot.
        relayout: the state's structure has changed.
        busy_us: duration of the running step so far, in microseconds.
        stop: a preemption notice has come to this rank.
        due, free: to how many tiers the next snapshot should go, and at most can.
        persisted: the newest step of this run whose image of this rank lies in the nearest tier, or ``NONE``.
        digest: the newest step that this rank has begun to copy, and the digest of what all ranks should hold alike, sampled
            then; None if there is none.
    """

    held: Mapping[int, bool]
    able: bool
    relayout: bool
    busy_us: int
    digest: tuple[int, int] | None = None
    stop: bool = False
    due: int = 0
    free: int = UNKNOWN
    persisted: int = NONE


class Pulse:
    """The beats of one rank. Not thread safe: all calls come from the training thread.

    A step that was agreed to be taken, and is not held here, is one that this rank had to give up, for whatever reason: it
    tells the others until they know.

    Attributes:
        agreed: what all ranks have concluded so far.
        known: the newest watermark that all ranks know of: who took part in a beat has concluded the one before.
        missed_stop: the last step is over for the other ranks, and this one learned of it too late.
    """

    def __init__(
        self,
        ranks: Ranks,
        slots: int,
        agreed: Agreed,
        *,
        dropped: Callable[[int], None],
        relayout: Callable[[int], None],
        advanced: Callable[[int], None] = lambda step: None,
    ) -> None:
        """*dropped* is called for each outstanding step that is given up because some rank could not keep it.

        *advanced* is called with each new watermark, whichever call learns of it, before this rank takes part in another beat:
        who knows from that one that all ranks know of the watermark can rely on what was done here.

        *relayout* is called when all ranks have agreed to lay their state out anew; it begins a collective, which thereby
        comes at the same place in the sequence of collectives on every rank, however late this one learns of it; it is told
        the ordinal of the step.
        """
        self.agreed = agreed
        self.known = agreed.watermark
        self._ranks = ranks
        self._slots = slots
        self._dropped = dropped
        self._relayout = relayout
        self._advanced = advanced
        self._ordinal = 0  # of the step now running
        self._fences, self._usual_fences = 0, 1  # of the running step so far, and of the one before
        self._beat: _UnderWay | None = None
        self.missed_stop = False

    def fenced(self) -> bool:
        """Count a fence of the running step; whether this is the time to begin its beat.

        That is the last one, as far as can be told from the step before. Where each parameter has an optimizer of its own, which
        steps during backward, there are many, and the first of them comes too soon: what this rank could tell then is less.
        """
        self._fences += 1
        return self._fences == self._usual_fences

    def start(self, standing: Callable[[], Standing]) -> None:
        """Begin the running step's beat, unless it has begun, an older one is still under way, or ranks must align."""
        if self._beat is not None and self._beat.step is not None:
            late = self._settle(timeout_s=0.0)  # should its step have been taken, it is not held here
            self.missed_stop |= late is not None and late.stop
        if self._beat is None and self._ordinal >= self.agreed.resume_at:
            facts = self._facts(standing())
            pending = self._ranks.reduce_min(facts.to_vector())
            self._beat = _UnderWay(self._ordinal, pending, self.agreed.stopping or facts.stop)

    def harvest(
        self, step: int, wanted: bool, standing: Callable[[], Standing], timeout_s: float, patience_s: float = 0.0
    ) -> Verdict:
        """End the running step: the verdict on it, waiting for the other ranks at most *timeout_s*; or, if it may be the last
        one, *patience_s*, as all ranks must end together."""
        ordinal = self._ordinal
        try:
            self.start(standing)
        finally:
            self._usual_fences, self._fences = max(self._fences, 1), 0
            self._ordinal = ordinal + 1  # whatever happens here: ranks that count differently never meet again
        if self._beat is None:
            return Verdict(False, "ranks-apart" if wanted else None)
        mine = self._beat.ordinal == ordinal
        if mine:
            self._beat.step, self._beat.wanted = step, wanted
        verdict = self._settle(max(timeout_s, patience_s) if self._beat.stop else timeout_s) if mine else None
        return verdict or Verdict(False, "beat-late" if wanted else None, stop=self.missed_stop)

    def _settle(self, timeout_s: float) -> Verdict | None:
        """Conclude the beat under way if its answer comes in time."""
        beat = self._beat
        assert beat is not None
        assert beat.step is not None
        answer = beat.pending.result(timeout_s)
        if answer is None:
            return None
        self._beat = None
        before = self.agreed
        self.agreed, verdict = settle(
            before, Facts.from_vector(answer[0]), step=beat.step, wanted=beat.wanted, slots=self._slots
        )
        if self.agreed.watermark > before.watermark:
            self._advanced(self.agreed.watermark)
        self.known = before.watermark if self._ranks.world > 1 else self.agreed.watermark
        for step in before.outstanding:
            if step not in self.agreed.outstanding and step > self.agreed.watermark:
                self._dropped(step)
        if verdict.relayout:
            self._relayout(self._ordinal)
        return verdict

    def complete(self, step: int) -> None:
        """All ranks have found out together, outside of the beat, that *step* is complete. Collective."""
        if step > self.agreed.watermark:
            outstanding = tuple(s for s in self.agreed.outstanding if s > step)
            self.agreed = replace(self.agreed, watermark=step, outstanding=outstanding)
        self.known = max(self.known, step)

    def _facts(self, standing: Standing) -> Facts:
        owed = [step for step in self.agreed.outstanding if step not in standing.held]
        newest = max([self.agreed.watermark, *self.agreed.outstanding])
        # Only samples of the same step can be compared: a rank that missed the newest one has none.
        digest = standing.digest[1] if standing.digest is not None and standing.digest[0] == newest else UNKNOWN
        return Facts(
            first_beat=self._ordinal,
            last_beat=self._ordinal,
            first_taken=newest,
            last_taken=newest,
            complete=complete_here(self.agreed, frozenset(step for step, sealed in standing.held.items() if sealed)),
            discarded=min(owed, default=NONE),
            able=standing.able,
            relayout=standing.relayout,
            busy_us=standing.busy_us,
            low_digest=digest,
            high_digest=digest,
            stop=standing.stop,
            all_stop=standing.stop,
            due=standing.due,
            free=standing.free,
            low_persisted=standing.persisted,
            high_persisted=standing.persisted,
        )
