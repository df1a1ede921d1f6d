"""Writes images to tiers: from the slot to the nearest, and from there to the next. And keeps tiers tidy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..crashpoints import reach
from ..errors import AgentError, Corrupt, HoldfastError, Remedy, SnapshotSkipped, SnapshotUnknown, TierFull
from ..snapshot.layout import Layout
from ..snapshot.record import Record, SnapshotId
from ..storage.inflight import Room
from ..storage.names import SNAPSHOTS, data_of, entries_of, entry_key, parse_snapshot
from ..storage.tiers import TierSettings
from . import wire_pb2 as wire
from .arenas import Arenas
from .client import error_text, wire_id
from .tasks import ended, to_the_end
from .tiers import Tier, Tiers

if TYPE_CHECKING:
    from ..storage.prune import Pruner
    from ..storage.store import Store

_log = logging.getLogger(__name__)
_PATIENCE_S: Final = (120.0, 1800.0)  # for the nearest tier, which holds a slot, and for the others
_PAUSE_S: Final = (0.5, 30.0)  # between tries: the first, and the longest
_COMMIT_WITHIN_S: Final = 6 * 3600.0
_REMEMBERED: Final = 4  # answers for each rank
_WRITING_BYTES: Final = 128 << 20  # of all images that are written at one time; ``Tiers.memory`` is as much

Tell = Callable[[wire.FromAgent], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Job:
    """One rank's image on its way to tiers. ``tell`` is how its trainer is reached now."""

    rank: int
    world: int
    id: SnapshotId
    tiers: list[Tier]
    tell: Tell
    answers: list[wire.FromAgent] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        """Whether the trainer was told of every tier."""
        return len(self.answers) >= len(self.tiers)

    @property
    def failed(self) -> bool:
        """Whether some tier could not be written."""
        return any(answer.spilled.error for answer in self.answers)


