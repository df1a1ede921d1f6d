"""Pruning a tier: what goes, what stays, in which order, and what a death at any point leaves."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from holdfast.errors import TierFull, TierUnreachable
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.documents import seal, unseal
from holdfast.storage.leases import LEASE_S, buried
from holdfast.storage.names import (
    data_of,
    entries_of,
    entry_key,
    lease_key,
    readers_of,
    tombstone_key,
)
from holdfast.storage.prune import QUIET_S, TOMBSTONE_S, Pruned, Pruner
from holdfast.storage.store import Buffer, open_store
from holdfast.storage.survey import survey
from holdfast.storage.tiers import EverySteps, TierSettings
from holdfast.tests.storage.imagined import ImaginedStore, Place, run

RUN, OTHER_RUN = "a" * 32, "b" * 32
WORLD = 2
DAY_S = 86400.0


def at(step: int, run: str = RUN, generation: int = 1) -> SnapshotId:
    return SnapshotId(generation, step, run)


def settings(keep: int = 2, **more: Any) -> TierSettings:
    return TierSettings("memory://imagined", EverySteps(1), keep, **more)


def spill(place: Place, id: SnapshotId, ranks: range = range(WORLD), *, job: str = "ours", nbytes: int = 100) -> None:
    """A snapshot; with fewer *ranks*, one that nobody finished: the data of all is there, the others' entries are not."""
    for rank in range(WORLD):
        place.put(f"{data_of(id)}ranks/{rank:06d}/values/c/0", bytes(nbytes))
        if rank in ranks:
            place.put(entry_key(id, rank, WORLD), seal({"job": job, "layout": "x" * 300}))


def prune(place: Place, keep: int = 2, *, shared: bool = True, persisted: SnapshotId | None = None) -> Pruned:
    pruned = run(Pruner(ImaginedStore(place), settings(keep), "ours", shared=shared).prune(persisted=persisted))
    assert pruned is not None
    return pruned


def complete(place: Place) -> list[SnapshotId]:
    seen = run(survey(ImaginedStore(place)))
    assert seen is not None
    return [one.id for one in seen.seen.values() if one.complete and one.tombstone is None]


def left(place: Place, id: SnapshotId) -> list[str]:
    return place.under(data_of(id)) + place.under(entries_of(id)) + place.under(readers_of(id))


@pytest.fixture
def place() -> Place:
    return Place()


def test_the_newest_stay_and_the_others_go(place: Place) -> None:
    for step in (10, 20, 30, 40):
        spill(place, at(step))
    pruned = prune(place)
    assert complete(place) == [at(30), at(40)]
    assert [(one.id, one.objects, one.nbytes > 200, one.done) for one in pruned.removals] == [
        (at(10), 4, True, True),
        (at(20), 4, True, True),
    ]
    assert not left(place, at(10))
    document = unseal(place.objects[tombstone_key(at(10))][0], "")
    assert document == {
        "format": 1,
        "snapshot": "0000000001-0000000000000010-" + RUN,
        "reason": "older than the newest 2",
    }
    assert place.swept == [TOMBSTONE_S]
    assert prune(place).removals == ()


def test_what_is_only_seen_is_made_durable_before_anything_goes_because_of_it(place: Place) -> None:
    spill(place, at(10))
    spill(place, at(20))
    seen = entry_key(at(20), 1, WORLD)
    place.pending[seen] = None

    def watch(key: str, put: bool) -> None:
        assert seen not in place.pending or not key.endswith(RUN + ".json"), "a power cut would leave nothing"

    place.watch = watch
    assert len(prune(place, keep=1).removals) == 1


def test_a_plan_changes_nothing(place: Place) -> None:
    for step in (10, 20, 30):
        spill(place, at(step))
    before = dict(place.objects)
    verdicts = run(Pruner(ImaginedStore(place), settings(), "ours").plan())
    assert verdicts is not None
    assert [verdict.goes for verdict in verdicts] == [True, False, False]
    assert place.objects == before
    assert not place.swept


def test_tombstones_go_after_a_day(place: Place) -> None:
    for step in (10, 20, 30):
        spill(place, at(step))
    prune(place)
    place.now_s += DAY_S - 1
    prune(place)
    assert tombstone_key(at(10)) in place.objects
    place.now_s += 2
    prune(place)
    assert not place.under("deleted/")


