"""Writers, readers and several who prune, at one tier, in any order of their effects, any of them killed anywhere, or
all at once by a power cut.

Checked after every effect: no listing lies (what is complete has all its data); the newest complete snapshot never becomes
an older one; what is deleted is what may go; who holds a lease reads to the end. And in the end all garbage is gone.

A writer here is ``storage.writer`` with everything left out but the order of its effects; a reader likewise.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from holdfast.errors import ObjectMissing, TierError
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.documents import seal
from holdfast.storage.leases import LEASE_S, RENEW_S, buried
from holdfast.storage.names import (
    data_of,
    dooms_of,
    entries_of,
    entry_key,
    is_doom,
    lease_key,
    parse_entry,
    parse_snapshot,
    parse_tombstone,
    tombstone_key,
)
from holdfast.storage.prune import QUIET_S, Pruner
from holdfast.storage.retention import HOPES, Present, decide
from holdfast.storage.survey import survey
from holdfast.storage.tiers import EverySteps, TierSettings
from holdfast.tests.storage.imagined import ImaginedStore, Place, run, turn
from hypothesis import given, settings
from hypothesis import strategies as st

WORLD = 2
DAY_S = 86400.0
GIVEN_UP_S = 6 * 3600.0  # a writer that took so long does not commit any more
RUNS = [f"{number:032x}" for number in range(40)]


class Watch:
    """Looks at every effect."""

    def __init__(self, place: Place, keep: int, milestone_steps: int | None) -> None:
        self.place = place
        self.keep = keep
        self.milestone_steps = milestone_steps
        self.newest: SnapshotId | None = None
        self.done: set[tuple[SnapshotId, int]] = set()  # what was reported
        self.doomed: set[SnapshotId] = set()
        self.deleted: set[SnapshotId] = set()
        place.watch = self.look

    def complete(self, *, but: SnapshotId | None = None) -> list[SnapshotId]:
        """Our complete snapshots, from keys alone. The tombstone of *but* is not looked at."""
        ranks: dict[SnapshotId, set[int]] = {}
        for key in self.place.under("entries/"):
            part = parse_entry(key)
            assert part is not None
            ranks.setdefault(part[0], set()).add(part[1])
        graves = {parse_tombstone(key) for key in self.place.under("deleted/")} - {but}
        return sorted(id for id, there in ranks.items() if len(there) == WORLD and id not in graves)

    def look(self, key: str, put: bool) -> None:
        complete = self.complete()
        for id in complete:
            for rank in range(WORLD):
                for part in range(2):
                    assert chunk(id, rank, part) in self.place.objects, f"{id} is listed, and has lost data"
        newest = max(complete, default=None)
        if is_doom(key) and put:
            self.doomed.update(id for id in self.ids() if key.startswith(dooms_of(id)))
        if self.newest in self.doomed - set(complete) and not self.reported(self.newest):
            self.newest = None  # it seemed complete for a moment, to nobody who wrote it
        assert self.newest is None or (newest is not None and newest >= self.newest), "the newest was lost"
        self.newest = newest
        grave = parse_tombstone(key)
        if put and grave is not None and grave not in self.deleted:
            self.deleted.add(grave)
            self._may_go(grave)

    def ids(self) -> set[SnapshotId]:
        names = {key.split("/")[1] for key in (*self.place.under("entries/"), *self.place.under("snapshots/"))}
        return {id for name in names if (id := parse_snapshot(name)) is not None}

    def reported(self, id: SnapshotId | None) -> bool:
        return id is not None and all((id, rank) in self.done for rank in range(WORLD))

    def after_power_cut(self, persisted: SnapshotId | None) -> None:
        """What was only seen may be gone; what was reported persisted is not, or something newer is there."""
        self.newest = persisted
        self.deleted = {id for id in self.deleted if tombstone_key(id) in self.place.objects}
        self.look("", False)

    def _may_go(self, id: SnapshotId) -> None:
        complete = self.complete(but=id)
        if id in complete:
            verdicts = decide([Present(one, True) for one in complete], self.keep, self.milestone_steps)
            assert next(verdict for verdict in verdicts if verdict.id == id).goes, f"{id} should have stayed"
        elif not complete or id > complete[-1]:
            objects = [*self.place.under(data_of(id)), *self.place.under(entries_of(id))]
            quiet_s = self.place.now_s - max(self.place.objects[key][1] for key in objects)
            nobodys = not self.place.under(entries_of(id)) and quiet_s > DAY_S
            late = quiet_s > QUIET_S and sum(other > id for other in self.ids()) >= HOPES
            assert nobodys or late, f"{id} might have become the newest"


def chunk(id: SnapshotId, rank: int, part: int) -> str:
    return f"{data_of(id)}ranks/{rank:06d}/c/{part}"


async def write(store: ImaginedStore, id: SnapshotId, rank: int, done: set[tuple[SnapshotId, int]]) -> None:
    """One rank's image."""
    place, began_s = store.place, store.place.now_s
    for part in range(2):
        await store.put(chunk(id, rank, part), [b"data"], durable=False)
        await turn()
    await store.settle()
    if place.now_s - began_s > GIVEN_UP_S:
        return
    key = entry_key(id, rank, WORLD)
    await store.put(key, [seal({"job": "ours"})])
    if not await buried(store, id):
        done.add((id, rank))
        return
    await store.delete([key])


