"""Which snapshots of this rank go to which tiers: what is due, what was begun, what has come of it.

When something is due is decided in ``storage.schedule``; that all ranks spill the same snapshots is the beat's work.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ..agent import wire_pb2 as wire
from ..agent.client import id_of, told
from ..errors import ConfigError, SnapshotSkipped, TierFull
from ..snapshot.beat import NONE
from ..snapshot.record import SnapshotId
from ..storage.schedule import Begun, after, due, ended
from ..storage.tiers import TierSettings
from .holding import Holding
from .ranks import Ranks

_log = logging.getLogger(__name__)
_AGAIN_S: Final = (15.0, 900.0)  # until another is spilled instead of one that failed: after the first, and at most


class Spilling:
    """One rank's spills. Thread safe: the agent's answers come on another thread than the training's calls.

    Attributes:
        tiers: nearest first.
        holding: this rank's slots, once it is attached.
    """

    holding: Holding

    def __init__(
        self, tiers: Sequence[TierSettings], *, asks: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """*asks*: this rank's clock counts (rank 0's)."""
        self.tiers = tuple(tiers)
        self._asks = asks
        self._clock = clock
        self._lock = threading.Lock()
        self._steps = (0, 0)  # the last two
        self.begin_run("", 0)

    def compare(self, ranks: Ranks, timeout_s: float) -> None:
        """All ranks must spill to the same places. Collective. Raises ``ConfigError``."""
        mine = json.dumps([tier.to_json() for tier in self.tiers]).encode()
        said = ranks.gather(mine, "comparing tiers", timeout_s)
        if different := [rank for rank, tiers in enumerate(said) if tiers != said[0]]:
            raise ConfigError(f"ranks {different[:8]} name other tiers than rank 0 does; all ranks must name the same")

    def begin_run(self, run: str, step: int) -> None:
        """The run begins after *step*. What a former one had begun is not waited for."""
        with self._lock:
            self._run = run
            self._begun = tuple(Begun(step) for _ in self.tiers)
            self._asked = self._again = 0  # to how many tiers the next one goes; and one later on, as some failed
            self._again_s, self._pauses_s = 0.0, [_AGAIN_S[0]] * len(self.tiers)
            self._marked: dict[SnapshotId, int] = {}
            self._persisted = NONE
            self._steps = (step, step)

    def step_ended(self, step: int) -> None:
        """Steps may be numbered in larger strides than one."""
        self._steps = (self._steps[1], step)

    def ask(self, tiers: int) -> None:
        """Somebody wants the next snapshot in the first *tiers* tiers."""
        with self._lock:
            self._asked = max(self._asked, min(tiers, len(self.tiers)))

    def due(self) -> int:
        """To how many tiers the snapshot at the end of the running step should go, as far as this rank is concerned."""
        if not self.tiers:
            return 0
        with self._lock:
            step = 2 * self._steps[1] - self._steps[0]
            mask = due(self.tiers, self._begun, step=step, now_s=self._clock()) if self._asks else 0
            again = self._again if self._clock() >= self._again_s else 0
            return max(mask.bit_length(), self._asked, again)

    def free(self) -> int:
        """To how many tiers it can go: a tier that is busy with the last one holds up itself and all slower ones."""
        with self._lock:
            return next((index for index, last in enumerate(self._begun) if last.busy), len(self._begun))

    def begin(self, id: SnapshotId, tiers: int) -> None:
        """All ranks take *id*, and will spill it to the first *tiers* tiers once it is complete."""
        with self._lock:
            self._marked[id] = tiers
            self._begun = after(self._begun, (1 << tiers) - 1, step=id.step, now_s=self._clock())
            if self._asked <= tiers:
                self._asked = 0
            if self._again <= tiers:
                self._again = 0

    def dropped(self, id: SnapshotId) -> None:
        """*id* was given up, and is not spilled: the next snapshot is, instead."""
        with self._lock:
            tiers = self._marked.pop(id, 0)
            if tiers:
                self._asked = max(self._asked, tiers) if self._asks else self._asked
                self._end(tiers, None)

    def advance(self, step: int) -> None:
        """All up to *step* are complete on all ranks: those that are marked are spilled."""
        if self.tiers:
            self._spill(self._ready(step))

    def _spill(self, ready: Iterable[tuple[SnapshotId, int]]) -> None:
        for id, tiers in ready:
            try:
                self.holding.spill(id, tiers)
            except SnapshotSkipped as error:  # the next beats show the others that this rank has not persisted it
                _log.warning("%s", error)
                with self._lock:
                    self._end(tiers, None)

    def persist(self, id: SnapshotId, timeout_s: float) -> None:
        """Return once the nearest tier has this rank's image of *id*, which is complete on all ranks.

        Raises ``SnapshotSkipped``, ``DeadlinePassed``, ``TierError``.
        """
        self.holding.pin(id, timeout_s)
        marked = dict(self._ready(id.step))
        self._spill([(other, tiers) for other, tiers in marked.items() if other != id])
        try:
            self.holding.spill(id, marked.get(id, 1))
        except SnapshotSkipped:
            with self._lock:
                self._end(marked.get(id, 0), None)
            raise
        self.holding.wait_spilled(id, timeout_s)

    def _ready(self, step: int) -> list[tuple[SnapshotId, int]]:
        """What is marked, up to *step*, oldest first, and to how many tiers it goes; it is marked no longer."""
        with self._lock:
            ready = sorted((id, tiers) for id, tiers in self._marked.items() if id.step <= step)
            for id, _ in ready:
                del self._marked[id]
            return ready

    def told(self, spilled: wire.Spilled) -> None:
        """The agent has answered for one tier."""
        id, tier = id_of(spilled.id), spilled.tier
        with self._lock:
            if spilled.trying or id.run != self._run or tier >= len(self._begun):
                return
            if id.step >= self._begun[tier].step:
                begun = list(self._begun)
                begun[tier] = ended(begun[tier], None if spilled.error else spilled.seconds)
                self._begun = tuple(begun)
            if spilled.error:
                self._try_again(tier, spilled.error)
                return
            self._pauses_s[tier] = _AGAIN_S[0]
            if tier == 0:
                self._persisted = max(self._persisted, id.step)

    def _try_again(self, tier: int, error: str) -> None:
        """What kept this rank's image out of a tier may be over long before the next one is due. Any rank's request counts."""
        if not isinstance(told(error), TierFull):  # that costs a deletion each time
            self._again = max(self._again, tier + 1)
            self._again_s = max(self._again_s, self._clock() + self._pauses_s[tier])
            self._pauses_s[tier] = min(2 * self._pauses_s[tier], _AGAIN_S[1])

    def _end(self, tiers: int, cost_s: float | None) -> None:
        self._begun = tuple(ended(b, cost_s) if i < tiers else b for i, b in enumerate(self._begun))

    @property
    def persisted(self) -> int:
        """The newest step of this run whose image of this rank lies in the nearest tier, or ``NONE``."""
        return self._persisted