def test_what_is_being_written_stays_until_it_is_quiet(place: Place) -> None:
    spill(place, at(10), range(1))
    spill(place, at(20))
    verdict = prune(place).verdicts[0]
    assert (verdict.goes, verdict.reason) == (False, "incomplete, and perhaps still being written")
    place.now_s += QUIET_S + 1
    assert prune(place).removals[0].reason == "incomplete, and a newer one is complete"
    assert not left(place, at(10))


def test_what_may_yet_become_complete_stays(place: Place) -> None:
    spill(place, at(10))
    spill(place, at(20), range(1))
    place.now_s += 30 * DAY_S
    assert not prune(place).removals
    assert left(place, at(20))


def test_data_that_cannot_be_seen_yet_is_no_garbage(place: Place) -> None:
    """A file store shows objects when they are durable; the folder is there before."""

    class Hides(ImaginedStore):
        async def children(self, prefix: str) -> list[str]:
            return sorted([*await super().children(prefix), f"{1:010d}-{10:016d}-{RUN}"])

    spill(place, at(20))
    place.now_s += 30 * DAY_S
    pruned = run(Pruner(Hides(place), settings(), "ours").prune())
    assert pruned is not None
    assert not pruned.removals


def test_leftovers_of_a_known_run_go_soon_and_of_an_unknown_one_after_a_day(place: Place) -> None:
    spill(place, at(10), range(0))
    spill(place, at(15, OTHER_RUN), range(0))
    spill(place, at(20))
    place.now_s += QUIET_S + 1
    assert [one.id for one in prune(place).removals] == [at(10)]
    place.now_s += DAY_S
    assert [one.reason for one in prune(place).removals] == ["without an entry, of a run that nobody knows"]


def test_other_jobs_are_not_touched(place: Place) -> None:
    for step in (10, 20, 30):
        spill(place, at(step))
        spill(place, at(step, OTHER_RUN, 7), job="theirs")
    spill(place, at(5, OTHER_RUN, 7), range(1), job="theirs")
    theirs = {key for key in place.objects if OTHER_RUN in key}
    place.now_s += 30 * DAY_S
    prune(place, keep=1)
    assert {key for key in place.objects if OTHER_RUN in key} == theirs
    assert [id for id in complete(place) if id.run == RUN] == [at(30)]


def test_without_a_job_each_job_is_pruned_by_itself(place: Place) -> None:
    for step in (10, 20, 30):
        spill(place, at(step))
        spill(place, at(step, OTHER_RUN, 7), job="theirs")
    run(Pruner(ImaginedStore(place), settings(keep=1)).prune())
    assert complete(place) == [at(30), at(30, OTHER_RUN, 7)]


def test_a_damaged_entry_says_not_whose_it_is(place: Place) -> None:
    """The run's other entries do; where none can be read, nothing of that run is touched."""
    for step in (10, 20, 30):
        spill(place, at(step))
    place.put(entry_key(at(10), 0, WORLD), b"}{")
    prune(place)
    assert complete(place) == [at(20), at(30)]
    for step in (40, 50, 60):
        spill(place, at(step, OTHER_RUN, 2))
        for rank in range(WORLD):
            place.put(entry_key(at(step, OTHER_RUN, 2), rank, WORLD), b"}{")
    place.now_s += 2 * DAY_S
    assert not prune(place).removals


def test_foreign_objects_stay(place: Place) -> None:
    foreign = ["README", "snapshots/mine/x", "entries/0000000001-x/y", "deleted/notes.txt", "snapshots/../x", "ENTRIES"]
    for key in foreign:
        place.put(key, b"x")
    for step in (10, 20, 30):
        spill(place, at(step))
    place.now_s += 2 * DAY_S
    prune(place)
    assert set(foreign) <= set(place.objects)


def test_what_is_read_stays(place: Place) -> None:
    for step in (10, 20, 30, 40):
        spill(place, at(step))
    lease = lease_key(at(10), uuid.UUID(int=1))
    place.put(lease, b"")
    assert prune(place).verdicts[0].reason == "somebody reads it"
    assert complete(place) == [at(10), at(30), at(40)]
    place.now_s += LEASE_S + 1
    prune(place)
    assert not left(place, at(10))


