"""What an agent knows of its tiers: what was said of them, what lies in them, and how an image comes from there into a slot.

What a tier has does not depend on which agent wrote it, so nothing is remembered here that a tier does not say itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import AgentUnreachable, Corrupt, HoldfastError, ObjectMissing, Remedy, SnapshotUnknown, TierError
from ..snapshot.record import SnapshotId, table_bytes_for
from ..storage.budget import Underway, check_budget
from ..storage.chunks import Chunk, span
from ..storage.documents import unseal
from ..storage.inflight import each
from ..storage.names import SNAPSHOTS
from ..storage.tiers import TierSettings
from . import wire_pb2 as wire
from .arenas import Arenas
from .bulk import Pace
from .client import wire_id
from .ranges import Pieces, Span
from .tasks import ended, to_the_end

if TYPE_CHECKING:
    from ..storage.entries import Entry
    from ..storage.reader import ImageReader, Listed, Memory
    from ..storage.store import Store

_log = logging.getLogger(__name__)
_AT_ONCE: Final = 2  # images that are written to one tier side by side
_LOADS: Final = 4  # images that are read side by side, from all tiers
_LIST_S: Final = 60.0
_LISTED: Final = 32  # of each tier, the newest that are whole, and as many others: a restore is told of them
_MEASURE_S: Final = 10.0  # a trainer that attaches waits no longer for a tier to say how full it is
_MEASURED_S: Final = 5.0  # and those that attach soon after it are told the same
_PARTS: Final = 16  # chunks that are read side by side of one image, in parts
_TRIES: Final = 3  # entries that are read to learn of which job a run is


Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Tier:
    """One tier: what was said of it, its store once it is used, and figures.

    Attributes:
        uploads: held by each object that is written there.
        turns: held by each image that is written there.
        counting: held while it is looked whether an image fits.
        underway: the images that are being written there.
        untidy: something has come since the last pass over it began.
        shared: whether all nodes see the same, as far as is known.
    """

    settings: TierSettings
    uploads: asyncio.Semaphore
    status: wire.TierStatus
    bucket: Pace | None
    shared: bool
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    counting: asyncio.Lock = field(default_factory=asyncio.Lock)
    underway: Underway = field(default_factory=Underway)
    tidying: asyncio.Task[None] | None = None
    untidy: bool = False
    closing: asyncio.Task[None] | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _store: Store | None = None
    _holders: int = 0
    _retired: bool = False
    _measuring: tuple[float, asyncio.Task[tuple[int | None, int]]] | None = None

    @classmethod
    def of(cls, settings: TierSettings) -> Tier:
        """A tier that nothing was done with yet."""
        bucket = Pace(settings.bytes_per_s) if settings.bytes_per_s is not None else None
        status = wire.TierStatus(url=settings.url)
        return cls(settings, asyncio.Semaphore(settings.uploads), status, bucket, not _on_disk(settings))

    async def pace(self, nbytes: int) -> None:
        """Return when so much more may be written."""
        if self.bucket is not None:
            await asyncio.sleep(self.bucket.delay_s(nbytes))

    async def opened(self) -> Store:
        """The store. Only now is the library behind it loaded, in a thread: that takes a while."""
        async with self._opening:
            if self._store is None:
                self._store = await to_the_end(asyncio.to_thread(_open, self.settings.url))
            return self._store

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this block the store stays open, even if the job has other tiers by now."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._close_if_over()

    def retire(self) -> None:
        """The job has other tiers by now: close the store once nobody needs it."""
        self._retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self._retired and not self._holders and self.closing is None:
            self.closing = asyncio.create_task(self.close())

    async def close(self) -> None:
        """Close the store. Nobody uses it any more."""
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    async def measured(self) -> tuple[int | None, int]:
        """The bytes that are free there, None if there is no limit; and those that snapshots hold. Many may ask at a time.

        Raises ``TierError``; ``TimeoutError`` if that is not known soon.
        """
        if self._measuring is None or time.monotonic() - self._measuring[0] > _MEASURED_S:
            self._measuring = time.monotonic(), asyncio.create_task(self._measure())
        return await asyncio.wait_for(asyncio.shield(self._measuring[1]), _MEASURE_S)

    async def _measure(self) -> tuple[int | None, int]:
        with self.held():
            store = await self.opened()
            free = await store.free_bytes() if _on_disk(self.settings) else None
            held = sum([found.nbytes for found in await store.list(SNAPSHOTS)]) if free is not None else 0
            return free, held

    def tasks(self) -> list[asyncio.Task[Any]]:
        """What is under way besides spills and loads."""
        measuring = self._measuring[1] if self._measuring is not None else None
        return [task for task in (self.tidying, measuring) if task is not None]


class Chunkwise:
    """An image in tiers, chunk by chunk. As ``origins.Origin``, which says what its methods do."""

    room_bytes = 0  # what chunks take on their way is bounded by the memory that all reading from tiers shares

    def __init__(self, reader: ImageReader, layout: bytes, how: str, held: AsyncExitStack) -> None:
        """*held*: what keeps the tiers open, and the snapshot from being deleted."""
        self.layout, self.how = layout, how
        self.image_bytes = reader.entry.image_bytes
        self._reader, self._held = reader, held
        self._values_offset = reader.layout.values_offset
        chunks = [(*span(reader.layout.placed[s.chunk.index], s.chunk), s.chunk) for s in reader.entry.chunks]
        self._pieces: list[tuple[int, int, Chunk | None]] = [(at, at + nbytes, chunk) for at, nbytes, chunk in chunks]
        self._pieces.sort(key=itemgetter(0))
        if self._values_offset < self.image_bytes:
            self._pieces.append((self._values_offset, self.image_bytes, None))
        self.grain = Pieces((start, end) for start, end, _ in self._pieces)

    async def fill(self, target: Bytes, spans: Sequence[Span]) -> int:
        """Each chunk is read once, whole, and verified; the gaps between slices are zeros, as in ``ImageReader.read_image``."""
        await each(self._parts(target, spans), self._read, _PARTS)
        return sum(part.nbytes for part in spans)

    def _parts(self, target: Bytes, spans: Sequence[Span]) -> Iterator[tuple[Chunk | None, Bytes]]:
        for part in spans:
            done, ahead = part.start, part.at - part.start
            for start, end, chunk in self._pieces[bisect_left(self._pieces, part.start, key=itemgetter(0)) :]:
                if start >= part.end:
                    break
                target[done + ahead : start + ahead] = 0
                yield chunk, target[start + ahead : end + ahead]
                done = end
            target[done + ahead : part.end + ahead] = 0

    async def _read(self, part: tuple[Chunk | None, Bytes]) -> None:
        chunk, out = part
        if chunk is None:
            out[:] = np.frombuffer(await self._reader.read_values(), np.uint8)
        else:
            await self._reader.read_slice(chunk.index, out, chunk.first_row, chunk.rows)

    async def close(self) -> None:
        """Give lease and stores back."""
        await self._held.aclose()


class Tiers:
    """All tiers of the job, as one agent knows them. All methods run on the event loop; heavy work goes to threads.

    Attributes:
        all: nearest first.
        whole: the newest snapshot that all ranks know to lie in the nearest tier.
    """

    def __init__(self, name: str, job: str, arenas: Arenas) -> None:
        self.all: list[Tier] = []
        self.whole: SnapshotId | None = None
        self._name = name
        self._job = job
        self._arenas = arenas
        self._former: list[Tier] = []
        self._jobs: dict[str, str] = {}  # of runs
        self._listing: asyncio.Task[wire.TierList] | None = None
        self._loads = asyncio.Semaphore(_LOADS)
        self._loading: dict[int, asyncio.Lock] = {}  # by rank
        self._memory: Memory | None = None

    @property
    def memory(self) -> Memory:
        """What all reading from tiers takes together, besides the slots."""
        if self._memory is None:
            from ..storage.reader import Memory

            self._memory = Memory()
        return self._memory

    # -- which tiers -------------------------------------------------------------------------------------------------

    def use(self, said: Sequence[str]) -> None:
        """The tiers of the job, as a trainer says them. Raises ``ConfigError``."""
        settings = [TierSettings.from_json(text) for text in said]
        if settings == [tier.settings for tier in self.all]:
            return
        left = {tier.settings: tier for tier in self.all}
        self.all = [left.pop(one) if one in left else Tier.of(one) for one in settings]
        self._former = [tier for tier in self._former if tier.closing is None or not tier.closing.done()]
        self._former += left.values()
        for tier in left.values():
            tier.retire()

    async def check_budget(self, node_bytes: int, world_bytes: int) -> None:
        """Whether snapshots fit into the tiers, before training starts.

        Args:
            node_bytes: what the images of this node's ranks take, as far as these are here.
            world_bytes: what those of all ranks take, in tiers that all nodes share.

        Raises:
            BudgetExceeded: they do not. A tier that does not answer soon is not asked: it may when it is needed.
        """
        await asyncio.gather(*(self._check(tier, world_bytes if tier.shared else node_bytes) for tier in self.all))

    async def _check(self, tier: Tier, nbytes: int) -> None:
        free, held = None, 0
        try:
            free, held = await tier.measured()
        except TierError as error:
            _log.warning("%s: %s", tier.settings.url, error)
        except TimeoutError:
            _log.warning("%s: not known within %g s how full it is", tier.settings.url, _MEASURE_S)
        check_budget(tier.settings, nbytes, free, held_bytes=held)

    async def close(self) -> None:
        """Give up what is under way, and close all stores."""
        tasks = [task for tier in [*self.all, *self._former] for task in tier.tasks()]
        if self._listing is not None:
            tasks.append(self._listing)
        for task in tasks:
            task.cancel()
        await ended(tasks)
        for tier in [*self.all, *self._former]:
            if tier.closing is not None:
                await ended([tier.closing])
            await tier.close()

    # -- what lies there ---------------------------------------------------------------------------------------------

    async def stored(self) -> wire.TierList:
        """What this job has in the tiers. Ranks of a node ask at the same time: they share one listing."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.create_task(self._list())
        return await asyncio.shield(self._listing)

    async def _list(self) -> wire.TierList:
        answers = await asyncio.gather(*(self._list_tier(i, tier) for i, tier in enumerate(self.all)))
        return wire.TierList(
            agent=self._name,
            images=[image for images, _, _ in answers for image in images],
            errors=[error for _, error, _ in answers if error],
            others=[other for _, _, other in answers if other],
        )

    async def _list_tier(self, index: int, tier: Tier) -> tuple[list[wire.TierImages], str, str]:
        """What this job has there; why that cannot be told; and whose snapshots are there besides."""
        from ..storage.reader import list_snapshots

        try:
            with tier.held():
                async with asyncio.timeout(_LIST_S):
                    store = await tier.opened()
                    told, foreign = await self._ours(tier, store, await list_snapshots(store, complete=_LISTED))
                    if foreign:  # theirs must not hide ours
                        told, foreign = await self._ours(tier, store, await list_snapshots(store))
        except TimeoutError:
            return [], f"{tier.settings.url}: not listed within {_LIST_S:g} s", ""
        except HoldfastError as error:
            return [], f"{tier.settings.url}: {error}", ""
        other = f"{tier.settings.url} holds snapshots of job {', '.join(sorted(foreign))}" if foreign else ""
        if other:
            _log.warning("%s, which are not looked at: this is %s", other, self._job)
        return (
            [
                wire.TierImages(
                    tier=index, id=wire_id(one.id), world=one.world, ranks=_ranges(one.ranks), whole=one.whole
                )
                for one in told
            ],
            "",
            other,
        )

    async def _ours(self, tier: Tier, store: Store, listed: Sequence[Listed]) -> tuple[list[Listed], set[str]]:
        """Of what is *listed*, what a restore of this job may want, oldest first: the newest that are whole, as far as can be
        told, and the newest of the rest; neither is hidden by many of the other. And the names of other jobs."""
        newest = sorted((one for one in listed if not one.deleted), key=lambda one: one.id, reverse=True)
        runs: dict[str, list[Listed]] = {}
        for one in newest:
            runs.setdefault(one.id.run, []).append(one)
        told: dict[bool, list[Listed]] = {True: [], False: []}
        foreign: set[str] = set()
        for one in newest:
            # Where each node has a disk of its own, nothing is complete on one of them: such a word is what tells.
            among = told[one.complete or one.whole or (self.whole is not None and one.id <= self.whole)]
            if len(among) < _LISTED:
                job = await self._job_of(store, runs[one.id.run])
                if job in (None, self._job) or tier.settings.any_job:
                    among.append(one)
                else:
                    foreign.add(job)
        return sorted((*told[True], *told[False]), key=lambda one: one.id), foreign

    async def _job_of(self, store: Store, listed: Sequence[Listed]) -> str | None:
        """Of which job the run is whose snapshots these are: any entry says it. None if no readable one does."""
        run = listed[0].id.run
        if run not in self._jobs:
            entries = [found for one in listed for found in one.entries.values()]
            for found in sorted(entries, key=lambda entry: entry.nbytes)[:_TRIES]:
                try:
                    document = await asyncio.to_thread(unseal, await store.get(found.key), found.key)
                except (Corrupt, ObjectMissing):
                    continue  # damaged, or just pruned
                if isinstance(job := document.get("job"), str):
                    self._jobs[run] = job
                    break
        return self._jobs.get(run)

    def check_owner(self, tier: Tier, entry: Entry) -> None:
        """Raise ``SnapshotUnknown`` if that is an image of another job, which means nothing here."""
        if entry.job != self._job and not tier.settings.any_job:
            raise SnapshotUnknown(
                f"{entry.id} in {tier.settings.url} is of job {entry.job!r}, and this is {self._job!r}; a job that goes on "
                f"under another name says so: Tier(…, any_job=True)"
            )

    # -- reading -----------------------------------------------------------------------------------------------------

    async def load(
        self, id: SnapshotId, rank: int, world: int, tiers: Sequence[int], *, apart: bool = False
    ) -> wire.MaterialiseReply:
        """Have that image in a slot, read from the nearest of *tiers*; from the others, what cannot be had there.

        *apart*: not in a slot that its rank's trainer here has asked for.

        Raises ``SnapshotUnknown``, ``Corrupt``, ``TierError``, ``BudgetExceeded``; ``AgentUnreachable`` if no trainer has said
        yet which tiers there are.
        """
        chosen = self._chosen(tiers, f"{id} of rank {rank}")
        async with self._loads, self._loading.setdefault(rank, asyncio.Lock()):
            try:
                return await self._load(id, rank, world, chosen[:1], apart)
            except (SnapshotUnknown, Corrupt, TierError) as error:
                if len(chosen) == 1:
                    raise
                # Only now are the others asked: one of them may be away, and this one would wait for it.
                _log.warning("%s of rank %d is not all in %s: %s", id, rank, chosen[0].settings.url, error)
            return await self._load(id, rank, world, chosen, apart)

    async def origin(self, id: SnapshotId, rank: int, world: int, tiers: Sequence[int]) -> Chunkwise:
        """That image, to be read in parts from any of *tiers*, the nearest first; under a lease until it is closed.

        Raises as ``load``, but for ``BudgetExceeded``.
        """
        from ..storage.reader import ImageReader

        async with AsyncExitStack() as stack:
            chosen = self._chosen(tiers, f"{id} of rank {rank}")
            entry, stores = await self._leased(stack, id, rank, world, chosen)
            layout = await asyncio.to_thread(entry.layout.to_text)
            how = f"read from {' and '.join(store.url for store in stores)}"
            return Chunkwise(ImageReader(entry, stores, self.memory), layout, how, stack.pop_all())

    def _chosen(self, tiers: Sequence[int], what: str) -> list[Tier]:
        chosen = [self.all[index] for index in sorted(set(tiers)) if index < len(self.all)]
        if not chosen:
            raise AgentUnreachable(f"agent {self._name} was not told yet of the tiers that have {what}")
        return chosen

    async def _load(
        self, id: SnapshotId, rank: int, world: int, chosen: Sequence[Tier], apart: bool
    ) -> wire.MaterialiseReply:
        from ..storage.reader import ImageReader

        async with AsyncExitStack() as stack:
            entry, stores = await self._leased(stack, id, rank, world, chosen)
            layout = await asyncio.to_thread(entry.layout.to_text)
            sizes = {"image_bytes": entry.image_bytes, "table_bytes": table_bytes_for(entry.image_bytes, len(layout))}
            slot = await stack.enter_async_context(self._arenas.filling(rank, id, apart=apart, **sizes))
            reader = ImageReader(entry, stores, self.memory)
            sums = self._arenas.sums(slot, entry.image_bytes)
            await reader.read_image(slot.image[: entry.image_bytes], landed=sums.landed)
            for damage in reader.damaged:
                _log.warning("%s of rank %d: %s in %s: %s", id, rank, damage.key, damage.url, damage.reason)
            sealed = partial(
                self._arenas.seal_read, slot, id, rank=rank, world=world, watermark=entry.watermark,
                image_bytes=entry.image_bytes, layout=layout, sums=sums,
            )  # fmt: skip
            record = await to_the_end(asyncio.to_thread(sealed))
        how = f"read from {' and '.join(dict.fromkeys(store.url for store in stores[: 1 + bool(reader.damaged)]))}"
        return wire.MaterialiseReply(path=slot.place.path, how=how, checks_crc=record.checks_crc)

    async def _leased(
        self, stack: AsyncExitStack, id: SnapshotId, rank: int, world: int, chosen: Sequence[Tier]
    ) -> tuple[Entry, list[Store]]:
        """The stores of *chosen* that can be read, each with a lease on the snapshot; and the entry, from the first that has
        it. Raises what stood in the way if there is none."""
        from ..storage.leases import reading
        from ..storage.reader import read_entry

        entry: Entry | None = None
        stores: list[Store] = []
        failed: list[HoldfastError] = []

        async def lease(tier: Tier) -> Store | HoldfastError:
            stack.enter_context(tier.held())
            try:
                store = await tier.opened()
                await stack.enter_async_context(reading(store, id))
            except HoldfastError as error:
                return error
            return store

        answers: Iterable[Store | HoldfastError] = await _all([lease(tier) for tier in chosen])
        for tier, answer in zip(chosen, answers, strict=True):
            try:
                if isinstance(answer, HoldfastError):
                    raise answer
                if entry is None:
                    found = await read_entry(answer, id, rank, world)
                    self.check_owner(tier, found)
                    entry = found
                stores.append(answer)
            except HoldfastError as error:
                _log.warning("%s: the image of %s of rank %d: %s", tier.settings.url, id, rank, error)
                failed.append(error)
                if isinstance(error, Corrupt) and not isinstance(answer, HoldfastError):
                    stores.append(answer)  # its entry is damaged; what it names need not be
        if entry is None:
            # What may be otherwise at the next try says more than what will not.
            raise next((error for error in failed if error.remedy is Remedy.RETRY), failed[0])
        return entry, stores


async def _all(work: Sequence[Awaitable[Any]]) -> list[Any]:
    """The results of all of it, once all has ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await ended(tasks)


def _open(url: str) -> Store:
    from ..storage.store import open_store

    return open_store(url)


def _on_disk(settings: TierSettings) -> bool:
    """Whether each node may have its own, and it may be full."""
    return settings.url.startswith("file://")


def _ranges(ranks: Iterable[int]) -> list[wire.Range]:
    """*ranks* as ranges."""
    found: list[wire.Range] = []
    for rank in sorted(ranks):
        if found and found[-1].offset + found[-1].nbytes == rank:
            found[-1].nbytes += 1
        else:
            found.append(wire.Range(offset=rank, nbytes=1))
    return found
