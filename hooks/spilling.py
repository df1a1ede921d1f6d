"""Which snapshots of this rank go to which tiers: what is due, what was begun, what has come of it.

When something is due is decided in ``storage.schedule``; that all ranks spill the same snapshots is the beat's work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ..snapshot.beat import NONE
from ..snapshot.record import SnapshotId
from ..storage.schedule import Begun, after, due, ended
from ..storage.tiers import TierSettings


class Spilling:
    """One rank's spills. Thread safe: the agent's answers come on another thread than the training's calls.

    Attributes:
        tiers: nearest first.
    """

    def __init__(
        self, tiers: Sequence[TierSettings], *, asks: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """*asks*: this rank's clock counts (rank 0's)."""
        self.tiers = tuple(tiers)
        self._asks = asks
        self._clock = clock
        self._lock = threading.Lock()
        self._steps = (0, 0)  # the last two
        self.begin_run(0)

    def begin_run(self, step: int) -> None:
        """The run begins after *step*. What a former one had begun is not waited for."""
        with self._lock:
            self._begun = tuple(Begun(step) for _ in self.tiers)
            self._asked = 0
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
            return max(mask.bit_length(), self._asked)

    def begin(self, id: SnapshotId, tiers: int) -> None:
        """All ranks take *id*, and will spill it to the first *tiers* tiers once it is complete."""
        with self._lock:
            self._marked[id] = tiers
            self._begun = after(self._begun, (1 << tiers) - 1, step=id.step, now_s=self._clock())
            if self._asked <= tiers:
                self._asked = 0

    def dropped(self, id: SnapshotId) -> None:
        """*id* was given up, and is not spilled: the next snapshot is, instead."""
        with self._lock:
            tiers = self._marked.pop(id, 0)
            if tiers:
                self._asked = max(self._asked, tiers) if self._asks else self._asked
                self._end(tiers, None)

    def complete(self, step: int) -> list[tuple[SnapshotId, int]]:
        """What is to be spilled now that all up to *step* are complete on all ranks, oldest first, and to how many tiers."""
        with self._lock:
            ready = sorted((id, tiers) for id, tiers in self._marked.items() if id.step <= step)
            for id, _ in ready:
                del self._marked[id]
            return ready

    def told(self, id: SnapshotId, tier: int, seconds: float, *, failed: bool) -> None:
        """The agent has answered for one tier."""
        with self._lock:
            if tier >= len(self._begun) or id.step < self._begun[tier].step:
                return
            begun = list(self._begun)
            begun[tier] = ended(begun[tier], None if failed else seconds)
            self._begun = tuple(begun)
            if tier == 0 and not failed:
                self._persisted = max(self._persisted, id.step)

    def _end(self, tiers: int, cost_s: float | None) -> None:
        self._begun = tuple(ended(b, cost_s) if i < tiers else b for i, b in enumerate(self._begun))

    @property
    def persisted(self) -> int:
        """The newest step of this run whose image of this rank lies in the nearest tier, or ``NONE``."""
        return self._persisted
