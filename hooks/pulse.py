"""Drives the beat: at most one under way, begun at the fence, harvested at the end of the same step.

What is concluded is decided in ``snapshot.beat``; here is only when to start, how long to wait, and what this rank owes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..snapshot.beat import NONE, Agreed, Facts, Verdict, complete_here, settle
from .ranks import Pending, Ranks


@dataclass(slots=True)
class _UnderWay:
    """One beat: its ordinal, its operation, and, once the step's end was reached, which step that was."""

    ordinal: int
    pending: Pending
    step: int | None = None
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """What this rank can say of itself for the next beat."""

    sealed: frozenset[int]
    able: bool
    relayout: bool
    busy_us: int


class Pulse:
    """The beats of one rank. Not thread safe: all calls come from the training thread.

    Attributes:
        agreed: what all ranks have concluded so far.
        waiting: steps that were agreed to be taken and that this rank gave up; told to the others until they know.
    """

    def __init__(
        self,
        ranks: Ranks,
        slots: int,
        agreed: Agreed,
        *,
        dropped: Callable[[int], None],
        relayout: Callable[[], None],
    ) -> None:
        """*dropped* is called for each outstanding step that is given up because some rank could not keep it.

        *relayout* is called when all ranks have agreed to lay their state out anew; it begins a collective, which thereby
        comes at the same place in the sequence of collectives on every rank, however late this one learns of it.
        """
        self.agreed = agreed
        self._ranks = ranks
        self._slots = slots
        self._dropped = dropped
        self._relayout = relayout
        self._ordinal = 0  # of the step now running
        self._beat: _UnderWay | None = None
        self._given_up: set[int] = set()

    def give_up(self, step: int) -> None:
        """This rank has nothing to show for *step*; no rank shall keep it."""
        self._given_up.add(step)

    def start(self, standing: Callable[[], Standing]) -> None:
        """Begin the running step's beat, unless it has begun, an older one is still under way, or ranks must align."""
        if self._beat is not None and self._beat.step is not None:
            self._settle(timeout_s=0.0, late=True)
        if self._beat is None and self._ordinal >= self.agreed.resume_at:
            facts = self._facts(standing())
            self._beat = _UnderWay(self._ordinal, self._ranks.reduce_min(facts.to_vector()))

    def harvest(self, step: int, wanted: bool, standing: Callable[[], Standing], timeout_s: float) -> Verdict:
        """End the running step: the verdict on it, waiting for the other ranks at most *timeout_s*."""
        self.start(standing)
        ordinal, self._ordinal = self._ordinal, self._ordinal + 1
        if self._beat is None:
            return Verdict(False, "ranks-apart" if wanted else None)
        mine = self._beat.ordinal == ordinal
        if mine:
            self._beat.step, self._beat.wanted = step, wanted
        verdict = self._settle(timeout_s, late=False) if mine else None
        return verdict or Verdict(False, "beat-late" if wanted else None)

    def _settle(self, timeout_s: float, *, late: bool) -> Verdict | None:
        """Conclude the beat under way if its answer comes in time. *late*: its step is over, and cannot be taken now."""
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
        for step in before.outstanding:
            if step not in self.agreed.outstanding and step > self.agreed.watermark:
                self._given_up.discard(step)
                self._dropped(step)
        if late and verdict.take:
            self.give_up(beat.step)
        if verdict.relayout:
            self._relayout()
        return verdict

    def _facts(self, standing: Standing) -> Facts:
        owed = [step for step in self.agreed.outstanding if step in self._given_up]
        newest = max([self.agreed.watermark, *self.agreed.outstanding])
        return Facts(
            first_beat=self._ordinal,
            last_beat=self._ordinal,
            first_taken=newest,
            last_taken=newest,
            complete=complete_here(self.agreed, standing.sealed - self._given_up),
            discarded=max(owed, default=NONE),
            able=standing.able,
            relayout=standing.relayout,
            busy_us=standing.busy_us,
        )
