"""Reading back: which snapshots a tier holds, and one rank's image out of the tiers that have it.

An image is read chunk by chunk, several at a time, straight to where its bytes belong. Each chunk is verified against the
checksum that it carries and against the one in its entry before it counts; one that is missing or damaged is taken from the
next tier. Nothing here guards against a prune: read under a lease (``leases.reading``).
"""

from __future__ import annotations

import asyncio
import struct
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from ..erasure.kernel import crc32c
from ..errors import Corrupt, HoldfastError, ObjectMissing, SnapshotUnknown, TierUnreachable
from ..snapshot.layout import Layout, Placed
from ..snapshot.record import SnapshotId
from .chunks import CRC_BYTES, corner, is_run, payload_bytes, row_bytes, span
from .entries import Entry, Stored
from .inflight import Buffers, Room, each, fresh
from .names import DELETED, ENTRIES, data_of, entry_key, parse_entry, parse_snapshot, parse_tombstone, parse_whole
from .store import Found, Store

Answer = TypeVar("Answer")
Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
"""Called with how many more bytes of the image are done."""
Landed = Callable[[int, int], None]
"""Called with each run of bytes of the image, its first and its end, that is where it belongs, verified."""

AT_ONCE: Final = 16
IN_FLIGHT_BYTES: Final = 128 << 20
"""What is being read or written at one time; and so the most memory that it takes here, on top of a store's own."""

FOLDERS: Final = 8  # listed at one time