async def read(store: ImaginedStore, pick: int, reader: int) -> None:
    """Some complete snapshot, under a lease, which is given up at the end."""
    entries = await store.list("entries/")
    graves = {parse_tombstone(found.key) for found in await store.list("deleted/")}
    ranks: dict[SnapshotId, set[int]] = {}
    for found in entries:
        part = parse_entry(found.key)
        assert part is not None
        ranks.setdefault(part[0], set()).add(part[1])
    whole = sorted(id for id, there in ranks.items() if len(there) == WORLD and id not in graves)
    if not whole:
        return
    id = whole[pick % len(whole)]
    lease = lease_key(id, uuid.UUID(int=reader))
    await store.put(lease, [b""])
    renewed_s, lapse_s = store.place.now_s, 0.0
    try:
        await store.get(tombstone_key(id))
        await store.delete([lease])
        return
    except ObjectMissing:
        pass
    keys = [entry_key(id, rank, WORLD) for rank in range(WORLD)]
    keys += [chunk(id, rank, part) for rank in range(WORLD) for part in range(2)]
    for key in keys:
        await turn()
        lapse_s = max(lapse_s, store.place.now_s - renewed_s)
        if store.place.now_s - renewed_s > RENEW_S:
            await store.put(lease, [b""])
            renewed_s = store.place.now_s
        try:
            await store.get(key)
        except ObjectMissing:
            lapse_s = max(lapse_s, store.place.now_s - renewed_s)
            assert lapse_s >= LEASE_S, f"{key} was taken away from a reader"
            return
    await store.delete([lease])


@dataclass
class Actors:
    """Who is at work. Those killed are kept until the end, as a dead process runs nothing more, not even its ``finally``."""

    alive: list[Coroutine[Any, Any, object]] = field(default_factory=list)
    dead: list[Coroutine[Any, Any, object]] = field(default_factory=list)

    def step(self, index: int) -> None:
        work = self.alive[index % len(self.alive)]
        try:
            work.send(None)
        except (StopIteration, TierError):
            self.alive.remove(work)

    def kill(self, index: int) -> None:
        self.dead.append(self.alive.pop(index % len(self.alive)))

    def close(self) -> None:
        for work in (*self.alive, *self.dead):
            work.close()


class Tier:
    """A tier, and the job that uses it: runs that follow each other, each spilling what it comes to."""

    def __init__(self, keep: int, milestone_steps: int | None) -> None:
        self.place = Place()
        self.watch = Watch(self.place, keep, milestone_steps)
        self.settings = TierSettings("memory://imagined", EverySteps(1), keep, milestone_steps)
        self.actors = Actors()
        self.done = self.watch.done
        self.generation, self.step, self.runs, self.readers = 1, 0, 0, 0
        self.writers: list[Coroutine[Any, Any, object]] = []

    def store(self) -> ImaginedStore:
        return ImaginedStore(self.place)

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        self.actors.alive.append(work)

    def spill(self, ranks: Iterable[int]) -> None:
        """The next step; ranks that are not among *ranks* skip it."""
        self.step += 1
        for rank in ranks:
            work = write(self.store(), SnapshotId(self.generation, self.step, RUNS[self.runs]), rank, self.done)
            self.writers.append(work)
            self.start(work)

    def restart(self) -> None:
        """All trainers die; the next run goes on from the newest complete snapshot."""
        for work in self.writers:
            if work in self.actors.alive:
                self.actors.alive.remove(work)
                self.actors.dead.append(work)
        newest = self.watch.newest
        self.generation += 1
        self.runs += 1
        self.step = newest.step if newest is not None else 0

    def cut_power(self, seed: int) -> None:
        """Everybody dies at once, and what was not durable is lost."""
        while self.actors.alive:
            self.actors.kill(0)
        self.place.cut_power(random.Random(seed))
        ids = {id for id, _ in self.done}
        persisted = [id for id in ids if all((id, rank) in self.done for rank in range(WORLD))]
        self.watch.after_power_cut(max(persisted, default=None))
        self.restart()

    def prune(self) -> None:
        self.start(Pruner(self.store(), self.settings, "ours", clock=lambda: self.place.now_s).prune())

    def end(self) -> None:
        """Everybody dies, time passes, and some prunes: what is left is what is to be kept.

        With the last entry of a run goes what is known of whose it is, so what it leaves goes by the prune after that.
        """
        while self.actors.alive:
            self.actors.kill(0)
        for _ in range(3):
            self.place.now_s += 2 * DAY_S
            run(Pruner(self.store(), self.settings, "ours").prune())
        found = run(survey(self.store()))
        assert found is not None
        complete = self.watch.complete()
        kept = {one.id for one in decide([Present(id, True) for id in complete], self.settings.keep,
                                         self.settings.milestone_steps) if not one.goes}  # fmt: skip
        assert set(complete) == kept
        newest = max(complete, default=None)
        for id, one in found.seen.items():
            assert one.tombstone is None, f"the tombstone of {id} stays"
            assert id in kept or newest is None or id > newest, f"{id} is garbage that stays"
        assert not found.others
        assert not self.place.under("readers/")
        self.actors.close()


