"""Which snapshot comes back, and from where: the restore plan. Pure, and the same on every rank.

The plan explains itself: for every image, where it comes from; for every newer snapshot that is passed over, why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .beat import NONE
from .record import SnapshotId


@dataclass(frozen=True, slots=True)
class Held:
    """One sealed image that some agent holds: of which snapshot and rank, and the slot where it lies.

    Attributes:
        complete: its trainer knew that the snapshot was sealed by every rank.
        checks_crc: images that agree in it are the same bytes.
    """

    id: SnapshotId
    rank: int
    world: int
    watermark: int
    agent: str
    path: str
    image_bytes: int
    complete: bool = False
    checks_crc: int = 0

    @property
    def where(self) -> tuple[SnapshotId, str, str]:
        """What tells this copy from any other of the same image."""
        return self.id, self.agent, self.path


@dataclass(frozen=True, slots=True)
class HeldParity:
    """The parity of one member of a group for one lane (the j-th rank of each member), sealed, held by some agent.

    Attributes:
        key: parities of equal keys belong together: same images, same order of members, same code.
        index: of the member among them.
        ranks: of each member in this lane, -1 where it has none.
        tolerance: how many members may be lost (m).
    """

    id: SnapshotId
    key: int
    index: int
    ranks: tuple[int, ...]
    tolerance: int
    agent: str
    lane: int = 0


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """An image that nobody holds, and that its group can compute: by what parity."""

    rank: int
    key: int
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InTier:
    """Images of one snapshot that an agent finds in a tier.

    Attributes:
        tier: its index; 0 is the nearest.
        ranks: half-open ranges of the ranks whose images are there.
        whole: all ranks once knew all of it to be persisted.
    """

    id: SnapshotId
    world: int
    tier: int
    ranks: tuple[tuple[int, int], ...]
    agent: str
    whole: bool = False

    def holds(self, rank: int) -> bool:
        """Whether that rank's image is there."""
        return any(first <= rank < end for first, end in self.ranks)


@dataclass(frozen=True, slots=True)
class Persisted:
    """An image that comes from a tier, and the agents that can read it there."""

    rank: int
    tier: int
    agents: tuple[str, ...]


Origin = Held | Rebuilt | Persisted


@dataclass(frozen=True, slots=True)
class Prospect:
    """Whether one snapshot can be restored, and how.

    Attributes:
        sources: where each rank's image would come from, in rank order; empty if it cannot be restored.
        reason: why it cannot; None if it can.
        complete: it is known to have been complete on all ranks.
    """

    id: SnapshotId
    sources: tuple[Origin, ...]
    reason: str | None
    complete: bool


