"""What must hold after every event, checked against what really lies in every memory.

A *promise* is the newest snapshot that any rank reported as protected, and the groups as they were when it was begun:
whatever m nodes of each are lost, it or a newer one must be restorable. A first check counts what is there and what is not;
where that does not suffice, and now and then anyway, ``recovery.plan`` itself is asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING

from holdfast.snapshot import recovery
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import Held, HeldParity, Plan, Rebuilt

from .agents import Agent, Roster, members
from .memory import Memory, Page, SlotMemory, Watch, content_of

if TYPE_CHECKING:
    from .jobs import Job
    from .trainers import Rank
    from .world import Place, World

PATTERNS = 40  # of lost nodes, checked at most after an event
ASK_EVERY = 16  # checks


@dataclass(frozen=True, slots=True, eq=False)
class Circle:
    """One group of one run: its members' memories and ranks, in order, and how many may be lost."""

    members: tuple[tuple[Memory, tuple[int, ...]], ...]
    m: int
    mask: int

    @property
    def lanes(self) -> int:
        """0 where nobody protects anybody."""
        return max(len(ranks) for _, ranks in self.members) if self.m else 0

    def deficient(self, id: SnapshotId) -> int:
        """The bits of those members that lack something of *id*."""
        bits = 0
        for memory, ranks in self.members:
            if memory.lost or any((id, rank) not in memory.view.images for rank in ranks):
                bits |= memory.bit
        for lane in range(self.lanes):
            having: dict[int, int] = {}  # who has parity, by its key
            for index, (memory, _) in enumerate(self.members):
                for key in () if memory.lost else memory.view.parities.get((lane, id, index), ()):
                    having[key] = having.get(key, 0) | memory.bit
            bits |= self.mask & ~max(having.values(), key=int.bit_count, default=0)
        return bits


@dataclass(slots=True, eq=False)
class Promise:
    """*id* was reported as protected. *patterns*: of memories that may be lost now, for memories *of*."""

    id: SnapshotId
    circles: tuple[Circle, ...]
    of: tuple[int, int] = (-1, -1)
    patterns: list[int] | None = None


