"""A Checkpointer over what the plans of DCP's ``save`` name, one save after the other."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Final

import torch

from ...errors import ConfigError, HoldfastError, SnapshotSkipped, SnapshotUnknown
from ...snapshot.codec import encode
from ...snapshot.record import table_bytes_for
from ...snapshot.state import Item, Survey, to_leaf
from ..checkpointer import Checkpointer
from ..contract import State, Ticket
from ..found import together
from .opened import Opened, choose

_log = logging.getLogger(__name__)
_FIRST_BYTES: Final = 256 << 10  # of a slot, before anything is known of what will be saved
_FINAL: Final = {
    "over-budget": "memory does not suffice; the agent's log says how much is needed",
    "layout-too-large": "it has more tensors than agents can tell each other of",
}
_PAUSE_S: Final = 0.01  # between two attempts
_LOOK_S: Final = 5.0  # at a slot that is busy


class Planned:
    """What the plan of one save names on this rank; nothing between two saves. Copied at once: nobody says when it changes."""

    optimizers: Mapping[str, torch.optim.Optimizer] = {}
    shuffles = False

    def __init__(self) -> None:
        self.take((), {})

    def take(self, items: Sequence[Item], values: Mapping[str, Any]) -> None:
        """From now on it is these. Raises ``StateRefused`` for a value that cannot be stored without pickle, by its path."""
        encode(values.get("values", {}), "values", to_leaf)
        self._items, self._values = tuple(items), dict(values)

    def survey(self) -> Survey:
        """All tensors."""
        return Survey(self._items, (), (), {}, {}, plain=False, loose=False, size=self.size())

    def size(self) -> int:
        """No optimizers, so no state that could appear."""
        return 0

    def unchanged(self, survey: Survey) -> bool:
        """Always: they are handed over for the time of the save."""
        return True

    def own_values(self, survey: Survey) -> dict[str, Any]:
        """All that is no tensor."""
        return self._values


class Saves(Checkpointer):
    """Snapshots of what is handed over, each taken whole, or not at all, before ``save`` returns. Collective throughout.

    What keeps a snapshot from being taken at this moment is waited for: a training loop would skip it, but whoever calls
    ``torch.distributed.checkpoint.save`` wants this one.
    """

    passing: ClassVar[set[ExitStack]] = set()
    """What loads have open that have attached for themselves. One that failed half-way is over when somebody else attaches."""

    _state: Planned

    def __init__(self, **options: Any) -> None:
        """*options* as ``Checkpointer``'s."""
        for left in list(self.passing):
            left.close()
        self._under_way = threading.Lock()
        super().__init__({}, strict=True, **options)

    @staticmethod
    def _look_through(*nothing: Any) -> tuple[Planned, int, int]:
        return Planned(), _FIRST_BYTES, table_bytes_for(_FIRST_BYTES, _FIRST_BYTES)

    @property
    def alone(self) -> bool:
        """Whether there are no other nodes to protect with."""
        return self._holding.alone

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self._ranks.world

    @property
    def rank(self) -> int:
        """This one."""
        return self._ranks.rank

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """Nothing else is saved or loaded here meanwhile. Raises ``ConfigError`` if something is, or if this is closed."""
        if self._closed:
            raise ConfigError(f"{what}: the Writer is closed")
        if not self._under_way.acquire(blocking=False):
            raise ConfigError(f"{what}: another save or load is under way; wait for what async_save returned first")
        try:
            yield
        finally:
            self._under_way.release()

    @property
    def newest_step(self) -> int:
        """Of the snapshot that could be loaded at attach, or of one that should be, and is lost; 0 if there never was any."""
        assert self._found is not None
        try:
            chosen = choose(self._found, None).chosen
        except SnapshotUnknown:
            return 0
        except HoldfastError:  # for who loads to hear of
            left = [part.id for parts in (self._found.images, self._found.stored) for part in parts]
            chosen = max(left, default=None)
        return 0 if chosen is None else chosen.step

    def cannot_become(self, state: State) -> str | None:
        """Why no snapshot can become that here, or None."""
        if state == "persisted" and not self._spilling.tiers:
            return "saves cannot become persisted: there is no tier to persist in"
        if state == "protected" and self.alone:
            return "saves cannot become protected: this node has no peers to protect with"
        return None

    def save(self, step: int, plan: Callable[[], tuple[Sequence[Item], Mapping[str, Any]]], wait: State) -> None:
        """Take a snapshot of the tensors and values that *plan* gives, as *step*; return when it is what *wait* says, on all
        ranks.

        Raises:
            StateRefused: a value that cannot be stored, by its path.
            SnapshotSkipped: it could not be taken, on some rank; says why.
            HoldfastError: as ``Checkpointer.wait``; the snapshot may have been taken then.
        """
        try:
            self._take_over(step, plan)
            ticket = self._taken(step)
            if wait == "persisted":
                self.wait(ticket, wait, self._deadlines.spill)
            if self.alone or wait == "protected":
                self._wait_protected(ticket, self._deadlines.protect)
            else:  # sealed by all ranks, which is all that it takes to be spilled if it is due
                self._spilling.advance(step)
        finally:
            self._state.take((), {})
            self._binder.forget()  # it holds the tensors, which may be copies that nobody else needs

    def _take_over(self, step: int, plan: Callable[[], tuple[Sequence[Item], Mapping[str, Any]]]) -> None:
        wait_s = self._deadlines.attach
        together(self._ranks, "looking through the plan", wait_s, lambda: self._state.take(*plan()))
        said = self._ranks.gather(str(step).encode(), "comparing steps", wait_s)
        if len(set(said)) > 1:
            steps = ", ".join(sorted({one.decode() for one in said})[:5])
            raise ConfigError(f"ranks save one checkpoint as different steps: {steps}; name it by its checkpoint_id")
        agreed = self._pulse.agreed
        newest = max([agreed.watermark, *(other for other in agreed.outstanding if other != step)])
        if step <= newest:
            raise ConfigError(f"step {step} comes after step {newest}; between two loads, steps must grow")
        if self._found is not None:  # it is of the past from now on
            self._found = None
            self._discard_newer(self._floor)
        self._dropped(step)  # of a save that failed only when all ranks had it: this one takes its place

    def _taken(self, step: int) -> Ticket:
        """The ticket of the snapshot, sealed on every rank. Raises ``SnapshotSkipped``."""
        until_s = time.monotonic() + self._deadlines.spill
        while True:
            ticket = together(self._ranks, f"saving step {step}", self._deadlines.spill, lambda: self._attempt(step))
            mine = [ticket.skipped, time.monotonic() > until_s]
            said = self._ranks.gather(json.dumps(mine).encode(), f"saving step {step}", self._deadlines.attach)
            outcomes = [json.loads(one) for one in said]
            reasons = {rank: reason for rank, (reason, _) in enumerate(outcomes) if reason is not None}
            if not reasons:
                return ticket
            self._dropped(step)  # whoever has taken it: all try again, or none
            final = {rank: reason for rank, reason in reasons.items() if reason in _FINAL}
            if final or any(late for _, late in outcomes):
                rank, reason = next(iter((final or reasons).items()))
                hint = f": {_FINAL[reason]}" if final else ", until the deadline passed"
                raise SnapshotSkipped(f"step {step} was not saved: {reason} (rank {rank}){hint}")
            _log.debug("step %d is tried again: %s", step, reasons)
            self._holding.wait_able(_LOOK_S)
            time.sleep(_PAUSE_S)

    def _attempt(self, step: int) -> Ticket:
        self._binder.adopt(self._state.survey())
        ticket = self.snapshot(step)
        if ticket.id is not None:
            try:
                self.wait(ticket, "sealed", self._deadlines.protect)
            except SnapshotSkipped as error:  # the agent went away in the middle, say
                return Ticket(step, str(error))
        return ticket

    def open(self, step: int | None) -> Opened:
        """The newest snapshot, or that of *step*, to be loaded from. After a save, another run begins with this: who loads
        may be going back.

        Raises ``SnapshotUnknown``, ``SnapshotLost``, and what ``Opened`` does.
        """
        if self._found is None:
            self._found = self._interrupt_run()
        plan = choose(self._found, step)
        return Opened(plan, self._found, self._holding, self._ranks, self._deadlines.restore)