@dataclass(frozen=True, slots=True)
class Rejected:
    """A snapshot that was passed over, and why."""

    id: SnapshotId
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to restore.

    Attributes:
        chosen: the newest snapshot all of whose images can be had, or None.
        sources: where the image of each rank that took it comes from, in rank order; empty if there is no choice.
        rejected: every snapshot newer than the chosen one, newest first.
        loss: why going back to *chosen* (or, without one, starting afresh) gives up a snapshot that was complete once.
            None in the ordinary case: what is passed over never was complete.
        lost: the newest such snapshot.
    """

    chosen: SnapshotId | None
    sources: tuple[Origin, ...]
    rejected: tuple[Rejected, ...]
    loss: str | None
    lost: SnapshotId | None = None

    @property
    def world(self) -> int:
        """How many ranks took the chosen snapshot."""
        return len(self.sources)

    def explain(self) -> str:
        """The plan in words, one line per fact."""
        lines = [f"passed over {r.id}: {r.reason}" for r in self.rejected]
        if self.chosen is None:
            lines.append("nothing to restore")
        else:
            lines.append(f"restore {self.chosen} (generation {self.chosen.generation})")
            lines += [f"  rank {source.rank}: {_words(source)}" for source in self.sources]
        if self.loss:
            lines.append(self.loss)
        return "\n".join(lines)


def _words(source: Origin) -> str:
    if isinstance(source, Held):
        return f"{source.path} of agent {source.agent}, {source.image_bytes} bytes"
    if isinstance(source, Persisted):
        return f"held by nobody; read from tier {source.tier} by {', '.join(source.agents)}"
    return f"held by nobody; rebuilt with the parity of {', '.join(source.agents)}"


def plan(
    held: Iterable[Held],
    damaged: Iterable[Held] = (),
    parities: Iterable[HeldParity] = (),
    hopeless: Iterable[tuple[SnapshotId, int]] = (),
    stored: Iterable[InTier] = (),
    unreadable: Iterable[tuple[SnapshotId, int, int]] = (),
) -> Plan:
    """Choose the newest snapshot all of whose images are held, can be rebuilt, or lie in a tier, however many ranks took it.

    Args:
        held: every sealed image that any agent reports; order and repetitions do not matter.
        damaged: those of *held* already found not to match their checksums; they count as not held. Other copies of
            the same images are as good as before.
        parities: every sealed parity that any agent reports. An image is rebuilt only of a snapshot known to have been
            complete: of any other, nobody knows whether the lost rank had sealed it.
        hopeless: (snapshot, rank) pairs that could not be rebuilt.
        stored: what any agent finds in the tiers.
        unreadable: (snapshot, rank, tier) of images that could not be read there.
    """
    rejected: list[Rejected] = []
    known: set[SnapshotId] = set()
    for prospect in prospects(held, damaged, parities, hopeless, stored, unreadable):
        known |= {prospect.id} if prospect.complete else set()
        if prospect.reason is None:
            return Plan(prospect.id, prospect.sources, tuple(rejected), *_loss(rejected, known))
        rejected.append(Rejected(prospect.id, prospect.reason))
    return Plan(None, (), tuple(rejected), *_loss(rejected, known))


def prospects(
    held: Iterable[Held],
    damaged: Iterable[Held] = (),
    parities: Iterable[HeldParity] = (),
    hopeless: Iterable[tuple[SnapshotId, int]] = (),
    stored: Iterable[InTier] = (),
    unreadable: Iterable[tuple[SnapshotId, int, int]] = (),
) -> Iterator[Prospect]:
    """Every snapshot that anybody holds or knows of, newest first. Arguments as for ``plan``."""
    bad, beyond = {copy.where: copy for copy in damaged}, frozenset(hopeless)
    images: dict[SnapshotId, list[Held]] = {}
    for image in held:
        images.setdefault(image.id, []).append(image)
    guards: dict[SnapshotId, list[HeldParity]] = {}
    for parity in parities:
        guards.setdefault(parity.id, []).append(parity)
    tiers: dict[SnapshotId, list[InTier]] = {}
    for found in sorted(stored, key=lambda found: (found.tier, found.agent)):
        tiers.setdefault(found.id, []).append(found)
    unread = frozenset(unreadable)
    known = known_complete(images) | {id for id, parts in tiers.items() if _whole_in_some_tier(parts)}
    for id in sorted(images.keys() | tiers.keys() | known, reverse=True):
        good = [image for image in images.get(id, []) if image.where not in bad]
        lost = frozenset(rank for its, rank in beyond if its == id)
        spoiled = frozenset(copy.rank for copy in bad.values() if copy.id == id)
        help_ = guards.get(id, []) if id in known else []
        worlds = {image.world for image in images.get(id, [])} | {part.world for part in tiers.get(id, [])}
        below = {
            rank: source
            for rank in range(max(worlds, default=0))
            if (source := _stored(id, rank, tiers.get(id, []), unread))
        }
        sources, reason = _sources(worlds, good, help_, lost, spoiled, below)
        if reason is not None and id in guards and id not in known:
            reason += "; not known to have been complete, so nothing of it may be rebuilt"
        yield Prospect(id, sources, reason, id in known)


def _whole_in_some_tier(parts: Sequence[InTier]) -> bool:
    """Whether one tier has the images of all ranks, wherever its parts are; or had them, on disks that are missing now."""
    return any(part.whole for part in parts) or any(
        all(any(part.holds(rank) for part in parts if part.tier == tier) for rank in range(parts[0].world))
        for tier in {part.tier for part in parts}
    )


def _stored(
    id: SnapshotId, rank: int, parts: Sequence[InTier], unread: frozenset[tuple[SnapshotId, int, int]]
) -> Persisted | None:
    """The nearest tier that has the image of *rank*. *parts* are of snapshot *id*, nearest first."""
    there = [part for part in parts if part.holds(rank) and (id, rank, part.tier) not in unread]
    if not there:
        return None
    return Persisted(rank, there[0].tier, tuple(part.agent for part in there if part.tier == there[0].tier))


def _sources(
    worlds: Collection[int],
    good: Sequence[Held],
    parities: Sequence[HeldParity],
    lost: frozenset[int],
    spoiled: frozenset[int],
    below: Mapping[int, Persisted],
) -> tuple[tuple[Origin, ...], str | None]:
    """A source for each rank's image, or why that cannot be. *below*: what tiers have."""
    if not worlds:
        return (), "known to have been complete, but no image of it is left"
    if len(worlds) > 1:
        return (), f"images of it say that {' or '.join(map(str, sorted(worlds)))} ranks took it"
    (world,) = worlds
    by_rank: dict[int, Origin] = {}
    for image in sorted(good, key=lambda image: (image.agent, image.path)):
        by_rank.setdefault(image.rank, image)
    there = frozenset(by_rank)
    for rank in range(world):
        if rank not in there and rank not in lost and (rebuilt := how_rebuilt(rank, there, parities)) is not None:
            by_rank[rank] = rebuilt
    by_rank = {**below, **by_rank}
    missing = [rank for rank in range(world) if rank not in by_rank]
    if missing:
        words = [f"rank {rank} {'damaged' if rank in spoiled else 'missing'}" for rank in missing[:8]]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        short = "" if not parities else f"; {_shortage(missing[0], there, parities)}"
        return (), f"{len(missing)} of {world} images cannot be had: {', '.join(words)}{more}{short}"
    return tuple(by_rank[rank] for rank in range(world)), None