class Truth:
    """Knows everything, in one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.promise: Promise | None = None
        self.circles: dict[SnapshotId, list[tuple[Circle, ...]]] = {}  # by snapshot: the groups that protected it
        self._groups: list[tuple[list[tuple[Place, tuple[int, ...]]], int]] = []
        self.begun_at: dict[SnapshotId, float] = {}
        self.best: SnapshotId | None = None  # the newest snapshot that any rank of this run knows to be complete
        self.watch = Watch()
        self.rng = random.Random(world.taste.seed)
        self.pages: dict[tuple[int, int], Page] = {}  # every record ever written, by its content and nonce
        self.checks = self.asked = 0

    # -- what happens --------------------------------------------------------------------------------------------------

    def assembled(self, roster: Roster, places: list[Place], floor: SnapshotId | None) -> None:
        """The ranks have told each other who is there."""
        by_name = {place.name: place for place in places}
        groups = members(roster.peers, roster.protect) or ((roster.peers, 0),)
        self._groups = [
            ([(by_name[peer.agent], tuple(sorted(peer.ranks))) for peer in peers], m) for peers, m in groups
        ]
        if floor is not None:
            self.circles.setdefault(floor, []).append(self.now())

    def now(self) -> tuple[Circle, ...]:
        """The groups of the running job."""
        return tuple(
            Circle(
                tuple((place.memory, ranks) for place, ranks in group), m, sum(place.memory.bit for place, _ in group)
            )
            for group, m in self._groups
        )

    def begun(self, id: SnapshotId) -> None:
        """A rank has begun to copy *id*."""
        if id not in self.begun_at:
            self.begun_at[id] = self.world.now
            self.circles[id] = [self.now()]

    def settled(self, rank: Rank) -> None:
        """A rank has ended a step."""
        job, pulse = rank.job, rank.pulse
        first = job.agreed.setdefault(rank.line.settled, pulse.agreed)
        assert first == pulse.agreed, f"after {rank.line.settled} beats: {first}, {pulse.agreed}"
        if pulse.agreed.watermark > (job.chosen.step if job.chosen else -1):
            id = rank.id(pulse.agreed.watermark)
            if self.best is None or id > self.best:
                self._complete(id)
        if pulse.known > (job.chosen.step if job.chosen else -1):
            self._reported(rank.id(pulse.known), self.circles[rank.id(pulse.known)][0])

    def _complete(self, id: SnapshotId) -> None:
        """All ranks have said that *id* is complete where they are: so it has to be, but for what was lost since."""
        self.best = id
        self.watch.changed = True
        for circle in self.circles[id][0]:
            gone = sum(memory.bit for memory, _ in circle.members if memory.lost)
            lacking = circle.deficient(id) & ~gone
            names = [memory.name for memory, _ in circle.members if memory.bit & lacking]
            assert not lacking, f"{id} is complete, they say, and {', '.join(names)} lack their part of it"

    def _reported(self, id: SnapshotId, circles: tuple[Circle, ...]) -> None:
        if self.promise is None or id > self.promise.id:
            self.world.say("%s is reported as protected", id)
            self.promise = Promise(id, circles)
            self.watch.changed = True

    def restored(self, id: SnapshotId) -> None:
        """``restore`` has returned *id* on every rank: it is protected again, by the new groups."""
        self.best = id
        circles = self.circles[id][-1] if self.circles.get(id) else self.now()
        for circle in circles:
            lacking = circle.deficient(id) & ~sum(memory.bit for memory, _ in circle.members if memory.lost)
            assert not lacking or not circle.m, f"{id} was restored, and is not protected again"
        self.promise = Promise(id, circles)
        self.watch.changed = True

    def restoring(self, job: Job) -> Plan:
        """What a starting job finds: checked before anybody acts on it."""
        found = recovery.plan(job.found, parities=job.parities)
        self._verify(found, job.memories, job.parities)
        promise = self.promise
        if promise is not None and all(_budget(circle) >= 0 for circle in promise.circles):
            self._not_older(found, promise.id, "a new run")
        else:
            self.promise = None
        self.best = min(filter(None, (self.best, found.chosen)), default=None) if self.promise is not None else None
        return found

    def applied(self, rank: Rank, id: SnapshotId) -> None:
        """A rank reads its image."""
        assert (id, rank.number) in rank.memory.view.images, f"rank {rank.number} has no image of {id}"

    # -- what may be overwritten ---------------------------------------------------------------------------------------

    def may_overwrite_slot(self, rank: Rank, slot: SlotMemory) -> None:
        """Not before something newer is protected everywhere."""
        page = slot.sealed
        if page is not None and self.best is not None and not rank.memory.lost:
            assert page.id < self.best, f"rank {rank.number} overwrites {page.id}, and nothing newer is protected"

    def may_overwrite_cell(self, agent: Agent, lane: int, cell: int) -> None:
        """Not before something newer is protected everywhere; but of the same snapshot there may be parity of two groupings."""
        parity = agent.memory.cells[lane, cell]
        if parity is None or self.best is None or parity.id != self.best:
            return
        others = [
            p for (its, index), p in agent.memory.cells.items() if its == lane and index != cell and p is not None
        ]
        twin = any(other.id == parity.id for other in others)
        assert twin, f"{agent.name} overwrites its parity of {parity.id}, and nothing newer is protected"

    # -- checks --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """After an event that changed what lies in memory, or what was said of it."""
        self.watch.changed = False
        self.checks += 1
        for memory in self.watch.touched:
            if not memory.lost:
                memory.view  # noqa: B018 - asserts that all is exact
        self.watch.touched.clear()
        promise = self.promise
        patterns = self._patterns(promise) if promise is not None else [0]
        if promise is not None and patterns:
            candidates = self._candidates(promise.id)
            for pattern in patterns:
                if not _suffices(candidates, pattern):
                    self._ask(pattern, promise.id)
        if self.checks % ASK_EVERY == 0:
            if promise is not None and patterns:
                self._ask(self.rng.choice(patterns), promise.id)
            self._ask(self.rng.getrandbits(16), None)

    def _patterns(self, promise: Promise) -> list[int]:
        """Which memories may be lost together; none if too many are lost already."""
        state = (sum(memory.bit for memory in self.world.memories if memory.lost), len(self.world.memories))
        if promise.patterns is not None and promise.of == state:
            return promise.patterns
        promise.of = state
        old = sum(circle.mask for circle in promise.circles)
        newcomers = [memory.bit for memory in self.world.memories if not memory.lost and not memory.bit & old]
        choices = []
        for circle in promise.circles:
            budget = _budget(circle)
            alive = [memory.bit for memory, _ in circle.members if not memory.lost] + newcomers
            choices.append([sum(c) for c in combinations(alive, min(budget, len(alive)))] if budget >= 0 else [])
        found = {0, *(_union(parts) for parts in product(*choices))} if all(choices) else set()
        promise.patterns = sorted(found)
        if len(found) > PATTERNS:
            promise.patterns = self.rng.sample(promise.patterns, PATTERNS)
        return promise.patterns

    def _candidates(self, oldest: SnapshotId) -> list[tuple[int, list[tuple[int, int, int]]]]:
        """For each way in which a snapshot not older than that is protected: the memories that say it was complete, and of each
        group its memories, those that lack something, and how many may."""
        found = []
        for id in sorted((id for id in self.circles if id >= oldest), reverse=True):
            known = sum(memory.bit for memory in self.world.memories if not memory.lost and id in memory.view.known)
            if known:
                found += [(known, [(c.mask, c.deficient(id), c.m) for c in circles]) for circles in self.circles[id]]
        return found

    def _ask(self, lost: int, promised: SnapshotId | None) -> None:
        """Plan a restore from the memories that are not in *lost*."""
        self.asked += 1
        left = [memory for memory in self.world.memories if not memory.lost and not memory.bit & lost]
        parities = [parity for memory in left for parity in memory.held_parities()]
        found = recovery.plan([held for memory in left for held in memory.held()], parities=parities)
        self._verify(found, left, parities)
        if promised is not None:
            names = [memory.name for memory in self.world.memories if memory.bit & lost and not memory.lost]
            self._not_older(found, promised, f"the loss of {', '.join(names) or 'nothing'}")

    @staticmethod
    def _not_older(found: Plan, promised: SnapshotId, after: str) -> None:
        good = found.chosen is not None and found.chosen >= promised
        assert good, f"{promised} was reported as protected, and after {after}:\n{found.explain()}"

    def _verify(self, found: Plan, memories: list[Memory], parities: list[HeldParity]) -> None:
        """Every image that is promised can be had, and is exact."""
        if found.chosen is None:
            return
        for rank, source in enumerate(found.sources):
            assert source.rank == rank
            if isinstance(source, Rebuilt):
                page = self._rebuilt(found.chosen, rank, source.key, memories)
                assert page is not None, f"{found.chosen} of rank {rank} cannot be rebuilt:\n{found.explain()}"
                assert page.content == content_of(found.chosen, rank), (
                    f"{found.chosen} of rank {rank} would come back torn"
                )
            else:
                assert isinstance(source, Held)
                assert source.id == found.chosen

    def obtain(self, id: SnapshotId, rank: int, memories: list[Memory]) -> Page | None:
        """An image, as ``Rebuilder`` has it: fetched, else rebuilt."""
        for memory in memories:
            slot = memory.image(rank, id) if (id, rank) in memory.view.images else None
            if slot is not None:
                return slot.sealed
        keys = {p.key for memory in memories for p in memory.cells.values() if p is not None and p.id == id}
        for key in sorted(keys):
            page = self._rebuilt(id, rank, key, memories)
            if page is not None:
                return page
        return None

    @staticmethod
    def _rebuilt(id: SnapshotId, rank: int, key: int, memories: list[Memory]) -> Page | None:
        """What its group would make of that image, with what lies in these memories; None if that is too little."""
        cells = [
            p for memory in memories for p in memory.cells.values() if p is not None and (p.id, p.key) == (id, key)
        ]
        cells = [cell for cell in cells if rank in cell.ranks]
        if not cells:
            return None
        table = cells[0]
        n, m = len(table.ranks), table.tolerance
        images = {
            i
            for i, page in enumerate(table.pages)
            if page is None or any(memory.view.images.get((id, page.rank)) == page.content for memory in memories)
        }
        good = {cell.index for cell in cells if cell.pages == table.pages}
        for stripe in range(n):
            holders = {(stripe + row) % n for row in range(m)}
            if len(images - holders) + len(good & holders) < n - m:
                return None
        return table.pages[table.ranks.index(rank)]


def _budget(circle: Circle) -> int:
    """How many more may be lost of it."""
    return circle.m - sum(memory.lost for memory, _ in circle.members)


def _union(bits: tuple[int, ...]) -> int:
    found = 0
    for some in bits:
        found |= some
    return found


def _suffices(candidates: list[tuple[int, list[tuple[int, int, int]]]], lost: int) -> bool:
    """Whether one of them survives that loss, by counting."""
    for known, circles in candidates:
        if known & ~lost:
            for mask, deficient, m in circles:
                if ((deficient | lost) & mask).bit_count() > m:
                    break
            else:
                return True
    return False
