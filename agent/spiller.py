"""Writes images to tiers and reads them back: from the slot to the nearest tier, from there to the next, and into a slot again.

What a tier has does not depend on which agent wrote it, so nothing is remembered here that a tier does not say itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..crashpoints import reach
from ..errors import (
    AgentError,
    ConfigError,
    Corrupt,
    HoldfastError,
    Remedy,
    SnapshotSkipped,
    SnapshotUnknown,
    TierError,
    TierFull,
)
from ..snapshot.arena import Slot
from ..snapshot.layout import Layout
from ..snapshot.record import Record, SnapshotId, table_bytes_for
from ..storage.names import SNAPSHOTS
from ..storage.tiers import TierSettings
from . import wire_pb2 as wire
from .arenas import Arenas
from .bulk import Pace
from .client import error_text, wire_id
from .tasks import ended, to_the_end

if TYPE_CHECKING:
    from ..storage.entries import Entry
    from ..storage.prune import Pruner
    from ..storage.store import Store

_log = logging.getLogger(__name__)
_AT_ONCE: Final = 2  # images that are written to one tier side by side
_PATIENCE_S: Final = (120.0, 1800.0)  # for the nearest tier, which holds a slot, and for the others
_PAUSE_S: Final = (0.5, 30.0)  # between tries: the first, and the longest
_COMMIT_WITHIN_S: Final = 6 * 3600.0
_LIST_S: Final = 60.0
_LISTED: Final = 32  # snapshots of each tier, newest first, that a restore is told of
_REMEMBERED: Final = 4  # answers for each rank

Tell = Callable[[wire.FromAgent], Awaitable[None]]


@dataclass(slots=True)
class _Tier:
    """One tier: what was said of it, its store once it is used, and figures."""

    settings: TierSettings
    uploads: asyncio.Semaphore
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    store: Store | None = None
    status: wire.TierStatus = field(default_factory=wire.TierStatus)
    tidying: asyncio.Task[None] | None = None
    bucket: Pace | None = None

    @classmethod
    def of(cls, settings: TierSettings) -> _Tier:
        """A tier that nothing was done with yet."""
        bucket = Pace(settings.bytes_per_s) if settings.bytes_per_s is not None else None
        uploads = asyncio.Semaphore(settings.uploads)
        return cls(settings, uploads, status=wire.TierStatus(url=settings.url), bucket=bucket)

    async def pace(self, nbytes: int) -> None:
        """Return when so much more may be written."""
        if self.bucket is not None:
            await asyncio.sleep(self.bucket.delay_s(nbytes))

    def opened(self) -> Store:
        """The store. Only now is the library behind it loaded."""
        if self.store is None:
            from ..storage.store import open_store

            self.store = open_store(self.settings.url)
        return self.store


@dataclass(slots=True)
class _Job:
    """One rank's image on its way to tiers. ``tell`` is how its trainer is reached now."""

    rank: int
    world: int
    id: SnapshotId
    tiers: int
    tell: Tell
    answers: list[wire.FromAgent] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether some tier could not be written."""
        return any(answer.spilled.error for answer in self.answers)


class Spiller:
    """One agent's part in spilling. All methods run on the event loop; heavy work goes to threads."""

    def __init__(self, name: str, job: str, arenas: Arenas) -> None:
        self._name = name
        self._job = job
        self._arenas = arenas
        self._tiers: list[_Tier] = []
        self._former: list[_Tier] = []
        self._jobs: dict[tuple[int, SnapshotId], _Job] = {}
        self._running: dict[asyncio.Task[None], _Job] = {}
        self._listing: asyncio.Task[wire.TierList] | None = None
        self._marking: asyncio.Task[None] | None = None
        self._whole: SnapshotId | None = None  # the newest that all ranks know to lie in the nearest tier

    # -- which tiers -------------------------------------------------------------------------------------------------

    def use(self, said: Sequence[str]) -> None:
        """The tiers of the job, as a trainer says them. Raises ``ConfigError``."""
        settings = [TierSettings.from_json(text) for text in said]
        if settings == [tier.settings for tier in self._tiers]:
            return
        self._former += self._tiers  # what still writes there goes on
        self._tiers = [_Tier.of(one) for one in settings]

    async def check_budget(self, node_bytes: int, world_bytes: int) -> None:
        """Whether snapshots fit into the tiers, before training starts.

        Args:
            node_bytes: what the images of this node's ranks take, as far as these are here.
            world_bytes: what those of all ranks take, in tiers that all nodes share for certain.

        Raises:
            BudgetExceeded: they do not. A tier that does not answer is not asked: it may when it is needed.
        """
        from ..storage.budget import check_budget

        for tier in self._tiers:
            local = tier.settings.url.startswith("file://")
            try:
                store = tier.opened()
                free = await store.free_bytes() if local else None
                held = sum([found.nbytes for found in await store.list(SNAPSHOTS)]) if free is not None else 0
            except TierError as error:
                _log.warning("%s: %s", tier.settings.url, error)
                continue
            check_budget(tier.settings, node_bytes if local else world_bytes, free, held_bytes=held)

    @property
    def tiers(self) -> Sequence[TierSettings]:
        """Nearest first."""
        return [tier.settings for tier in self._tiers]

    def status(self) -> list[wire.TierStatus]:
        """For ``holdfast status``."""
        return [tier.status for tier in self._tiers]

    @property
    def busy(self) -> bool:
        """Whether images are being written: the agent does not end for idleness meanwhile."""
        return bool(self._running)

    async def close(self) -> None:
        """Give up what is under way. A spill that was cut short leaves no entry, so nothing that counts."""
        tasks: list[asyncio.Task[Any]] = [
            *self._running,
            *(tier.tidying for tier in self._tiers if tier.tidying is not None),
        ]
        tasks += [task for task in (self._listing, self._marking) if task is not None]
        for task in tasks:
            task.cancel()
        await ended(tasks)
        for tier in [*self._tiers, *self._former]:
            if tier.store is not None:
                await tier.store.close()

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is under way, at most so long."""
        if self._running:
            await asyncio.wait(list(self._running), timeout=timeout_s)

    # -- writing -----------------------------------------------------------------------------------------------------

    def spill(self, rank: int, world: int, id: SnapshotId, tiers: int, tell: Tell) -> None:
        """Write that image to the first *tiers* tiers. Asked again, it says again what it has said."""
        known = self._jobs.get((rank, id))
        if known is not None and known.tiers >= tiers and not (known.failed and known not in self._running.values()):
            known.tell = tell
            for answer in known.answers:
                self._spawn(self._say(known, answer, again=True), known)
            return
        job = self._jobs[rank, id] = _Job(rank, world, id, min(tiers, len(self._tiers)), tell)
        for old in sorted(key for key in self._jobs if key[0] == rank)[:-_REMEMBERED]:
            del self._jobs[old]
        for tier in self._tiers[: job.tiers]:
            tier.status.queued += 1
        self._spawn(self._carry_out(job, self._tiers[: job.tiers]), job)

    def persisted(self, id: SnapshotId) -> None:
        """All ranks know that *id* lies in the nearest tier as a whole; on tiers of single nodes, nobody sees that."""
        if self._tiers and (self._whole is None or self._whole < id):
            self._whole = id
            self._tidy(self._tiers[0])
            if self._marking is None or self._marking.done():
                self._marking = asyncio.create_task(self._mark(self._tiers[0]))

    def _spawn(self, work: Awaitable[None], job: _Job) -> None:
        task = asyncio.ensure_future(work)
        self._running[task] = job
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[None]) -> None:
        job = self._running.pop(task)  # type: ignore[call-overload]
        if not task.cancelled() and (error := task.exception()):
            _log.error("spilling %s of rank %d: %s", job.id, job.rank, error, exc_info=error)

    async def _carry_out(self, job: _Job, tiers: Sequence[_Tier]) -> None:
        """Tier after tier. Each copies from the one before it that has the image, so that the slot is free soon."""
        source: Store | None = None
        for index, tier in enumerate(tiers):
            began_s = time.monotonic()
            failed = ""
            try:
                async with tier.turns:
                    nbytes = await self._insist(job, tier, source, _PATIENCE_S[source is not None])
            except Exception as caught:  # noqa: BLE001 - whatever it is, the trainer waits for an answer, and its slot with it
                error = (
                    caught if isinstance(caught, HoldfastError) else AgentError(f"{type(caught).__name__}: {caught}")
                )
                if error is not caught:
                    _log.exception("spilling %s of rank %d", job.id, job.rank)
                failed = error_text(error)
                tier.status.failures += 1
                tier.status.trouble = f"{job.id} of rank {job.rank}: {error}"
                _log.warning("%s of rank %d is not spilled to %s: %s", job.id, job.rank, tier.settings.url, error)
            else:
                source = tier.store
                self._note(tier, job, nbytes, time.monotonic() - began_s)
            finally:
                tier.status.queued -= 1
            seconds = time.monotonic() - began_s
            told = wire.Spilled(id=wire_id(job.id), tier=index, error=failed, seconds=seconds)
            await self._say(job, wire.FromAgent(spilled=told))
            if not failed:
                self._tidy(tier)

    def _note(self, tier: _Tier, job: _Job, nbytes: int, seconds: float) -> None:
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

    async def _insist(self, job: _Job, tier: _Tier, source: Store | None, patience_s: float) -> int:
        """Write the image there, trying again what may work later; returns the bytes written."""
        deadline_s, pause_s = time.monotonic() + patience_s, _PAUSE_S[0]
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
                told = wire.Spilled(id=wire_id(job.id), tier=self._index(tier), error=error_text(error), trying=True)
                await self._say(job, wire.FromAgent(spilled=told), again=True)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S[1])

    def _index(self, tier: _Tier) -> int:
        return next((index for index, one in enumerate(self._tiers) if one is tier), 0)

    async def _once(self, job: _Job, tier: _Tier, source: Store | None) -> int:
        from ..storage.leases import reading
        from ..storage.reader import read_entry
        from ..storage.writer import copy_rank

        target = tier.opened()
        try:
            await read_entry(target, job.id, job.rank, job.world)
        except (SnapshotUnknown, Corrupt):
            pass
        else:  # the agent before this one has written it
            return 0
        if source is None:
            return await self._from_slot(job, tier)
        async with reading(source, job.id):
            entry = await read_entry(source, job.id, job.rank, job.world)
            await self._make_room(job, tier, entry.image_bytes)
            still = partial(_lately, _uptime_s())
            return (
                await copy_rank(
                    source, target, job.id, job.rank, job.world, still=still, uploads=tier.uploads, pace=tier.pace
                )
            ).stored_bytes

    async def _from_slot(self, job: _Job, tier: _Tier) -> int:
        from ..storage.writer import Image, write_image

        slot = self._arenas.image(job.rank, job.id)
        record = slot.sealed_record() if slot is not None else None
        if slot is None or record is None:
            raise SnapshotUnknown(f"the image of {job.id} of rank {job.rank} is not here any more")
        await self._make_room(job, tier, record.image_bytes)
        began_s, look = _uptime_s(), slot.sealed_record

        def still() -> bool:
            return _lately(began_s) and _holds(look, record)

        checks, text = slot.read_tables(record)

        async def check() -> None:
            found = await asyncio.to_thread(slot.checksums, record.image_bytes, record.block_bytes)
            if not still():
                raise SnapshotSkipped(f"the image of {job.id} of rank {job.rank} was overwritten while it was spilled")
            if not np.array_equal(found, checks):
                raise Corrupt(f"the image of {job.id} of rank {job.rank} is damaged in memory; it is not spilled")

        image = Image(
            job.id, job.rank, record.world, record.watermark, self._job, Layout.from_text(text),
            slot.image[: record.image_bytes],
        )  # fmt: skip
        reach("spill.begun")
        sound = asyncio.create_task(check())  # while it is written: a disk leaves the processor time for that
        try:
            entry = await write_image(
                tier.opened(), image, still=still, sound=sound, uploads=tier.uploads, pace=tier.pace
            )
        finally:
            await ended([sound])
            if not sound.cancelled():
                sound.exception()  # looked at: if something else failed before, nobody needs it
        return entry.stored_bytes

    async def _mark(self, tier: _Tier) -> None:
        """Say beside this node's part of a snapshot that the others have theirs.

        A disk shows only what it has: if another is lost, nobody could tell what was persisted from a spill that the power
        cut short, and the job would start afresh without a word.
        """
        from ..storage.documents import seal
        from ..storage.names import entries_of, parse_entry, snapshot_name, whole_key

        marked: SnapshotId | None = None
        while (id := self._whole) is not None and id != marked:
            marked = id
            try:
                there = [parse_entry(found.key) for found in await tier.opened().list(entries_of(id))]
                parts = [part for part in there if part is not None]
                if parts and len(parts) < parts[0][2]:  # else all nodes see all of it
                    document = seal({"format": 1, "snapshot": snapshot_name(id)})
                    await tier.opened().put(whole_key(id), [document])
            except HoldfastError as error:
                _log.warning("%s: that %s is whole cannot be said: %s", tier.settings.url, id, error)

    # -- keeping tidy ------------------------------------------------------------------------------------------------

    def _tidy(self, tier: _Tier) -> None:
        """Delete what need not stay there; at most one such pass at a time."""
        if tier.tidying is None or tier.tidying.done():
            tier.tidying = asyncio.create_task(self._prune(tier))

    async def _prune(self, tier: _Tier) -> None:
        try:
            pruner = await self._pruner(tier)
            if pruner is None:
                return
            pruned = await pruner.prune(persisted=self._whole)
        except HoldfastError as error:
            _log.warning("%s is not tidied: %s", tier.settings.url, error)
        except Exception:  # noqa: BLE001 - a task ends here; the next spill tries again
            _log.exception("tidying %s", tier.settings.url)
        else:
            for removal in pruned.removals:
                _log.info("%s: %s removed: %s", tier.settings.url, removal.id, removal.reason)
            tier.status.pruned += sum(removal.done for removal in pruned.removals)

    async def _pruner(self, tier: _Tier) -> Pruner | None:
        """Who removes what may go; None if that is another agent's business.

        Where all nodes see the same tier, the agent of rank 0 does it for all; where each has a disk of its own, each does.
        Only a tier that all see ever shows a complete snapshot of several nodes: of this job as it runs now, that is.
        """
        from ..storage.prune import Pruner
        from ..storage.reader import list_snapshots

        store, known = tier.opened(), {id for _, id in self._jobs}
        shared = any(listed.complete for listed in await list_snapshots(store) if listed.id in known)
        mine = shared and self._has_first
        own = not shared and tier is self._tiers[0] and self._whole is not None
        return Pruner(store, tier.settings, self._job, shared=shared) if mine or own else None

    @property
    def _has_first(self) -> bool:
        """Whether rank 0 is of this node."""
        return any(rank == 0 for rank, _ in self._jobs)

    async def _give_back(self, job: _Job, tier: _Tier, full: TierFull) -> None:
        """What was written of a snapshot that does not fit is removed: without this image it will never be whole."""
        from ..storage.prune import Pruner

        try:
            await Pruner(tier.opened(), tier.settings, self._job).discard(job.id, str(full))
        except HoldfastError as error:
            _log.warning("%s: what was written of %s stays for now: %s", tier.settings.url, job.id, error)

    async def _make_room(self, job: _Job, tier: _Tier, image_bytes: int) -> None:
        """Raise ``TierFull`` if the image does not fit, not even when older snapshots go."""
        pruner = await self._pruner(tier)
        if pruner is not None and (reason := await pruner.make_room(image_bytes, persisted=self._whole)) is not None:
            raise TierFull(f"{job.id} of rank {job.rank}: {reason}")

    # -- reading -----------------------------------------------------------------------------------------------------

    async def stored(self) -> wire.TierList:
        """What lies in the tiers. Ranks of a node ask at the same time: they share one listing."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.create_task(self._list())
        return await asyncio.shield(self._listing)

    async def _list(self) -> wire.TierList:
        answers = await asyncio.gather(*(self._list_tier(i, tier) for i, tier in enumerate(self._tiers)))
        return wire.TierList(
            agent=self._name,
            images=[image for images, _ in answers for image in images],
            errors=[error for _, error in answers if error],
        )

    async def _list_tier(self, index: int, tier: _Tier) -> tuple[list[wire.TierImages], str]:
        from ..storage.reader import list_snapshots

        try:
            async with asyncio.timeout(_LIST_S):
                listed = await list_snapshots(tier.opened())
        except TimeoutError:
            return [], f"{tier.settings.url}: not listed within {_LIST_S:g} s"
        except HoldfastError as error:
            return [], f"{tier.settings.url}: {error}"
        newest = sorted((one for one in listed if not one.deleted), key=lambda one: one.id)[-_LISTED:]
        return [
            wire.TierImages(tier=index, id=wire_id(one.id), world=one.world, ranks=_ranges(one.ranks), whole=one.whole)
            for one in newest
        ], ""

    async def load(self, id: SnapshotId, rank: int, world: int, tiers: Sequence[int]) -> wire.MaterialiseReply:
        """Have that image in a slot, read from the nearest of *tiers*; from the others, what is damaged there.

        Raises ``SnapshotUnknown``, ``Corrupt``, ``TierError``, ``BudgetExceeded``.
        """
        from ..storage.leases import reading
        from ..storage.reader import ImageReader

        chosen = [self._tiers[index] for index in sorted(set(tiers)) if index < len(self._tiers)]
        if not chosen:
            raise ConfigError(f"agent {self._name} knows no such tier as is said to have {id} of rank {rank}")
        stores = [tier.opened() for tier in chosen]
        async with AsyncExitStack() as leases:
            for store in stores:
                await leases.enter_async_context(reading(store, id))
            entry = await self._entry(id, rank, world, stores)
            layout = entry.layout.to_text()
            free = partial(self._free_slot, rank, id, image_bytes=entry.image_bytes, layout_bytes=len(layout))
            slot = await to_the_end(asyncio.to_thread(free))
            reader = ImageReader(entry, stores)
            await reader.read_image(slot.image[: entry.image_bytes])
        for damage in reader.damaged:
            _log.warning("%s of rank %d: %s in %s: %s", id, rank, damage.key, damage.url, damage.reason)
        sealed = partial(
            self._arenas.seal_read, slot, id, rank=rank, world=world, watermark=entry.watermark,
            image_bytes=entry.image_bytes, layout=layout,
        )  # fmt: skip
        record = await to_the_end(asyncio.to_thread(sealed))
        how = f"read from {' and '.join(dict.fromkeys(store.url for store in stores[: 1 + bool(reader.damaged)]))}"
        return wire.MaterialiseReply(path=slot.place.path, how=how, checks_crc=record.checks_crc)

    async def _entry(self, id: SnapshotId, rank: int, world: int, stores: Sequence[Store]) -> Entry:
        """The entry, from the first store where it is whole."""
        from ..storage.reader import read_entry

        for store in stores[:-1]:
            try:
                return await read_entry(store, id, rank, world)
            except HoldfastError as error:
                _log.warning("%s: the entry of %s of rank %d: %s", store.url, id, rank, error)
        return await read_entry(stores[-1], id, rank, world)

    def _free_slot(self, rank: int, id: SnapshotId, *, image_bytes: int, layout_bytes: int) -> Slot:
        needed = table_bytes_for(image_bytes, layout_bytes)
        slot = self._arenas.free_slot(rank, id, image_bytes=image_bytes, table_bytes=needed)
        slot.prefault()
        return slot


def _uptime_s() -> float:
    """Goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lately(began_s: float) -> bool:
    """Whether a spill that began then may still commit: well before the tombstone goes of what was deleted meanwhile."""
    return _uptime_s() - began_s < _COMMIT_WITHIN_S


def _ranges(ranks: Iterable[int]) -> list[wire.Range]:
    """*ranks* as ranges."""
    found: list[wire.Range] = []
    for rank in sorted(ranks):
        if found and found[-1].offset + found[-1].nbytes == rank:
            found[-1].nbytes += 1
        else:
            found.append(wire.Range(offset=rank, nbytes=1))
    return found


def _holds(look: Callable[[], Record | None], record: Record) -> bool:
    found = look()
    return found is not None and (found.id, found.nonce) == (record.id, record.nonce)