def how_rebuilt(rank: int, there: frozenset[int], parities: Sequence[HeldParity]) -> Rebuilt | None:
    """How to rebuild the image of *rank* when those of *there* are held; None if no group can."""
    for key in sorted({parity.key for parity in parities if rank in parity.ranks}):
        mates = [parity for parity in parities if parity.key == key]
        if _stripes_short(mates, there) == 0:
            return Rebuilt(rank, key, tuple(sorted({mate.agent for mate in mates})))
    return None


def _stripes_short(mates: Sequence[HeldParity], there: frozenset[int]) -> int:
    """How many pieces the stripe with the fewest lacks, of those needed to compute the others (design: section 7)."""
    n, m, ranks = len(mates[0].ranks), mates[0].tolerance, mates[0].ranks
    cells = {mate.index for mate in mates}
    short = 0
    for stripe in range(n):
        holders = {(stripe + row) % n for row in range(m)}
        data = sum(ranks[i] == -1 or ranks[i] in there for i in range(n) if i not in holders)
        short = max(short, n - m - data - len(holders & cells))
    return short


def _shortage(rank: int, there: frozenset[int], parities: Sequence[HeldParity]) -> str:
    """Why *rank* cannot be rebuilt."""
    mates = [parity for parity in parities if rank in parity.ranks]
    if not mates:
        return f"no parity of rank {rank} is left"
    best = min({p.key for p in mates}, key=lambda key: (_stripes_short([p for p in mates if p.key == key], there), key))
    group = [p for p in mates if p.key == best]
    gone = [r for r in group[0].ranks if r != -1 and r not in there]
    return (
        f"the group of ranks {', '.join(str(r) for r in group[0].ranks if r != -1)} survives the loss of "
        f"{group[0].tolerance} of its {len(group[0].ranks)} members; the images of ranks {', '.join(map(str, gone))} "
        f"are lost, and the parity of {len(group[0].ranks) - len(group)} members"
    )


