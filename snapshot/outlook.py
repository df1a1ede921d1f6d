"""What could still be lost: how many more nodes may go before a snapshot cannot be restored any more. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Final

from .record import SnapshotId
from .recovery import Held, HeldParity, how_rebuilt, known_complete

_TRIES: Final = 5000
"""For each number of nodes, so many choices of them are tried at most: all of them in groups of usual size."""


@dataclass(frozen=True, slots=True)
class Spare:
    """Any *nodes* agents may be lost with all that they hold. Unless *exact*, perhaps any one more."""

    nodes: int
    exact: bool = True


def spare_nodes(id: SnapshotId, held: Iterable[Held], parities: Iterable[HeldParity]) -> Spare | None:
    """How many agents, whichever, may be lost so that *id* can still be restored from what the others hold.

    *held* and *parities* are all that any agent reports. None if it cannot be restored now.
    """
    images = list(held)
    of_it = [image for image in images if image.id == id]
    witnesses = {image.agent for image in images if id in known_complete({image.id: [image]})}
    found = [
        part.spare(witnesses)
        for part in _parts(max((image.world for image in of_it), default=0), of_it, [p for p in parities if p.id == id])
    ]
    spares = [spare for spare in found if spare is not None]
    if not spares or len(spares) < len(found):
        return None
    return min(spares, key=lambda spare: (spare.nodes, not spare.exact))


@dataclass(frozen=True, slots=True)
class _Part:
    """Ranks of one lane of a group, who holds the image of each, and the parity that can rebuild them."""

    holders: Mapping[int, frozenset[str]]
    parities: Sequence[HeldParity]

    def spare(self, witnesses: Collection[str]) -> Spare | None:
        """As ``spare_nodes``. *witnesses* know that the snapshot was complete."""
        agents = sorted({parity.agent for parity in self.parities}.union(*self.holders.values()))
        for count in range(len(agents) + 1):
            if comb(len(agents), count) > _TRIES:
                return Spare(count - 1, exact=False)
            if not all(self._stands(frozenset(lost), witnesses) for lost in combinations(agents, count)):
                return Spare(count - 1) if count else None
        return Spare(len(agents))

    def _stands(self, lost: frozenset[str], witnesses: Collection[str]) -> bool:
        """Whether every image can be had without the agents *lost*."""
        there = frozenset(rank for rank, holders in self.holders.items() if holders - lost)
        if len(there) == len(self.holders):
            return True
        if lost.issuperset(witnesses):
            return False
        left = [parity for parity in self.parities if parity.agent not in lost]
        return all(rank in there or how_rebuilt(rank, there, left) is not None for rank in self.holders)


def _parts(world: int, images: Sequence[Held], parities: Sequence[HeldParity]) -> list[_Part]:
    """The ranks ``0..world-1``, together if the same parity is of them: these stand and fall together, others do not."""
    mates = {rank: frozenset([rank]) for rank in range(world)}
    for parity in parities:
        joined = frozenset[int]().union(*(mates[rank] for rank in parity.ranks if rank in mates))
        mates.update(dict.fromkeys(joined, joined))
    return [
        _Part(
            {rank: frozenset(image.agent for image in images if image.rank == rank) for rank in sorted(ranks)},
            [parity for parity in parities if ranks.intersection(parity.ranks)],
        )
        for ranks in sorted(set(mates.values()), key=min)
    ]