def test_a_lease_from_the_future_counts(place: Place) -> None:
    """The store's clock went back."""
    for step in (10, 20, 30):
        spill(place, at(step))
    place.now_s += 1e6
    place.put(lease_key(at(10), uuid.UUID(int=1)), b"")
    place.now_s -= 1e6
    assert not prune(place).removals


def test_who_began_to_read_before_the_tombstone_reads_on(place: Place) -> None:
    """The lease comes between the listing and the tombstone: the snapshot is hidden, and its data stays until it is read."""
    for step in (10, 20, 30):
        spill(place, at(step))

    class Reads(ImaginedStore):
        async def put(self, key: str, parts: object, *, durable: bool = True) -> None:
            if key == tombstone_key(at(10)) and not place.under("readers/"):
                place.put(lease_key(at(10), uuid.UUID(int=1)), b"")
            await super().put(key, parts, durable=durable)  # type: ignore[arg-type]

    pruned = run(Pruner(Reads(place), settings(), "ours").prune())
    assert pruned is not None
    assert [(one.done, one.reason) for one in pruned.removals] == [
        (False, "older than the newest 2; somebody still reads it")
    ]
    assert len(left(place, at(10))) == 5
    assert complete(place) == [at(20), at(30)]
    place.delete(lease_key(at(10), uuid.UUID(int=1)))
    (removal,) = prune(place).removals
    assert (removal.done, removal.reason) == (True, "older than the newest 2")
    assert not left(place, at(10))


def test_leases_of_the_dead_go(place: Place) -> None:
    spill(place, at(10))
    place.put(lease_key(at(10), uuid.UUID(int=1)), b"")
    place.now_s += DAY_S + 1
    prune(place)
    assert not place.under("readers/")


def test_a_node_with_a_disk_of_its_own(place: Place) -> None:
    """It holds some ranks' entries only; what is complete, the job says."""
    for step in (10, 20, 30, 40, 50):
        spill(place, at(step), range(1))
    place.now_s += 2 * DAY_S
    assert not prune(place, shared=False).removals
    prune(place, shared=False, persisted=at(40))
    assert [id for id in (at(10), at(20), at(30), at(40), at(50)) if left(place, id)] == [at(30), at(40), at(50)]


def test_discarding_does_not_ask(place: Place) -> None:
    spill(place, at(10), range(1))
    removal = run(Pruner(ImaginedStore(place), settings(), "ours").discard(at(10), "the disk is full"))
    assert removal is not None
    assert removal.done
    assert not left(place, at(10))


def test_what_is_complete_is_not_discarded(place: Place) -> None:
    spill(place, at(10))
    removal = run(Pruner(ImaginedStore(place), settings(), "ours").discard(at(10), "the disk is full"))
    assert removal is not None
    assert (removal.done, removal.reason) == (False, "the disk is full; but it is complete")
    assert complete(place) == [at(10)]


def test_after_its_deadline_it_begins_nothing(place: Place) -> None:
    for step in range(10, 60, 10):
        spill(place, at(step))
    ticks = iter(range(1000))
    pruner = Pruner(ImaginedStore(place), settings(), "ours", clock=lambda: float(next(ticks)))
    pruned = run(pruner.prune(deadline_s=5))
    assert pruned is not None
    assert [one.done for one in pruned.removals] == [True, False, False]
    assert pruned.removals[1].reason == "older than the newest 2; the rest goes next time"
    assert pruned.removals[2].reason == "older than the newest 2; it goes next time"
    assert prune(place).removals[0].done
    assert complete(place) == [at(40), at(50)]


def test_no_room_for_more_than_an_empty_tombstone(place: Place) -> None:
    spill(place, at(5), range(0))
    for step in (10, 20, 30):
        spill(place, at(step))
    place.now_s += QUIET_S + 1
    place.room = place.used()
    assert [one.done for one in prune(place).removals] == [True, True]
    assert complete(place) == [at(20), at(30)]
    assert place.objects[tombstone_key(at(5))][0] == b""


class NoMoreFiles(ImaginedStore):
    """Of which one fits only where another went."""

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        if key not in self.place.objects and len(self.place.objects) >= self.files:
            raise TierFull(f"no room for {key}")
        await super().put(key, parts, durable=durable)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.files = len(place.objects)