def known_complete(images: dict[SnapshotId, list[Held]]) -> set[SnapshotId]:
    """Snapshots that were complete on all ranks once: those whose images are all here or say so, and watermarks in
    records."""
    known = said_complete(image for copies in images.values() for image in copies)
    for id, copies in images.items():
        if any(
            {c.rank for c in copies if c.world == world} == set(range(world)) for world in {c.world for c in copies}
        ):
            known.add(id)
    return known


def said_complete(held: Iterable[Held]) -> set[SnapshotId]:
    """Snapshots of which some trainer knew that they were complete on all ranks, and protected if there are groups."""
    images = list(held)
    said = {image.id for image in images if image.complete}
    return said | {SnapshotId(i.id.generation, i.watermark, i.id.run) for i in images if i.watermark != NONE}


@dataclass(frozen=True, slots=True)
class Relied:
    """What a job that goes back to some snapshot must not lose before that one is protected anew.

    Attributes:
        id: the newest snapshot that may have been reported as protected; None if there is none.
        parities: by which it stands; at most one for each agent and lane.
    """

    id: SnapshotId | None
    parities: tuple[HeldParity, ...]


def relied_on(held: Iterable[Held], parities: Iterable[HeldParity], newest: SnapshotId) -> Relied:
    """What a job that goes back to *newest* relies on: perhaps an older one, and even if not, its groups may be others now.

    Of each group it is those parities that go with the images on their own nodes.
    """
    images = list(held)
    id = max((id for id in said_complete(images) if id <= newest), default=None)
    beside = {(image.agent, image.rank) for image in images if image.id == id}
    groups: dict[tuple[int, int], list[HeldParity]] = {}
    for parity in parities:
        if parity.id == id:
            groups.setdefault((parity.key, parity.lane), []).append(parity)
    found: dict[tuple[str, int], HeldParity] = {}
    placed = [_in_place(groups[name], beside) for name in sorted(groups)]
    for group in sorted(placed, key=lambda group: len(group[0].ranks) - len(group) if group else 0):
        for parity in group:
            found.setdefault((parity.agent, parity.lane), parity)
    return Relied(id, tuple(found.values()))


def _in_place(mates: Sequence[HeldParity], beside: Collection[tuple[str, int]]) -> list[HeldParity]:
    """Of one group's parity, as much as there is of different members on different agents, each beside its member's image.

    After ranks have moved, an agent may hold parity of two members.
    """
    by_member: dict[int, list[HeldParity]] = {}
    for parity in sorted(mates, key=lambda parity: (parity.index, parity.agent)):
        rank = parity.ranks[parity.index]
        if rank == -1 or (parity.agent, rank) in beside:
            by_member.setdefault(parity.index, []).append(parity)
    taken: dict[str, HeldParity] = {}

    def place(member: int, tried: set[str]) -> bool:
        for parity in by_member[member]:
            if parity.agent not in tried:
                tried.add(parity.agent)
                other = taken.get(parity.agent)
                if other is None or place(other.index, tried):
                    taken[parity.agent] = parity
                    return True
        return False

    for member in by_member:
        place(member, set())
    return [taken[agent] for agent in sorted(taken)]


def _loss(rejected: Sequence[Rejected], known: set[SnapshotId]) -> tuple[str | None, SnapshotId | None]:
    lost = next((r for r in rejected if r.id in known), None)
    if lost is None:
        return None, None
    return f"{lost.id} was complete and cannot be had: {lost.reason}", lost.id
