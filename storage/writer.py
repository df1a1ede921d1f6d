"""Writing an image into a tier: metadata, chunks, values, and last the entry that makes it count.

A chunk is a run of bytes of the image, and goes to the store from where it lies. All objects may be lost until the store
has settled; the entry is written after that. So a crash anywhere before leaves objects that no entry names, for a prune to
remove, and a crash after leaves the image.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from ..crashpoints import reach
from ..errors import SnapshotSkipped, TierError
from ..snapshot.layout import Layout
from ..snapshot.record import SnapshotId
from .arrays import array_metadata, group_metadata, values_metadata
from .chunks import CRC_BYTES, Chunk, corner, is_run, payload_bytes, plan, span, values_key
from .entries import FORMAT, Entry, Stored, StoredValues
from .inflight import Room, each
from .leases import buried
from .names import GROUP, data_of, entry_key, snapshot_name, values_path
from .reader import AT_ONCE, IN_FLIGHT_BYTES, Bytes, ImageReader, Memory, Progress, crc_of, in_thread, read_entry
from .store import Store

Pace: TypeAlias = Callable[[int], Awaitable[None]]
"""Awaited with the bytes that are about to be written: where a budget of bytes per second is kept."""

Still: TypeAlias = Callable[[], bool]
"""Whether the bytes that are being written still are the image."""

Sound: TypeAlias = Callable[[], Awaitable[None]]
"""Raises if the bytes that were read are not the image any more."""

Document: TypeAlias = tuple[str, bytes]
"""One ``zarr.json``: the path of what it describes, and its text."""

_CRC: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Image:
    """What is to be written. *bytes* is a view of a slot, ``uint8[image_bytes]``; it must stay mapped until writing ends."""

    id: SnapshotId
    rank: int
    world: int
    watermark: int
    job: str
    layout: Layout
    bytes: Bytes


async def write_image(
    store: Store,
    image: Image,
    *,
    still: Still,
    sound: Sound | None = None,
    uploads: asyncio.Semaphore | None = None,
    room: Room | None = None,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Entry:
    """Write *image* into *store*; once this returns, it is there and stays.

    Args:
        sound: called once every byte has been read, while the store settles; raises if the image is damaged. What it finds
            sound then was sound when it was read.
        uploads: held by each object while it is written; for a bound on how many are, in this image and others.
        room: taken by each object while it is written; for a bound on their bytes.
        still: asked before each chunk, and once more before the entry is written, when no byte of the image is needed any
            more. The slot may be overwritten at any time; then what was written is not made to count.

    Raises:
        SnapshotSkipped: *still* said no, or the snapshot was deleted from the tier meanwhile. It does not count.
        TierUnreachable, TierFull: of the store. It does not count; it may be written again.
    """
    writer = _Writer(store, image.id, still, pace, progress, uploads, room)
    async with writer.leaving_nothing():
        return await _write_image(writer, image, sound)


async def _write_image(writer: _Writer, image: Image, sound: Sound | None) -> Entry:
    layout, rank = image.layout, image.rank
    values = image.bytes[layout.values_offset :]
    documents = await writer.documents(layout, rank, image.job, image.world, len(values))
    stored: dict[Chunk, int] = {}

    async def write(what: Document | Chunk | None) -> None:
        if what is None:
            stored_values.append(await writer.object(values_key(rank), [values]) if len(values) else 0)
        elif isinstance(what, Chunk):
            stored[what] = await writer.chunk(layout, image.bytes, what)
        else:
            await writer.document(what)

    stored_values: list[int] = []
    chunks = (await asyncio.to_thread(plan, layout, rank)).chunks
    await each([*documents, *chunks, None], write, AT_ONCE)
    return await writer.commit(
        Entry(
            image.id,
            image.job,
            rank,
            image.world,
            image.watermark,
            len(image.bytes),
            layout,
            StoredValues(values_key(rank), len(values), stored_values[0]),
            tuple(Stored(chunk, stored[chunk]) for chunk in chunks),
        ),
        sound,
    )


async def copy_rank(
    source: Store,
    target: Store,
    snapshot: SnapshotId,
    rank: int,
    world: int,
    *,
    also: Sequence[Store] = (),
    still: Still = lambda: True,
    uploads: asyncio.Semaphore | None = None,
    room: Room | None = None,
    memory: Memory | None = None,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Entry:
    """Copy one rank's image from tier to tier, verified on the way; as ``write_image``. Hold a lease on *source* meanwhile.

    Args:
        also: where chunks are taken from that are damaged in *source*.
        uploads, room: as in ``write_image``.
        memory: of what is read; shared by those who read at the same time.

    Raises:
        As ``write_image``, ``reader.read_entry`` and ``ImageReader.read_image``.
    """
    entry = await read_entry(source, snapshot, rank, world)
    reader = ImageReader(entry, [source, *also], memory)
    writer = _Writer(target, snapshot, still, pace, progress, uploads, room)
    async with writer.leaving_nothing():
        return await _copy_rank(writer, reader, entry)


async def _copy_rank(writer: _Writer, reader: ImageReader, entry: Entry) -> Entry:
    documents = await writer.documents(entry.layout, entry.rank, entry.job, entry.world, entry.values.nbytes)

    async def copy(what: Document | Stored | None) -> None:
        if isinstance(what, Stored):
            async with reader.payload(what) as payload:
                await writer.object(what.chunk.key, [payload], what.crc)
        elif what is not None:
            await writer.document(what)
        elif entry.values.nbytes:
            held = np.frombuffer(await reader.read_values(), np.uint8)
            await writer.object(entry.values.key, [held], entry.values.crc)

    await each([*documents, *entry.chunks, None], copy, AT_ONCE)
    return await writer.commit(entry)


async def mend(target: Store, entry: Entry, sources: Sequence[Store], keys: Sequence[str]) -> list[str]:
    """Write again what is damaged in *target*, from *sources* that hold the same image.

    Args:
        keys: relative to the tier, as in ``Damage``. Those that are not this image's are left out.

    Returns:
        The keys that were mended.

    Raises:
        Corrupt: no source has an undamaged copy of one of them.
    """
    reader = ImageReader(entry, sources)
    writer = _Writer(target, entry.id, lambda: True, None, None)
    wanted = {key.removeprefix(data_of(entry.id)) for key in keys}
    mended: list[str] = []

    async def rewrite(stored: Stored | None) -> None:
        if stored is not None:
            key = stored.chunk.key
            async with reader.payload(stored) as payload:
                await writer.object(key, [payload], stored.crc)
        else:
            key = entry.values.key
            await writer.object(key, [np.frombuffer(await reader.read_values(), np.uint8)], entry.values.crc)
        mended.append(data_of(entry.id) + key)

    objects: list[Stored | None] = [stored for stored in entry.chunks if stored.chunk.key in wanted]
    await each([*objects, *([None] if entry.values.key in wanted else [])], rewrite, AT_ONCE)
    await target.settle()
    return sorted(mended)


class _Writer:
    """Objects of one snapshot on their way into a store."""

    def __init__(
        self,
        store: Store,
        id: SnapshotId,
        still: Still,
        pace: Pace | None,
        progress: Progress | None,
        uploads: asyncio.Semaphore | None = None,
        room: Room | None = None,
    ) -> None:
        self._store = store
        self._id = id
        self._still = still
        self._pace = pace
        self._progress = progress
        self._uploads = uploads or asyncio.Semaphore(AT_ONCE)
        self._room = room or Room(IN_FLIGHT_BYTES)
        self._keys: list[str] = []
        self._common: set[str] = set()  # paths that other ranks describe, too, perhaps through the same store

    @asynccontextmanager
    async def leaving_nothing(self) -> AsyncIterator[None]:
        """If this fails, the store need not keep what it has not made visible yet, nor answer for it when others settle."""
        try:
            yield
        except (Exception, asyncio.CancelledError):
            with suppress(TierError):
                await self._store.forget(self._keys)
            raise

    async def documents(self, layout: Layout, rank: int, job: str, world: int, values_bytes: int) -> list[Document]:
        """All ``zarr.json`` that are this rank's to write."""

        def made() -> list[Document]:
            wanted = plan(layout, rank)
            self._common = {array.path for array in wanted.arrays if array.start is None and 0 in array.shape}
            facts = {"format": FORMAT, "job": job, "run": self._id.run, "generation": self._id.generation,
                     "step": self._id.step, "world": world}  # fmt: skip
            found = [(path, group_metadata(None if path else facts)) for path in wanted.groups]
            found += [(array.path, array_metadata(array)) for array in wanted.arrays]
            return [*found, (values_path(rank), values_metadata(values_bytes))]

        # In a thread: zarr takes a third of a millisecond for each, and longer to be imported.
        documents = await asyncio.to_thread(made)
        reach("spill.metadata")
        return documents

    async def document(self, document: Document) -> None:
        """Write one of them."""
        path, data = document
        # What is common is durable at once: if it waited, and we gave it up, others' would be given up with it.
        await self._put(f"{path}/{GROUP}" if path else GROUP, [data], len(data), durable=path in self._common)

    async def chunk(self, layout: Layout, image: Bytes, chunk: Chunk) -> int:
        """Write one chunk from where its bytes lie in *image*; returns its crc32c."""
        placed = layout.placed[chunk.index]
        first, nbytes = span(placed, chunk)
        rows, total = image[first : first + nbytes], payload_bytes(placed.slice, chunk)
        if is_run(placed.slice, chunk):
            # The padding is fresh zeros: memory that nobody writes to takes no room.
            return await self.object(chunk.key, [rows, np.zeros(total - nbytes, np.uint8)])
        async with self._room.take(total):
            payload = np.zeros(total, np.uint8)
            target = corner(payload, placed.slice, chunk)
            await in_thread(nbytes, lambda: np.copyto(target, rows.reshape(target.shape)))
            return await self._object(chunk.key, [payload], None)

    async def object(self, key: str, parts: Sequence[Bytes], crc: int | None = None) -> int:
        """Write *parts*, one after the other, and their crc32c, which is returned; *crc* if it is known."""
        async with self._room.take(sum(map(len, parts))):
            return await self._object(key, parts, crc)

    async def _object(self, key: str, parts: Sequence[Bytes], crc: int | None) -> int:
        if not self._still():
            raise SnapshotSkipped(
                f"snapshot {self._id} was overwritten while it was being written to {self._store.url}"
            )
        found = await crc_of(parts) if crc is None else crc
        nbytes = sum(map(len, parts))
        await self._put(key, [*(part for part in parts if len(part)), _CRC.pack(found)], nbytes + CRC_BYTES)
        reach("spill.chunk")
        if self._progress is not None:
            self._progress(nbytes)
        return found

    async def _put(self, key: str, parts: Sequence[Bytes | bytes], nbytes: int, *, durable: bool = False) -> None:
        if self._pace is not None:
            await self._pace(nbytes)
        key = data_of(self._id) + key
        if not durable:
            self._keys.append(key)
        async with self._uploads:
            await self._store.put(key, parts, durable=durable)

    async def commit(self, entry: Entry, sound: Sound | None = None) -> Entry:
        """Make what was written count, unless it has been overwritten, or the snapshot deleted, meanwhile."""
        reach("spill.written")
        # A disk that settles leaves the processor time for the other.
        steps = [self._store.settle, sound] if sound is not None else [self._store.settle]
        await each(steps, lambda step: step(), len(steps))
        reach("spill.settled")
        if not self._still():
            raise SnapshotSkipped(
                f"snapshot {entry.id} was overwritten while it was being written to {self._store.url}"
            )
        key = entry_key(entry.id, entry.rank, entry.world)
        data = await asyncio.to_thread(entry.to_bytes)
        await self._store.put(key, [data])
        reach("spill.committed")
        # Looked for afterwards: a prune that had begun before the entry was there may not have seen it, and would leave it.
        if not await buried(self._store, entry.id):
            return entry
        await self._store.delete([key])
        raise SnapshotSkipped(f"snapshot {snapshot_name(entry.id)} was deleted from {self._store.url} meanwhile")
