"""What is in a tier, snapshot by snapshot, from listings alone: no object is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..snapshot.record import SnapshotId
from .names import DELETED, ENTRIES, READERS, SNAPSHOTS, parse_entry, parse_snapshot, parse_tombstone
from .store import Found, Store


@dataclass(slots=True)
class Seen:
    """A snapshot of which anything is there. ``has_data``: there are objects in its folder, whoever wrote them."""

    id: SnapshotId
    entries: list[Found] = field(default_factory=list)
    has_data: bool = False
    leases: list[Found] = field(default_factory=list)
    tombstone: Found | None = None

    @property
    def complete(self) -> bool:
        """Whether there is an entry of every rank of a world, as ``reader`` sees it. A tombstone is not looked at."""
        worlds = Counter(part[2] for found in self.entries if (part := parse_entry(found.key)) is not None)
        return any(count == world for world, count in worlds.items())

    @property
    def gone(self) -> bool:
        """Whether nothing but a tombstone is left."""
        return not (self.entries or self.has_data or self.leases)


@dataclass(frozen=True, slots=True)
class Survey:
    """All snapshots, oldest first. ``newest_s``: when the newest of all listed objects was put, by the store's clock; so
    that clock shows no less now. ``others``: what else lies beside the tombstones."""

    seen: dict[SnapshotId, Seen]
    newest_s: float
    others: list[Found]


async def survey(store: Store) -> Survey:
    """List what is there.

    Data is listed before entries: what is finished meanwhile is then seen to be complete, never to be garbage.
    """
    data = await store.children(SNAPSHOTS)
    leases = await store.list(READERS)
    tombstones = await store.list(DELETED)
    entries = await store.list(ENTRIES)
    seen: dict[SnapshotId, Seen] = {}

    def of(id: SnapshotId) -> Seen:
        return seen.setdefault(id, Seen(id))

    for name in data:
        if (id := parse_snapshot(name)) is not None:
            of(id).has_data = True
    for found in entries:
        if (part := parse_entry(found.key)) is not None:
            of(part[0]).entries.append(found)
    for found in leases:
        if (id := parse_snapshot(found.key.removeprefix(READERS).partition("/")[0])) is not None:
            of(id).leases.append(found)
    others = []
    for found in tombstones:
        if (id := parse_tombstone(found.key)) is not None:
            of(id).tombstone = found
        else:
            others.append(found)
    return Survey(dict(sorted(seen.items())), _newest_s((*leases, *tombstones, *entries)), others)


def _newest_s(found: Iterable[Found]) -> float:
    return max((one.modified_s for one in found), default=0.0)
