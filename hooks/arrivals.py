"""Waiting, all ranks together, for a snapshot to get where it is safe: protected by other nodes, or persisted in a tier."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

from ..errors import SnapshotSkipped
from ..snapshot.record import SnapshotId
from .contract import Ticket
from .found import together
from .holding import Holding
from .ranks import Ranks
from .spilling import Spilling

_GATHER_S: Final = 10.0  # for the other ranks to say that they waited in vain


@dataclass(frozen=True, slots=True)
class Arrivals:
    """One rank's waits. Collective throughout: every rank calls the same methods in the same order."""

    ranks: Ranks
    holding: Holding
    spilling: Spilling

    def protected(self, ticket: Ticket, timeout_s: float) -> SnapshotId:
        """Return only when all ranks know that it is; also for ranks that did not take it, to whom this raises."""
        what = f"step {ticket.step}"

        def here() -> SnapshotId:
            id = taken(ticket)
            self.holding.wait_sealed(id, timeout_s, guarded=True)
            return id

        id = together(self.ranks, f"protecting {what}", timeout_s + _GATHER_S, here)
        # First marked everywhere, then reported anywhere: who is told of it here can rely on it wherever this rank dies.
        together(self.ranks, f"marking {what}", timeout_s, lambda: self.holding.mark_complete(id))
        return id

    def persisted(self, ticket: Ticket, timeout_s: float, digest: tuple[int, int] | None) -> None:
        """Return when the nearest tier has it of every rank. Whether other nodes hold parity does not matter for it.

        *digest*: a step, and the digest of a sample of what all ranks should hold alike in it.

        Raises ``SnapshotSkipped`` if it shows that they do not: the next beat would give that snapshot up.
        """
        what, deadline_s = f"step {ticket.step}", time.monotonic() + timeout_s
        wait_s = timeout_s + _GATHER_S
        together(self.ranks, f"sealing {what}", wait_s, lambda: self.holding.wait_sealed(taken(ticket), timeout_s))
        mine = digest[1] if digest is not None and digest[0] == ticket.step else None
        said = self.ranks.gather(json.dumps(mine).encode(), f"comparing {what}", wait_s)
        if len({one for one in map(json.loads, said) if one is not None}) > 1:
            self.holding.discard(taken(ticket), "ranks hold different bytes of what they share")
            raise SnapshotSkipped(f"{what} is given up: ranks hold different bytes of what they share")
        persist = partial(self.spilling.persist, taken(ticket), max(deadline_s - time.monotonic(), 1.0))
        together(self.ranks, f"persisting {what}", wait_s, persist)


def taken(ticket: Ticket) -> SnapshotId:
    """The snapshot's identity. Raises ``SnapshotSkipped`` if it was not taken."""
    if ticket.id is None:
        raise SnapshotSkipped(f"step {ticket.step} was not taken: {ticket.skipped}")
    return ticket.id