def test_no_room_for_any_file(place: Place) -> None:
    """Entries make room for a tombstone: what has lost them is no snapshot any more."""
    for step in (10, 20, 30):
        spill(place, at(step))
    pruned = run(Pruner(NoMoreFiles(place), settings(), "ours").prune())
    assert pruned is not None
    assert [one.done for one in pruned.removals] == [True]
    assert complete(place) == [at(20), at(30)]


def test_no_room_for_any_file_and_no_entries(place: Place) -> None:
    """Without a tombstone no data is removed: who still writes it could make it count."""
    spill(place, at(10), range(0))
    removal = run(Pruner(NoMoreFiles(place), settings(), "ours").discard(at(10), "given up"))
    assert removal is not None
    assert not removal.done
    assert removal.reason.startswith("given up; no room for deleted/")
    assert len(left(place, at(10))) == 2


def test_making_room_takes_as_few_as_it_can(place: Place) -> None:
    for step in (10, 20, 30, 40):
        spill(place, at(step), nbytes=4 << 20)
    pruner = Pruner(ImaginedStore(place), settings(keep=4, keep_min=2), "ours")
    place.room = place.used() + (1 << 20)
    assert run(pruner.make_room(6 << 20)) is None
    assert complete(place) == [at(20), at(30), at(40)]
    reason = run(pruner.make_room(30 << 20))
    assert reason is not None
    assert reason.startswith("tier memory://imagined has ")
    assert complete(place) == [at(30), at(40)]


def test_a_limit_counts_all_that_is_held(place: Place) -> None:
    for step in (10, 20, 30):
        spill(place, at(step), nbytes=4 << 20)
    pruner = Pruner(ImaginedStore(place), settings(keep=3, limit_bytes=28 << 20), "ours")
    assert run(pruner.held_bytes()) == 24 << 20
    assert run(pruner.make_room(1 << 20)) is None
    assert len(complete(place)) == 3
    assert run(pruner.make_room(8 << 20)) is None
    assert complete(place) == [at(20), at(30)]


def test_a_tier_full_of_what_nobody_finished_has_room_again(place: Place) -> None:
    spill(place, at(10))
    for step in range(20, 30):
        spill(place, at(step), range(1))
    place.now_s += QUIET_S + 1
    spill(place, at(30), range(1))
    limited = settings(limit_bytes=(1 << 20) + 1_000)
    assert run(Pruner(ImaginedStore(place), limited, "ours").make_room(200)) is None
    assert [step for step in range(10, 31) if left(place, at(step))] == [10, 29, 30]


def test_what_is_late_but_still_being_written_stays(place: Place) -> None:
    spill(place, at(10))
    for step in (20, 30, 40):
        spill(place, at(step), range(1))
    assert not prune(place).removals, "written to a moment ago"
    place.now_s += QUIET_S - 1
    place.put(f"{data_of(at(20))}ranks/000001/values/c/0", bytes(100))
    place.now_s += 2
    assert not prune(place).removals
    place.now_s += QUIET_S
    assert [removal.id for removal in prune(place).removals] == [at(20)]


@pytest.mark.parametrize("pruners", [1, 2])
def test_an_entry_that_comes_at_the_last_moment_counts_or_is_given_up(pruners: int) -> None:
    """However the last rank's commit falls between the effects of those who prune, what was reported is there."""

    async def commit(store: ImaginedStore) -> bool:
        await store.put(entry_key(at(20), 1, WORLD), [seal({"job": "ours"})])
        if not await buried(store, at(20)):
            return True
        await store.delete([entry_key(at(20), 1, WORLD)])
        return False

    outcomes = set()
    for seed in range(1000):
        place, rng = Place(), random.Random(seed)
        spill(place, at(10))
        for step in (20, 30, 40):
            spill(place, at(step), range(1))
        place.now_s += QUIET_S + 1
        work = [Pruner(ImaginedStore(place), settings(), "ours").prune() for _ in range(pruners)]
        # Together for a while, then the commit, at any pace.
        for _ in range(rng.randrange(70)):
            _step(rng.choice(work))
        late = commit(ImaginedStore(place))
        reported = None
        while reported is None:
            _step(rng.choice(work))
            if rng.random() < 0.3 and (end := _step(late)) is not None:
                reported = end.value
        for one in work:
            while _step(one) is None:
                pass
        assert not reported or at(20) in complete(place)
        outcomes.add((reported, bool(left(place, at(20)))))
    assert outcomes >= {(True, True), (False, False)}