class Spiller:
    """One agent's part in spilling. All methods run on the event loop; heavy work goes to threads."""

    def __init__(self, name: str, job: str, arenas: Arenas) -> None:
        self.tiers = Tiers(name, job, arenas)
        self._job = job
        self._arenas = arenas
        self._jobs: dict[tuple[int, SnapshotId], _Job] = {}
        self._running: dict[asyncio.Task[None], _Job] = {}
        self._marking: asyncio.Task[None] | None = None
        self._layouts: dict[int, tuple[int, Layout]] = {}  # by rank: the last one, and its checksum
        self._room = Room(_WRITING_BYTES)

    @property
    def settings(self) -> Sequence[TierSettings]:
        """Of the tiers, nearest first."""
        return [tier.settings for tier in self.tiers.all]

    def status(self) -> list[wire.TierStatus]:
        """For ``holdfast status``."""
        return [tier.status for tier in self.tiers.all]

    @property
    def busy(self) -> bool:
        """Whether images are being written: the agent does not end for idleness meanwhile."""
        return bool(self._running)

    async def close(self) -> None:
        """Give up what is under way. A spill that was cut short leaves no entry, so nothing that counts."""
        tasks: list[asyncio.Task[Any]] = list(self._running)
        if self._marking is not None:
            tasks.append(self._marking)
        for task in tasks:
            task.cancel()
        await ended(tasks)
        await self.tiers.close()

    # -- writing -----------------------------------------------------------------------------------------------------

    def spill(self, rank: int, world: int, id: SnapshotId, tiers: int, tell: Tell) -> None:
        """Write that image to the first *tiers* tiers. Asked again, it says again what it has said."""
        wanted, known = self.tiers.all[:tiers], self._jobs.get((rank, id))
        if known is not None and known.tiers[:tiers] == wanted and self._stands(known):
            known.tell = tell
            for answer in known.answers:
                self._spawn(self._say(known, answer, again=True), known)
            return
        job = self._jobs[rank, id] = _Job(rank, world, id, wanted, tell)
        for old in sorted(key for key in self._jobs if key[0] == rank)[:-_REMEMBERED]:
            del self._jobs[old]
        holding = ExitStack()
        for tier in wanted:
            tier.status.queued += 1
            holding.enter_context(tier.held())
        self._spawn(self._carry_out(job, holding), job)

    def _stands(self, job: _Job) -> bool:
        """Whether it needs no new attempt: it succeeded, or is under way."""
        return not job.failed if job.answered else job in self._running.values()

    def persisted(self, id: SnapshotId) -> None:
        """All ranks know that *id* lies in the nearest tier as a whole; on tiers of single nodes, nobody sees that."""
        if self.tiers.all and (self.tiers.whole is None or self.tiers.whole < id):
            self.tiers.whole = id
            self._tidy(self.tiers.all[0])
            if self._marking is None or self._marking.done():
                self._marking = asyncio.create_task(self._mark(self.tiers.all[0]))

    def _spawn(self, work: Awaitable[None], job: _Job) -> None:
        task = asyncio.ensure_future(work)
        self._running[task] = job
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        job = self._running.pop(task)  # type: ignore[call-overload]
        if not task.cancelled() and (error := task.exception()):
            _log.error("spilling %s of rank %d: %s", job.id, job.rank, error, exc_info=error)

    async def _carry_out(self, job: _Job, holding: ExitStack) -> None:
        source: Store | None = None
        with holding:
            for index, tier in enumerate(job.tiers):
                began_s = time.monotonic()
                failed = ""
                try:
                    async with tier.turns:
                        nbytes = await self._insist(job, index, source)
                    source = await tier.opened()
                except Exception as error:  # noqa: BLE001 - whatever it is: the trainer waits for an answer
                    failed = self._failed(job, tier, error)
                else:
                    self._note(tier, job, nbytes, time.monotonic() - began_s)
                finally:
                    tier.status.queued -= 1
                seconds = time.monotonic() - began_s
                told = wire.Spilled(id=wire_id(job.id), tier=index, error=failed, seconds=seconds)
                await self._say(job, wire.FromAgent(spilled=told))
                if not failed:
                    self._tidy(tier)

    @staticmethod
    def _failed(job: _Job, tier: Tier, error: Exception) -> str:
        """Note it; what the trainer is told."""
        tier.status.failures += 1
        tier.status.trouble = f"{job.id} of rank {job.rank}: {error}"
        if isinstance(error, HoldfastError):
            _log.warning("%s of rank %d is not spilled to %s: %s", job.id, job.rank, tier.settings.url, error)
            return error_text(error)
        _log.error("%s of rank %d is not spilled to %s", job.id, job.rank, tier.settings.url, exc_info=error)
        return error_text(AgentError(f"{type(error).__name__}: {error}"))

    def _note(self, tier: Tier, job: _Job, nbytes: int, seconds: float) -> None:
        status = tier.status
        same = status.HasField("newest") and status.newest == wire_id(job.id)
        status.spilled_bytes = nbytes + (status.spilled_bytes if same else 0)
        status.spill_s = seconds
        status.newest.CopyFrom(wire_id(job.id))
        status.spills += 1
        status.trouble = ""
        _log.info(
            "%s of rank %d: %d bytes spilled to %s in %.2f s", job.id, job.rank, nbytes, tier.settings.url, seconds
        )

    async def _say(self, job: _Job, answer: wire.FromAgent, *, again: bool = False) -> None:
        if not again:
            job.answers.append(answer)
        try:
            await job.tell(answer)
        except Exception as error:  # noqa: BLE001 - a trainer that died; its successor asks again
            _log.debug("rank %d cannot be told: %s", job.rank, error)

    async def _insist(self, job: _Job, index: int, source: Store | None) -> int:
        """Write the image to tier *index*, trying again what may work later; returns the bytes written."""
        tier = job.tiers[index]
        deadline_s, pause_s = time.monotonic() + _PATIENCE_S[source is not None], _PAUSE_S[0]
        while True:
            try:
                return await self._once(job, tier, source)
            except HoldfastError as error:
                if isinstance(error, TierFull):
                    await self._give_back(job, tier, error)
                left_s = deadline_s - time.monotonic()
                if error.remedy is not Remedy.RETRY or isinstance(error, SnapshotSkipped) or left_s < pause_s:
                    raise
                tier.status.trouble = f"{job.id} of rank {job.rank}: {error}"
                _log.warning("%s: %s; trying again in %.1f s", tier.settings.url, error, pause_s)
                # The slot is not held for a tier in trouble: a newer snapshot may have it.
                told = wire.Spilled(id=wire_id(job.id), tier=index, error=error_text(error), trying=True)
                await self._say(job, wire.FromAgent(spilled=told), again=True)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S[1])

    async def _once(self, job: _Job, tier: Tier, source: Store | None) -> int:
        target = await tier.opened()
        if await self._is_there(job, tier, target):  # the agent before this one has written it
            return 0
        if source is None:
            return await self._from_slot(job, tier, target)
        return await self._from_tier(job, tier, source, target)

    async def _is_there(self, job: _Job, tier: Tier, target: Store) -> bool:
        from ..storage.leases import buried
        from ..storage.reader import read_entry

        try:
            entry = await read_entry(target, job.id, job.rank, job.world)
        except (SnapshotUnknown, Corrupt):
            return False
        self.tiers.check_owner(tier, entry)
        if await buried(target, job.id):
            # As after a commit: whoever deletes the snapshot may not have seen this entry.
            await target.delete([entry_key(job.id, job.rank, job.world)])
            raise SnapshotSkipped(f"{job.id} was deleted from {tier.settings.url}")
        return True

    async def _from_tier(self, job: _Job, tier: Tier, source: Store, target: Store) -> int:
        from ..storage.leases import reading
        from ..storage.reader import read_entry
        from ..storage.writer import copy_rank

        async with reading(source, job.id):
            entry = await read_entry(source, job.id, job.rank, job.world)
            async with self._fitting(job, tier, entry.image_bytes):
                copied = await copy_rank(
                    source, target, job.id, job.rank, job.world, still=partial(_lately, _uptime_s()),
                    uploads=tier.uploads, room=self._room, memory=self.tiers.memory, pace=tier.pace,
                    progress=partial(tier.underway.wrote, job.id, job.rank),
                )  # fmt: skip
        return copied.stored_bytes

    async def _from_slot(self, job: _Job, tier: Tier, target: Store) -> int:
        from ..storage.writer import Image, write_image

        slot = self._arenas.image(job.rank, job.id)
        record = slot.sealed_record() if slot is not None else None
        if slot is None or record is None:
            raise SnapshotUnknown(f"the image of {job.id} of rank {job.rank} is not here any more")
        began_s, look = _uptime_s(), slot.sealed_record

        def still() -> bool:
            return _lately(began_s) and _holds(look, record)

        checks, text = await to_the_end(asyncio.to_thread(slot.read_tables, record))
        layout = await self._layout(record, text)

        async def sound() -> None:
            """Raise unless every byte that was read was right then: whatever was flipped before still is."""
            found = await to_the_end(asyncio.to_thread(slot.checksums, record.image_bytes, record.block_bytes))
            if not still():
                raise SnapshotSkipped(f"the image of {job.id} of rank {job.rank} was overwritten while it was spilled")
            if not np.array_equal(found, checks):
                raise Corrupt(f"the image of {job.id} of rank {job.rank} is damaged in memory; it is not spilled")

        image = Image(
            job.id, job.rank, record.world, record.watermark, self._job, layout, slot.image[: record.image_bytes]
        )
        async with self._fitting(job, tier, record.image_bytes):
            reach("spill.begun")
            entry = await write_image(
                target, image, still=still, sound=sound, uploads=tier.uploads, room=self._room, pace=tier.pace,
                progress=partial(tier.underway.wrote, job.id, job.rank),
            )  # fmt: skip
        return entry.stored_bytes

    async def _layout(self, record: Record, text: bytes) -> Layout:
        """What *text* says. That of a big state takes long to be read, and is the same for every snapshot."""
        known = self._layouts.get(record.rank)
        if known is None or known[0] != record.layout_crc:
            known = self._layouts[record.rank] = record.layout_crc, await asyncio.to_thread(Layout.from_text, text)
        return known[1]

    async def _mark(self, tier: Tier) -> None:
        """Say beside this node's part of a snapshot that the others have theirs.

        A disk shows only what it has: if another is lost, nobody could tell what was persisted from a spill that the power
        cut short, and the job would start afresh without a word.
        """
        marked: SnapshotId | None = None
        with tier.held():
            while (id := self.tiers.whole) is not None and id != marked:
                marked = id
                try:
                    await self._mark_one(await tier.opened(), id)
                except HoldfastError as error:
                    _log.warning("%s: that %s is whole cannot be said: %s", tier.settings.url, id, error)

    @staticmethod
    async def _mark_one(store: Store, id: SnapshotId) -> None:
        from ..storage.documents import seal
        from ..storage.leases import buried
        from ..storage.names import parse_entry, snapshot_name, whole_key

        there = [parse_entry(found.key) for found in await store.list(entries_of(id))]
        parts = [part for part in there if part is not None]
        if not parts or len(parts) == parts[0][2]:  # all nodes see all of it
            return
        await store.put(whole_key(id), [seal({"format": 1, "snapshot": snapshot_name(id)})])
        if await buried(store, id):  # as after a commit: whoever deletes the snapshot may not have seen this
            await store.delete([whole_key(id)])

    # -- keeping tidy ------------------------------------------------------------------------------------------------

    def _tidy(self, tier: Tier) -> None:
        """Delete what need not stay there; at most one such pass at a time, and one more for what came during it."""
        tier.untidy = True
        if tier.tidying is None or tier.tidying.done():
            tier.tidying = asyncio.create_task(self._keep_tidy(tier))

    async def _keep_tidy(self, tier: Tier) -> None:
        while tier.untidy:
            tier.untidy = False
            await self._prune(tier)

    async def _prune(self, tier: Tier) -> None:
        try:
            with tier.held():
                pruner = await self._pruner(tier)
                if pruner is None:
                    return
                pruned = await pruner.prune(persisted=self.tiers.whole)
        except HoldfastError as error:
            _log.warning("%s is not tidied: %s", tier.settings.url, error)
        except Exception:  # noqa: BLE001 - a task ends here; the next spill tries again
            _log.exception("tidying %s", tier.settings.url)
        else:
            for removal in pruned.removals:
                _log.info("%s: %s removed: %s", tier.settings.url, removal.id, removal.reason)
            tier.status.pruned += sum(removal.done for removal in pruned.removals)

    async def _pruner(self, tier: Tier) -> Pruner | None:
        """Who removes what may go; None if that is another agent's business.

        Where all nodes see the same tier, the agent of rank 0 does it for all; where each has a disk of its own, each does.
        Only a tier that all see ever shows a complete snapshot of several nodes: of this job as it runs now, that is.
        """
        from ..storage.prune import Pruner
        from ..storage.reader import list_snapshots

        store, known = await tier.opened(), {id for _, id in self._jobs}
        shared = any(listed.complete for listed in await list_snapshots(store) if listed.id in known)
        if store.url.startswith("file://"):
            tier.shared = shared
        mine = shared and self._has_first
        own = not shared and tier in self.tiers.all[:1] and self.tiers.whole is not None
        return Pruner(store, tier.settings, self._job, shared=shared) if mine or own else None

    @property
    def _has_first(self) -> bool:
        """Whether rank 0 is of this node."""
        return any(rank == 0 for rank, _ in self._jobs)

    async def _give_back(self, job: _Job, tier: Tier, full: TierFull) -> None:
        """What was written of a snapshot that does not fit is removed: without this image it will never be whole."""
        from ..storage.prune import Pruner

        try:
            await Pruner(await tier.opened(), tier.settings, self._job).discard(job.id, str(full))
        except HoldfastError as error:
            _log.warning("%s: what was written of %s stays for now: %s", tier.settings.url, job.id, error)

    @asynccontextmanager
    async def _fitting(self, job: _Job, tier: Tier, image_bytes: int) -> AsyncIterator[None]:
        """Within this block the image counts as being written there. Raises ``TierFull`` if it does not fit, not even when
        older snapshots go."""
        done = False
        try:
            async with tier.counting:
                if (reason := await self._make_room(job, tier, image_bytes)) is not None:
                    raise TierFull(f"{job.id} of rank {job.rank}: {reason}")
            yield
            done = True
        finally:
            tier.underway.end(job.id, job.rank, done=done)

    async def _make_room(self, job: _Job, tier: Tier, image_bytes: int) -> str | None:
        """Count the image as being written, and delete as many older snapshots as it takes. Why it does not fit; else None."""
        store, settings = await tier.opened(), tier.settings
        tier.underway.begin(job.id, job.rank, image_bytes, (await self._shown(store, tier, job)).get(job.id, 0))
        reason = await self._no_room(store, tier, job)
        if reason is None or (pruner := await self._pruner(tier)) is None:
            return reason
        for keep in range(settings.keep, settings.keep_min - 1, -1):
            await pruner.prune(keep, persisted=self.tiers.whole)
            reason = await self._no_room(store, tier, job)
            if reason is None:
                break
        return reason

    async def _no_room(self, store: Store, tier: Tier, job: _Job) -> str | None:
        free = await store.free_bytes()
        if free is None and tier.settings.limit_bytes is None:
            return None
        shown = await self._shown(store, tier, job)
        # Where all nodes write to one place, the agent of rank 0 counts for all: each would see only its own share coming.
        world = job.world if tier.shared and self._has_first else 0
        return tier.underway.no_room(tier.settings, shown, free, world=world)

    @staticmethod
    async def _shown(store: Store, tier: Tier, job: _Job) -> dict[SnapshotId, int]:
        """What the store shows of each snapshot, in bytes; without a limit, of those that are being written."""
        shown: dict[SnapshotId, int] = {}
        if tier.settings.limit_bytes is None:
            for id in {*tier.underway.ids, job.id}:
                shown[id] = sum(found.nbytes for found in await store.list(data_of(id)))
            return shown
        for found in await store.list(SNAPSHOTS):
            if (its := parse_snapshot(found.key.removeprefix(SNAPSHOTS).partition("/")[0])) is not None:
                shown[its] = shown.get(its, 0) + found.nbytes
        return shown


def _uptime_s() -> float:
    """Goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lately(began_s: float) -> bool:
    """Whether a spill that began then may still commit: well before the tombstone goes of what was deleted meanwhile."""
    return _uptime_s() - began_s < _COMMIT_WITHIN_S


def _holds(look: Callable[[], Record | None], record: Record) -> bool:
    found = look()
    return found is not None and (found.id, found.nonce) == (record.id, record.nonce)