# Sums of less are computed at once: handing them to a thread takes as long.
_THREAD_FROM: Final = 256 << 10
_CRC: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Listed:
    """What a tier's listing says of one snapshot.

    Attributes:
        world: how many ranks it has.
        entries: of the ranks whose images are whole, the objects that say so.
        deleted: it has a tombstone: it is being removed.
        whole: all ranks once knew all of it to be persisted, on this disk and those of other nodes.
    """

    id: SnapshotId
    world: int
    entries: Mapping[int, Found]
    deleted: bool
    whole: bool = False

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks whose images are whole."""
        return frozenset(self.entries)

    @property
    def complete(self) -> bool:
        """Whether the snapshot exists here: the image of every rank, and no tombstone."""
        return len(self.entries) == self.world and not self.deleted


@dataclass(frozen=True, slots=True)
class Damage:
    """An object that a tier should hold and does not, or not as it was written. *key* is relative to the tier."""

    url: str
    key: str
    reason: str


async def list_snapshots(store: Store, *, complete: int | None = None, others: int = 32) -> list[Listed]:
    """The snapshots of which *store* holds the image of any rank, oldest first; objects of other names are not looked at.

    Args:
        complete: if that many are enough: the newest so many that are complete, as many of which all was once known to be
            persisted on all disks together, and the newest *others*. Takes time for those, not for all that are there. None
            that are deleted.
    """
    # Entries first, here and below: a snapshot that is deleted in between has its tombstone before it loses an entry.
    if complete is None:
        found = await store.list(ENTRIES)
        return _listed(found, await _deleted(store))
    names = [name for name in reversed(await store.children(ENTRIES)) if parse_snapshot(name) is not None]
    alive: list[Listed] = []
    deleted = await _deleted(store)
    while names and sum(one.complete for one in alive) < complete:
        while names and sum(one.complete for one in alive) < complete:
            alive += _listed(await _in_folders(store, names[:FOLDERS]), deleted)
            del names[:FOLDERS]
        deleted = await _deleted(store)
        alive = [one for one in alive if not one.deleted and one.id not in deleted]
    alive.sort(key=lambda one: (one.id, one.world))
    chosen = [one for one in alive if one.complete][-complete:]
    chosen += [one for one in alive if one.whole and not one.complete][-complete:]
    chosen += [one for one in alive if not one.complete and not one.whole][-others:] if others else []
    return sorted(chosen, key=lambda one: (one.id, one.world))


async def _in_folders(store: Store, names: Sequence[str]) -> list[Found]:
    """The objects of the entries of those snapshots."""
    found: list[Found] = []

    async def look(name: str) -> None:
        found.extend(await store.list(f"{ENTRIES}{name}/"))

    await each(names, look, FOLDERS)
    return found


async def _deleted(store: Store) -> set[SnapshotId | None]:
    return {parse_tombstone(grave.key) for grave in await store.list(DELETED)}


def _listed(objects: Sequence[Found], deleted: Container[SnapshotId | None]) -> list[Listed]:
    entries: dict[tuple[SnapshotId, int], dict[int, Found]] = {}
    whole = {parse_whole(item.key) for item in objects}
    for item in objects:
        if (parsed := parse_entry(item.key)) is not None:
            id, rank, world = parsed
            entries.setdefault((id, world), {})[rank] = item
    return [
        Listed(id, world, ranks, id in deleted, id in whole)
        for (id, world), ranks in sorted(entries.items(), key=lambda e: e[0])
    ]


async def read_entry(store: Store, id: SnapshotId, rank: int, world: int) -> Entry:
    """The entry of *rank*'s image in *store*.

    Raises:
        SnapshotUnknown: there is none.
        Corrupt: there is one that is damaged, or says that it is another's.
    """
    key = entry_key(id, rank, world)
    try:
        data = await store.get(key)
    except ObjectMissing as error:
        raise SnapshotUnknown(f"{store.url} has no image of rank {rank} of {world} of snapshot {id}") from error
    entry = await asyncio.to_thread(Entry.from_bytes, data, f"{key} in {store.url}")
    if (entry.id, entry.rank, entry.world) != (id, rank, world):
        raise Corrupt(f"{key} in {store.url} is the entry of rank {entry.rank} of {entry.world} of {entry.id}")
    return entry


async def read_entries(store: Store, listed: Listed) -> dict[int, Entry]:
    """The entries of all images that *listed* names, by rank; raises as ``read_entry``."""
    found: dict[int, Entry] = {}

    async def read(rank: int) -> None:
        found[rank] = await read_entry(store, listed.id, rank, listed.world)

    await each(sorted(listed.entries), read, AT_ONCE)
    return dict(sorted(found.items()))


class Memory:
    """What reading takes on top of where the bytes go: by one reader, or together by all that share it."""

    def __init__(self, nbytes: int = IN_FLIGHT_BYTES) -> None:
        self.room = Room(nbytes)
        self.buffers = Buffers(nbytes)


class ImageReader:
    """One rank's image, out of one or several tiers that hold it.

    Attributes:
        entry: what is read; checksums are this entry's, whichever tier an object comes from.
        damaged: what was found missing or damaged so far.
    """

    def __init__(self, entry: Entry, stores: Sequence[Store], memory: Memory | None = None) -> None:
        """*stores*: nearest first. Any may lack some or all of it. *memory*: shared with others who read."""
        assert stores
        self.entry = entry
        self.damaged: list[Damage] = []
        self._stores = stores
        self._away: set[int] = set()  # indices of stores that did not answer
        memory = memory or Memory()
        self._room, self._buffers = memory.room, memory.buffers

    @property
    def layout(self) -> Layout:
        """How the image is laid out."""
        return self.entry.layout

    async def read_image(
        self, out: Bytes, progress: Progress | None = None, landed: Landed = lambda first, end: None
    ) -> None:
        """Read all of it.

        Args:
            out: ``uint8[entry.image_bytes]``: every slice at its offset, the values from ``values_offset`` on, zeros in the
                gaps. If this raises, it holds anything.
            landed: told of every byte once.

        Raises:
            Corrupt: no tier has an undamaged copy of some object; ``damaged`` says which.
            TierUnreachable: one that may have it does not answer.
        """
        if out.shape != (self.entry.image_bytes,):
            raise ValueError(f"an image of {self.entry.image_bytes} bytes does not go into {out.shape}")
        values_offset = self.layout.values_offset
        end = 0
        for offset, after in [*((placed.offset, placed.end) for placed in self.layout.placed), (values_offset, 0)]:
            out[end:offset] = 0
            landed(end, offset)
            end = after

        async def read(stored: Stored | None) -> None:
            if stored is None:
                first, done = values_offset, self.entry.values.nbytes
                await self._read_values(out[values_offset:])
            else:
                first, done = span(self.layout.placed[stored.chunk.index], stored.chunk)
                await self._read_rows(stored, out[first : first + done], 0)
            landed(first, first + done)
            if progress is not None:
                progress(done)

        await each([*self.entry.chunks, None], read, AT_ONCE)

    async def read_slice(self, index: int, out: Bytes, first_row: int = 0, rows: int | None = None) -> None:
        """Read *rows* rows (None: all that follow) of slice number *index*, from its *first_row* on.

        Args:
            out: ``uint8``, as long as the rows are. If this raises, it holds anything.

        Raises:
            As ``read_image``. Whole chunks are read and verified, whatever part of them is wanted.
        """
        piece = self.layout.placed[index].slice
        last = piece.rows if rows is None else first_row + rows
        size = row_bytes(piece)
        if not 0 <= first_row <= last <= piece.rows or out.shape != ((last - first_row) * size,):
            raise ValueError(f"rows {first_row} to {last} of {piece.rows} of {piece.name} do not go into {out.shape}")

        async def read(stored: Stored) -> None:
            chunk = stored.chunk
            low, high = max(first_row, chunk.first_row), min(last, chunk.first_row + chunk.rows)
            target = out[(low - first_row) * size : (high - first_row) * size]
            await self._read_rows(stored, target, low - chunk.first_row)

        chunks = self._chunks_of.get(index, []) if last > first_row else []
        low = bisect_right(chunks, first_row, key=lambda s: s.chunk.first_row) - 1
        high = bisect_left(chunks, last, key=lambda s: s.chunk.first_row)
        await each(chunks[max(low, 0) : high], read, AT_ONCE)

    @cached_property
    def _chunks_of(self) -> dict[int, list[Stored]]:
        """By slice: its chunks, which hold each of its rows once, in the order of their rows."""
        found: dict[int, list[Stored]] = {}
        for stored in sorted(self.entry.chunks, key=lambda s: s.chunk.first_row):
            found.setdefault(stored.chunk.index, []).append(stored)
        return found

    async def read_values(self) -> bytes:
        """The eager values, as ``snapshot.codec`` encoded them. Raises as ``read_image``."""
        out = fresh(self.entry.values.nbytes)
        await self._read_values(out)
        return out.tobytes()

    @asynccontextmanager
    async def payload(self, stored: Stored) -> AsyncIterator[Bytes]:
        """The payload of a chunk as it is stored, padding included, verified; valid within the block. Raises as
        ``read_image``."""
        nbytes = payload_bytes(self._placed(stored).slice, stored.chunk)
        async with self._room.take(nbytes):
            with self._buffers.borrow(nbytes) as held:
                await self._fetch(stored.chunk.key, stored.crc, [held])
                yield held

    async def verify(self, progress: Progress | None = None) -> list[Damage]:
        """Read every object of the image in every one of the stores, and say which are missing or damaged.

        Raises:
            TierUnreachable: a store does not answer.
        """
        found: list[Damage] = []
        values = self.entry.values

        async def check(what: tuple[Store, Stored | None]) -> None:
            store, stored = what
            key, crc, nbytes = values.key, values.crc, values.nbytes
            if stored is not None:
                key, crc = stored.chunk.key, stored.crc
                nbytes = payload_bytes(self._placed(stored).slice, stored.chunk)
            async with self._room.take(nbytes):
                with self._buffers.borrow(nbytes) as held:
                    try:
                        await self._read_from(store, key, crc, [held])
                    except (Corrupt, ObjectMissing) as error:
                        found.append(self._damage(store, key, error))
            if progress is not None:
                progress(nbytes)

        objects: list[Stored | None] = [*self.entry.chunks, *([None] if values.nbytes else [])]
        await each([(store, stored) for store in self._stores for stored in objects], check, AT_ONCE)
        return found

    # -- one object ------------------------------------------------------------------------------------------------------

    def _placed(self, stored: Stored) -> Placed:
        return self.layout.placed[stored.chunk.index]

    async def _read_rows(self, stored: Stored, out: Bytes, first: int) -> None:
        """Read rows of one chunk, counted from its own *first*, as many as *out* takes."""
        chunk, piece = stored.chunk, self._placed(stored).slice
        total, size = payload_bytes(piece, chunk), row_bytes(piece)
        if is_run(piece, chunk) and len(out) == chunk.rows * size:
            async with self._room.take(total):
                await self._fetch(chunk.key, stored.crc, [out, fresh(total - len(out))])
            return
        async with self.payload(stored) as held:
            rows = corner(held, piece, chunk)[first : first + len(out) // size]
            await in_thread(len(out), lambda: np.copyto(out.reshape(rows.shape), rows))

    async def _read_values(self, out: Bytes) -> None:
        if len(out):
            async with self._room.take(len(out)):
                await self._fetch(self.entry.values.key, self.entry.values.crc, [out])

    async def _fetch(self, key: str, crc: int, parts: Sequence[Bytes]) -> None:
        """Fill *parts* with the payload of the object, from the nearest store that has it undamaged."""
        failed: list[HoldfastError] = []
        # Stores that did not answer come last: each try of them may take as long as their deadline.
        for index in sorted(range(len(self._stores)), key=lambda i: (i in self._away, i)):
            store = self._stores[index]
            try:
                await self._read_from(store, key, crc, parts)
            except (Corrupt, ObjectMissing) as error:
                self.damaged.append(self._damage(store, key, error))
                failed.append(error)
            except TierUnreachable as error:
                self._away.add(index)
                failed.append(error)
            else:
                return
        unreachable = [error for error in failed if isinstance(error, TierUnreachable)]
        if unreachable:
            raise unreachable[0]
        raise Corrupt(f"no tier has an undamaged copy of {self._key(key)}: {'; '.join(map(str, failed))}") from failed[
            -1
        ]

    async def _read_from(self, store: Store, key: str, crc: int, parts: Sequence[Bytes]) -> None:
        """Fill *parts* with the payload of the object in *store*, verified. Raises ``Corrupt`` and what stores raise."""
        tail = bytearray(CRC_BYTES)
        views = [part.data for part in parts if len(part)]
        await store.read_into(self._key(key), [*views, memoryview(tail)])
        found = await crc_of(parts)
        if found != crc or _CRC.unpack(tail)[0] != crc:
            raise Corrupt(
                f"{self._key(key)} in {store.url}: its bytes make the checksum {found:08x}, it says "
                f"{_CRC.unpack(tail)[0]:08x}, its entry says {crc:08x}"
            )

    def _key(self, key: str) -> str:
        return data_of(self.entry.id) + key

    def _damage(self, store: Store, key: str, error: HoldfastError) -> Damage:
        return Damage(store.url, self._key(key), str(error))


async def crc_of(parts: Sequence[Bytes]) -> int:
    """The crc32c of *parts*, one after the other."""

    def compute() -> int:
        value = 0
        for part in parts:
            value = crc32c(part, value)
        return value

    return await in_thread(sum(map(len, parts)), compute)


async def in_thread(nbytes: int, work: Callable[[], Answer]) -> Answer:
    """Call *work*, which handles so many bytes without the GIL: in a thread where that pays."""
    if nbytes < _THREAD_FROM:
        return work()
    return await asyncio.to_thread(work)