def _step(work: Coroutine[Any, Any, object]) -> StopIteration | None:
    """One effect; how it ended, if it has."""
    try:
        work.send(None)
    except StopIteration as end:
        return end
    except RuntimeError:  # it had ended before
        return StopIteration()
    return None


def death(place: Place, effects: int) -> bool:
    """Prune, and die before one more effect than *effects*; whether it came to its end before."""
    return run(Pruner(ImaginedStore(place), settings(), "ours").prune(), effects=effects) is not None


def test_a_death_before_any_effect_leaves_what_the_next_one_finishes() -> None:
    effects, ended = 0, False
    while not ended:
        place = Place()
        for step in (10, 20, 30, 40):
            spill(place, at(step))
        spill(place, at(5), range(1))
        place.now_s += QUIET_S + 1
        ended = death(place, effects)
        assert complete(place)[-2:] == [at(30), at(40)]
        for id in complete(place):
            assert len(left(place, id)) == 4, f"after {effects} effects a listing lies"
        prune(place)
        assert complete(place) == [at(30), at(40)]
        assert not any(left(place, at(step)) for step in (5, 10, 20))
        place.now_s += DAY_S + 1
        prune(place)
        assert len(place.objects) == 8, sorted(place.objects)
        effects += 1
    assert effects > 40


def test_a_store_that_fails_is_said_so(place: Place) -> None:
    class Fails(ImaginedStore):
        async def delete(self, keys: object) -> None:
            raise TierUnreachable("gone")

    for step in (10, 20, 30):
        spill(place, at(step))
    with pytest.raises(TierUnreachable):
        run(Pruner(Fails(place), settings(), "ours").prune())
    prune(place)
    assert complete(place) == [at(20), at(30)]


KILLED = """
    import asyncio, sys
    from holdfast.storage.prune import Pruner
    from holdfast.storage.store import open_store
    from holdfast.storage.tiers import EverySteps, TierSettings

    async def main() -> None:
        store = open_store(sys.argv[1])
        await Pruner(store, TierSettings("file:///x", EverySteps(1), 2), "ours").prune()
        await store.close()

    asyncio.run(main())
"""


async def _spill_to(url: str) -> None:
    place = Place()
    for step in (10, 20, 30, 40):
        spill(place, at(step))
    store = open_store(url)
    for key, (data, _) in place.objects.items():
        await store.put(key, [data])
    await store.close()


async def _look(url: str) -> dict[SnapshotId, tuple[bool, int]]:
    """Of each snapshot: whether it is listed as complete, and how many objects are left."""
    store = open_store(url)
    seen = (await survey(store)).seen
    found = {}
    for id, one in seen.items():
        objects = [*await store.list(data_of(id)), *one.entries]
        found[id] = (one.complete and one.tombstone is None, len(objects))
    await store.close()
    return found


def killed_and_finished(url: str, place: str) -> None:
    asyncio.run(_spill_to(url))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), url]
    dead = subprocess.run(command, env={**os.environ, "HOLDFAST_CRASH": place}, timeout=120, check=False)
    assert dead.returncode == -signal.SIGKILL
    found = asyncio.run(_look(url))
    assert all(objects == 4 for whole, objects in found.values() if whole)
    assert found[at(30)][0]
    assert found[at(40)][0]
    subprocess.run(command, timeout=120, check=True)
    found = asyncio.run(_look(url))
    assert {id for id, (whole, _) in found.items() if whole} == {at(30), at(40)}
    assert all(objects == 0 for whole, objects in found.values() if not whole)


@pytest.mark.parametrize(
    "place", ["prune.before-tombstone=1", "prune.buried=1", "prune.inside=1", "prune.inside=2", "prune.emptied=1",
              "prune.before-tombstone=2", "prune.buried=2", "prune.emptied=2"],
)  # fmt: skip
def test_killed_on_a_real_disk(tmp_path: Path, place: str) -> None:
    killed_and_finished(tmp_path.as_uri(), place)


@pytest.mark.parametrize("place", ["prune.buried=1", "prune.inside=1", "prune.emptied=2"])
def test_killed_at_a_real_object_store(s3: str, place: str) -> None:
    killed_and_finished(s3, place)
