"""Removes from a tier what ``retention`` lets go, and what nobody will ever finish. May be killed anywhere, and run by several.

One snapshot goes in this order, and whoever comes later takes it up where it was left:

0. if it is not complete: an object that dooms it, of each deleter's own. Only then are its entries looked at. A writer puts
   its entry, then looks for what dooms it; so either it gives way, or its entry is seen here. If that makes the
   snapshot complete, it stays, and what doomed it is taken back.
1. its tombstone. From here on no listing shows it, no reader begins, no writer's entry counts. It is never taken back:
   of two who prune, one would take back what the other relies on.
2. Only then are leases looked at. A reader writes its lease first, then looks for a tombstone; so either it sees the
   tombstone, or its lease is seen here. While one is alive, nothing more happens: the data goes another time.
3. its entries, then its data, then leases that were left.
4. a day later, when nothing of it is left, the tombstone. A writer that was suspended meanwhile has given up long before.

What is incomplete is garbage only once a newer snapshot is complete, or several newer ones have been begun (``retention``),
and only if nothing was written to it for a while: somebody may still be at it. How old anything is, the store's own clock
says, never ours.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from ..crashpoints import reach
from ..errors import Corrupt, ObjectMissing, TierFull
from ..snapshot.record import SnapshotId
from .budget import no_room
from .documents import seal, unseal
from .leases import LEASE_S, any_fresh, leased
from .names import (
    DELETED,
    ENTRIES,
    SNAPSHOTS,
    data_of,
    doom_key,
    dooms_of,
    entries_of,
    is_doom,
    readers_of,
    snapshot_name,
    tombstone_key,
)
from .retention import Present, Verdict, decide
from .store import Found, Store
from .survey import Seen, Survey, survey
from .tiers import TierSettings

QUIET_S: Final = 600.0
"""An incomplete snapshot to which nothing was written for so long is not being written."""

TOMBSTONE_S: Final = 86400.0
_ORPHAN_S: Final = 86400.0  # data without any entry, of a run that nobody knows
_BATCH: Final = 500  # keys deleted between two looks at the clock
_TRIES: Final = 3  # entries that are read to learn whose run it is
_CLOCK: Final = DELETED + "clock-"


def _uptime_s() -> float:
    """Goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed of one snapshot. Without *done* something is left, and *reason* ends with why."""

    id: SnapshotId
    reason: str
    objects: int = 0
    nbytes: int = 0
    done: bool = True


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was decided, and what was done about it. ``swept_bytes``: of temporary files that dead writers left."""

    verdicts: tuple[Verdict, ...] = ()
    removals: tuple[Removal, ...] = ()
    swept_bytes: int = 0


