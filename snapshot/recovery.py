"""Which snapshot comes back, and from where: the restore plan. Pure, and the same on every rank.

The plan explains itself: for every image, where it comes from; for every newer snapshot that is passed over, why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .beat import NONE
from .record import SnapshotId


@dataclass(frozen=True, slots=True)
class Held:
    """One sealed image that some agent holds: of which snapshot and rank, and the slot where it lies."""

    id: SnapshotId
    rank: int
    world: int
    watermark: int
    agent: str
    path: str
    image_bytes: int


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
        sources: one image per rank, in rank order; empty if there is no choice.
        rejected: every snapshot newer than the chosen one, newest first.
        loss: why going back to *chosen* (or, without one, starting afresh) gives up a snapshot that was complete once.
            None in the ordinary case: what is passed over never was complete.
    """

    chosen: SnapshotId | None
    sources: tuple[Held, ...]
    rejected: tuple[Rejected, ...]
    loss: str | None

    def explain(self) -> str:
        """The plan in words, one line per fact."""
        lines = [f"passed over {r.id}: {r.reason}" for r in self.rejected]
        if self.chosen is None:
            lines.append("nothing to restore")
        else:
            lines.append(f"restore {self.chosen} (generation {self.chosen.generation})")
            lines += [f"  rank {h.rank}: {h.path} of agent {h.agent}, {h.image_bytes} bytes" for h in self.sources]
        if self.loss:
            lines.append(self.loss)
        return "\n".join(lines)


def plan(held: Iterable[Held], world: int, damaged: Iterable[tuple[SnapshotId, int]] = ()) -> Plan:
    """Choose the newest snapshot all of whose *world* images are held.

    Args:
        held: every sealed image that any agent reports; order and repetitions do not matter.
        world: the number of ranks that want their state back.
        damaged: (snapshot, rank) pairs already found not to match their checksums; they count as not held.
    """
    bad = frozenset(damaged)
    images: dict[SnapshotId, list[Held]] = {}
    for image in held:
        images.setdefault(image.id, []).append(image)
    rejected: list[Rejected] = []
    known = _known_complete(images)
    for id in sorted(images.keys() | known, reverse=True):
        sources, reason = _sources(images.get(id, []), world, bad)
        if reason is None:
            return Plan(id, sources, tuple(rejected), _loss(rejected, known))
        rejected.append(Rejected(id, reason))
    return Plan(None, (), tuple(rejected), _loss(rejected, known))


def _sources(
    images: Sequence[Held], world: int, bad: frozenset[tuple[SnapshotId, int]]
) -> tuple[tuple[Held, ...], str | None]:
    """One image per rank, or why that cannot be."""
    if not images:
        return (), "known to have been complete, but no image of it is left"
    worlds = sorted({image.world for image in images})
    if worlds != [world]:
        return (), f"taken by {' or '.join(map(str, worlds))} ranks, and this job has {world}"
    by_rank: dict[int, Held] = {}
    spoiled: set[int] = set()
    for image in sorted(images, key=lambda image: (image.agent, image.path)):
        if (image.id, image.rank) in bad:
            spoiled.add(image.rank)
        else:
            by_rank.setdefault(image.rank, image)
    missing = [rank for rank in range(world) if rank not in by_rank]
    if missing:
        words = [f"rank {rank} {'damaged' if rank in spoiled else 'missing'}" for rank in missing[:8]]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return (), f"{len(missing)} of {world} images cannot be had: {', '.join(words)}{more}"
    return tuple(by_rank[rank] for rank in range(world)), None


def _known_complete(images: dict[SnapshotId, list[Held]]) -> set[SnapshotId]:
    """Snapshots that were complete on all ranks once: those whose images are all here, and watermarks in records."""
    known: set[SnapshotId] = set()
    for id, copies in images.items():
        known.update(SnapshotId(id.generation, c.watermark, id.run) for c in copies if c.watermark != NONE)
        if any(
            {c.rank for c in copies if c.world == world} == set(range(world)) for world in {c.world for c in copies}
        ):
            known.add(id)
    return known


def _loss(rejected: Sequence[Rejected], known: set[SnapshotId]) -> str | None:
    lost = [r for r in rejected if r.id in known]
    return f"{lost[0].id} was complete and cannot be had: {lost[0].reason}" if lost else None