# What happens next; most often, somebody goes one effect further.
happenings = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 20)),
    st.tuples(st.just("burst"), st.integers(0, 2**16)),
    st.tuples(st.just("spill"), st.sampled_from([(0, 1), (0, 1), (0, 1), (0,), (1,)])),
    st.tuples(st.just("prune"), st.just(0)),
    st.tuples(st.just("read"), st.integers(0, 9)),
    st.tuples(st.just("kill"), st.integers(0, 20)),
    st.tuples(st.just("tick"), st.sampled_from([1.0, 20.0, 59.0, 90.0, 320.0, 700.0])),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("cut"), st.integers(0, 2**16)),
)


def happen(tier: Tier, what: str, how: Any) -> None:
    actors = tier.actors
    match what:
        case "step" | "burst" | "kill":
            rng = random.Random(how)
            for index in [how] if what != "burst" else [rng.randrange(20) for _ in range(rng.randrange(60))]:
                if actors.alive:
                    (actors.kill if what == "kill" else actors.step)(index)
        case "spill":
            tier.spill(how)
        case "prune":
            tier.prune()
        case "read":
            tier.readers += 1
            tier.start(read(tier.store(), how, tier.readers))
        case "tick":
            tier.place.now_s += how
        case "restart":
            tier.restart()
        case "cut":
            tier.cut_power(how)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    keep=st.integers(1, 3),
    milestone_steps=st.sampled_from([None, 3]),
    story=st.lists(happenings, min_size=5, max_size=60),
)
def test_no_order_of_events_loses_anything(
    keep: int, milestone_steps: int | None, story: list[tuple[str, Any]]
) -> None:
    tier = Tier(keep, milestone_steps)
    try:
        for what, how in story:
            happen(tier, what, how)
        tier.end()
    finally:
        tier.actors.close()


def weighted(rng: random.Random) -> tuple[str, Any]:
    """As a busy tier is: spills that mostly succeed, several prunes and readers at once."""
    what: list[tuple[int, Callable[[], tuple[str, Any]]]] = [
        (30, lambda: ("burst", rng.randrange(2**16))),
        (12, lambda: ("spill", rng.choice([(0, 1), (0, 1), (0, 1), (0, 1), (0,)]))),
        (8, lambda: ("prune", 0)),
        (8, lambda: ("read", rng.randrange(10))),
        (3, lambda: ("kill", rng.randrange(20))),
        (6, lambda: ("tick", rng.choice([1.0, 20.0, 59.0, 90.0, 320.0, 700.0]))),
        (1, lambda: ("restart", 0)),
        (3, lambda: ("cut", rng.randrange(2**16))),
    ]
    return rng.choices([make for _, make in what], [weight for weight, _ in what])[0]()


def test_busy_tiers_lose_nothing() -> None:
    deleted = 0
    for seed in range(150):
        rng = random.Random(seed)
        tier = Tier(rng.randrange(1, 4), rng.choice([None, 4]))
        try:
            for _ in range(120):
                happen(tier, *weighted(rng))
            deleted += len(tier.watch.deleted)
            tier.end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            tier.actors.close()
    assert deleted > 500