class Pruner:
    """Prunes one store. Of no use to two tasks at once; any number of processes may have one each."""

    def __init__(
        self,
        store: Store,
        settings: TierSettings,
        job: str | None = None,
        *,
        shared: bool = True,
        clock: Callable[[], float] = _uptime_s,
    ) -> None:
        """Nothing is asked of the store yet.

        Args:
            store: of the tier; stays the caller's.
            settings: what is to be kept.
            job: whose snapshots are pruned; None: all jobs', each job's by itself. Other jobs' are never touched.
            shared: whether all ranks' entries are in this store. If each node has a disk of its own, they are not: then
                ``persisted`` says what is complete.
            clock: in seconds; for deadlines only.
        """
        self._store = store
        self._settings = settings
        self._job = job
        self._shared = shared
        self._clock = clock
        self._jobs: dict[str, str] = {}  # of runs

    async def plan(self, keep: int | None = None, *, persisted: SnapshotId | None = None) -> list[Verdict]:
        """What ``prune`` would do. Changes nothing, and needs no right to write."""
        found = await survey(self._store)
        return await self._decide(found, found.newest_s, keep or self._settings.keep, persisted)

    async def prune(
        self, keep: int | None = None, *, persisted: SnapshotId | None = None, deadline_s: float = 600.0
    ) -> Pruned:
        """Remove what may go; what earlier prunes left; old tombstones, leases and temporary files.

        Args:
            keep: instead of what the settings say.
            persisted: the newest snapshot known complete on all nodes; where the store is not *shared*, without it nothing goes.
            deadline_s: after that, what is not removed yet stays for the next time.

        Raises:
            TierError: the store fails. What was begun is taken up by the next one.
        """
        until_s = self._clock() + deadline_s
        swept = await self._store.sweep(TOMBSTONE_S)
        probe = await self._probe()
        found = await survey(self._store)
        now_s = next((one.modified_s for one in found.others if one.key == probe), found.newest_s)
        await self._sweep_documents(found, probe, now_s)
        removals = []
        for one in found.seen.values():
            if one.tombstone is not None and not one.gone:
                removals.append(await self._remove(one.id, await self._reason(one.tombstone), until_s))
        verdicts = await self._decide(found, now_s, keep or self._settings.keep, persisted)
        going = [verdict for verdict in verdicts if verdict.goes]
        if going:
            # They go because newer ones are there. Those must still be there after a power cut.
            await self._store.confirm(ENTRIES)
        for verdict in sorted(going, key=lambda verdict: found.seen[verdict.id].complete):
            doom = not self._is_finished(found.seen[verdict.id])
            removals.append(await self._remove(verdict.id, verdict.reason, until_s, doom=doom))
        return Pruned(tuple(verdicts), tuple(removals), swept)

    async def discard(self, id: SnapshotId, reason: str, *, deadline_s: float = 600.0) -> Removal:
        """Remove a snapshot that its own writers have given up, without waiting until it is quiet.

        One that is complete here stays: that its image cannot be written once more is no reason to lose it.
        """
        if Seen(id, await self._store.list(entries_of(id))).complete:
            return Removal(id, f"{reason}; but it is complete", done=False)
        return await self._remove(id, reason, self._clock() + deadline_s)

    async def make_room(self, snapshot_bytes: int, *, persisted: SnapshotId | None = None) -> str | None:
        """Have room for one more snapshot; prunes as far as it takes, and as far as ``keep_min`` allows.

        Returns:
            None if it fits, else why it does not.
        """
        reason = await self._no_room(snapshot_bytes)
        for keep in range(self._settings.keep, self._settings.keep_min - 1, -1):
            if reason is None:
                return None
            await self.prune(keep, persisted=persisted)
            reason = await self._no_room(snapshot_bytes)
        return reason

    async def held_bytes(self) -> int:
        """What all snapshots in this store take, whosever they are, and whether whole or not."""
        return sum(found.nbytes for found in await self._store.list(SNAPSHOTS))

    async def _no_room(self, snapshot_bytes: int) -> str | None:
        held = await self.held_bytes() if self._settings.limit_bytes is not None else 0
        return no_room(self._settings, snapshot_bytes, await self._store.free_bytes(), held)

    async def _probe(self) -> str:
        """Put an object, for its time of modification. Where none can be put, what was put last must do."""
        key = f"{_CLOCK}{uuid.uuid4()}.json"
        try:
            await self._put_small(key, {"format": 1})
        except TierFull:
            return ""
        return key

    async def _put_small(self, key: str, document: dict[str, object]) -> None:
        """Put a document whose presence is what counts: an empty one still fits where there is no room for contents."""
        try:
            await self._store.put(key, [seal(document)])
        except TierFull:
            await self._store.put(key, [])

    async def _sweep_documents(self, found: Survey, probe: str, now_s: float) -> None:
        """Remove the probe and those that killed processes left, leases of the dead, and tombstones that have done their time."""
        keys = [probe] if probe else []
        for one in found.others:
            age_s = now_s - one.modified_s
            if (one.key.startswith(_CLOCK) and age_s > LEASE_S) or (is_doom(one.key) and age_s > TOMBSTONE_S):
                keys.append(one.key)
        for seen in found.seen.values():
            keys += [lease.key for lease in seen.leases if now_s - lease.modified_s > TOMBSTONE_S]
            if seen.tombstone is not None and seen.gone and now_s - seen.tombstone.modified_s > TOMBSTONE_S:
                keys.append(seen.tombstone.key)
        if keys:
            await self._store.delete(keys)

    async def _decide(self, found: Survey, now_s: float, keep: int, persisted: SnapshotId | None) -> list[Verdict]:
        """Verdicts on the snapshots that are this pruner's business, oldest first."""
        alive = [one for one in found.seen.values() if one.tombstone is None and (one.entries or one.has_data)]
        by_job: dict[str | None, list[Seen]] = {}
        for one in alive:
            by_job.setdefault(await self._job_of(one, alive), []).append(one)
        verdicts = []
        for job, seen in by_job.items():
            if job is None:
                verdicts += [self._nobodys(one) for one in seen if not one.entries]
            elif self._job in (None, job):
                present = [self._present(one, now_s, persisted) for one in seen]
                verdicts += decide(present, keep, self._settings.milestone_steps)
        settled = [await self._settled(verdict, found.seen[verdict.id], now_s) for verdict in verdicts]
        return sorted(settled, key=lambda verdict: verdict.id)

    def _present(self, seen: Seen, now_s: float, persisted: SnapshotId | None) -> Present:
        # What other disks hold is not known. That an older one is incomplete there is rare, and then one too many is kept.
        here = persisted is not None and seen.id <= persisted and bool(seen.entries)
        in_use = any_fresh(seen.leases, now_s)
        if self._shared:
            return Present(seen.id, seen.complete, in_use)
        # Once all ranks have said that they have it, nobody looks whether it still is here: so it must be.
        return Present(seen.id, here, in_use, elsewhere=bool(seen.entries))

    @staticmethod
    def _nobodys(seen: Seen) -> Verdict:
        return Verdict(seen.id, True, "without an entry, of a run that nobody knows")

    async def _settled(self, verdict: Verdict, seen: Seen, now_s: float) -> Verdict:
        """*verdict*, unless it says that something goes to which somebody may still be writing."""
        if not verdict.goes or (seen.entries and (seen.complete or not self._shared)):
            return verdict
        known = seen.entries or seen.id.run in self._jobs
        objects = [*seen.entries, *await self._store.list(data_of(seen.id))]
        # A store may show objects only once they are durable: where none is to be seen, there is nothing to remove either.
        if objects and now_s - max(one.modified_s for one in objects) > (QUIET_S if known else _ORPHAN_S):
            return verdict
        return Verdict(verdict.id, False, "incomplete, and perhaps still being written")

    async def _job_of(self, seen: Seen, alive: list[Seen]) -> str | None:
        """Whose snapshot it is: any entry of its run says so. None if no readable one does."""
        run = seen.id.run
        if run not in self._jobs:
            entries = [entry for one in alive if one.id.run == run for entry in one.entries]
            for entry in sorted(entries, key=lambda entry: entry.nbytes)[:_TRIES]:
                try:
                    job = unseal(await self._store.get(entry.key), entry.key).get("job")
                except (Corrupt, ObjectMissing):
                    continue  # damaged, or just pruned by somebody else
                if isinstance(job, str):
                    self._jobs[run] = job
                    break
        return self._jobs.get(run)

    async def _reason(self, tombstone: Found) -> str:
        """Why it was deleted, as the tombstone says; it is put anew, so that a day is counted from the last removal."""
        try:
            reason = unseal(await self._store.get(tombstone.key), tombstone.key).get("reason")
        except (Corrupt, ObjectMissing):
            reason = None
        return reason if isinstance(reason, str) else "deleted before"

    def _is_finished(self, seen: Seen) -> bool:
        """Whether its writers have reported it, as far as this store tells."""
        return seen.complete if self._shared else bool(seen.entries)

    async def _remove(self, id: SnapshotId, reason: str, until_s: float, *, doom: bool = False) -> Removal:
        """Remove one snapshot, in the order that this module's docstring gives."""
        removal = Removal(id, reason, done=False)
        if self._clock() > until_s:
            return replace(removal, reason=f"{reason}; it goes next time")
        try:
            if doom and not await self._doom(id):
                return replace(removal, reason=f"{reason}; but its last entry has come meanwhile")
            if await self._bury(id, reason):
                return replace(removal, reason=f"{reason}; somebody still reads it")
        except TierFull as error:
            return replace(removal, reason=f"{reason}; {error}")
        reach("prune.buried")
        for prefix in (entries_of(id), data_of(id), readers_of(id), dooms_of(id)):
            listed = await self._store.list(prefix)
            for at in range(0, len(listed), _BATCH):
                batch = listed[at : at + _BATCH]
                if self._clock() > until_s:
                    # Not later, either: one day the tombstone goes, and the name may be used again.
                    return replace(removal, reason=f"{reason}; the rest goes next time")
                await self._store.delete([one.key for one in batch])
                reach("prune.inside")
                removal = replace(
                    removal,
                    objects=removal.objects + len(batch),
                    nbytes=removal.nbytes + sum(one.nbytes for one in batch),
                )
        reach("prune.emptied")
        return replace(removal, done=True)

    async def _doom(self, id: SnapshotId) -> bool:
        """Have writers give way from here on; whether the snapshot is unfinished still, and none will finish it."""
        key = doom_key(id, uuid.uuid4())
        with suppress(TierFull):  # then no entry fits, either
            await self._put_small(key, {"format": 1, "snapshot": snapshot_name(id)})
        if not self._is_finished(Seen(id, await self._store.list(entries_of(id)))):
            return True
        await self._store.delete([key])
        return False

    async def _bury(self, id: SnapshotId, reason: str) -> bool:
        """Put the tombstone; whether the data must stay yet, as somebody reads it who began before."""
        reach("prune.before-tombstone")
        key = tombstone_key(id)
        try:
            await self._put_small(key, {"format": 1, "snapshot": snapshot_name(id), "reason": reason})
        except TierFull:
            # Not one more file may be there. Without its entries it is no snapshot any more, and they leave room; the data
            # stays until there is a tombstone, as a writer might yet add its entry.
            await self._store.delete([one.key for one in await self._store.list(entries_of(id))])
            await self._store.put(key, [])
        put_s = next((one.modified_s for one in await self._store.list(DELETED) if one.key == key), None)
        # Where somebody took the tombstone away by hand, the data is not touched either.
        return put_s is None or await leased(self._store, id, put_s)
