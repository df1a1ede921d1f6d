"""Checks what a tier holds of a snapshot, object by object, and mends it from wherever the same bytes are sound.

Mending writes what the entry says was there, so it changes nothing that a reader relies on; and an entry that is damaged is
written last, once all that it speaks of is sound: to be killed in between leaves things no worse than they were.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..erasure.kernel import crc32c
from ..errors import Corrupt, HoldfastError, ObjectMissing
from ..snapshot.record import SnapshotId
from ..storage.arrays import array_metadata, group_metadata, values_metadata
from ..storage.chunks import corner, payload_bytes, plan
from ..storage.entries import FORMAT, Entry
from ..storage.inflight import each
from ..storage.leases import reading
from ..storage.names import GROUP, data_of, entries_of, entry_key, values_path
from ..storage.reader import ImageReader, Listed, read_entry
from ..storage.store import Store
from ..storage.writer import mend
from .contents import Image
from .memory import MemorySource
from .progress import Bar
from .sources import Note

_RANKS_AT_ONCE: Final = 2
_META_AT_ONCE: Final = 16
_MATTERS: Final = ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")


@dataclass(slots=True)
class Fault:
    """An object that is missing, or not as it was written. ``hindrance``: why it could not be mended; None if nobody tried."""

    place: str
    key: str
    reason: str
    mended: bool = False
    hindrance: str | None = None


@dataclass(slots=True)
class Checked:
    """What was found of one snapshot in one place. ``ranks``: how many have an image there."""

    place: str
    job: str
    id: SnapshotId
    world: int
    ranks: int
    nbytes: int = 0
    faults: list[Fault] = field(default_factory=list)


class Checker:
    """Checks snapshots in the stores of a source, one after the other."""

    def __init__(
        self, stores: Sequence[Store], memories: Sequence[MemorySource], bar: Bar, note: Note, *, repair: bool
    ) -> None:
        """*stores*: those to check, and others in which sound bytes may be; *memories*: where they may be too."""
        self._stores, self._memories = stores, memories
        self._bar, self._note, self._repair = bar, note, repair

    async def check(self, index: int, here: Listed) -> Checked:
        """Check what store number *index* holds of a snapshot.

        Raises:
            SnapshotUnknown: it has been deleted meanwhile.
            TierUnreachable: the store does not answer.
        """
        store = self._stores[index]
        found = Checked(store.url, "", here.id, here.world, len(here.entries))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(reading(store, here.id))
            others = await self._others(stack, index, here)
            images = await self._images(stack, here)

            async def one(rank: int) -> None:
                await _Rank(store, others, images.get(rank), found, self._repair).check(here, rank, self._bar)

            await each(sorted(here.entries), one, _RANKS_AT_ONCE)
        found.faults.sort(key=lambda fault: fault.key)
        return found

    async def _others(self, stack: AsyncExitStack, index: int, here: Listed) -> list[Store]:
        """Other stores that have the snapshot, guarded against a prune."""
        if not self._repair:
            return []
        others: list[Store] = []
        for other in [*self._stores[:index], *self._stores[index + 1 :]]:
            try:
                if await other.list(entries_of(here.id)):
                    await stack.enter_async_context(reading(other, here.id))
                    others.append(other)
            except HoldfastError as error:
                self._note(f"{other.url}: {error}")
        return others

    async def _images(self, stack: AsyncExitStack, here: Listed) -> dict[int, Image]:
        """Images of the snapshot in memory, by rank."""
        images: dict[int, Image] = {}
        for memory in self._memories if self._repair else ():
            for listing in await memory.snapshots():
                if (listing.id, listing.world) == (here.id, here.world):
                    opened = await stack.enter_async_context(memory.open(listing))
                    images |= opened.images
        return images


class _Rank:
    """One rank's image in one store."""

    def __init__(
        self, store: Store, others: Sequence[Store], image: Image | None, found: Checked, repair: bool
    ) -> None:
        self._store, self._others, self._image = store, others, image
        self._found, self._repair = found, repair

    async def check(self, here: Listed, rank: int, bar: Bar) -> None:
        key = entry_key(here.id, rank, here.world)
        spoiled: Fault | None = None
        try:
            entry: Entry | None = await read_entry(self._store, here.id, rank, here.world)
        except (Corrupt, ObjectMissing) as error:
            spoiled = self._fault(key, str(error))
            entry = await self._elsewhere(here, rank)
        if entry is None:
            return
        self._found.job = self._found.job or entry.job
        bar.expect(entry.stored_bytes)
        faults = await self._metadata(entry)
        for damage in await ImageReader(entry, [self._store]).verify(bar.advance):
            faults.append(self._fault(damage.key, damage.reason))
            if self._repair:
                await self._attempt(faults[-1], self._mend(entry, damage.key))
        self._found.nbytes += entry.stored_bytes
        if spoiled is not None and all(fault.mended for fault in faults):
            await self._attempt(spoiled, self._store.put(key, [entry.to_bytes()]))

    def _fault(self, key: str, reason: str) -> Fault:
        fault = Fault(self._store.url, key, reason)
        self._found.faults.append(fault)
        return fault

    async def _attempt(self, fault: Fault, work: Any) -> None:
        try:
            await work
            fault.mended = True
        except HoldfastError as error:
            fault.hindrance = str(error)

    async def _elsewhere(self, here: Listed, rank: int) -> Entry | None:
        """The same entry in another store; None if there is none, or none is wanted."""
        for other in self._others:
            try:
                return await read_entry(other, here.id, rank, here.world)
            except HoldfastError:
                continue
        return None

    # -- chunks and values -------------------------------------------------------------------------------------------

    async def _mend(self, entry: Entry, key: str) -> None:
        """Write one object anew. Raises ``Corrupt`` if nobody has it sound."""
        if self._others:
            try:
                await mend(self._store, entry, self._others, [key])
                return
            except HoldfastError:
                if self._image is None:
                    raise
        if self._image is None:
            raise Corrupt("no other source has this snapshot")
        await self._mend_from_memory(entry, key)

    async def _mend_from_memory(self, entry: Entry, key: str) -> None:
        assert self._image is not None
        if self._image.layout != entry.layout:
            raise Corrupt("the image in memory has another layout")
        relative = key.removeprefix(data_of(entry.id))
        if relative == entry.values.key:
            payload, crc = np.frombuffer(await self._image.read_values(), np.uint8), entry.values.crc
        else:
            stored = next(stored for stored in entry.chunks if stored.chunk.key == relative)
            piece, chunk, crc = entry.layout.placed[stored.chunk.index].slice, stored.chunk, stored.crc
            payload = np.zeros(payload_bytes(piece, chunk), np.uint8)
            target = corner(payload, piece, chunk)
            rows = np.empty(target.size, np.uint8)
            await self._image.read_slice(chunk.index, rows, chunk.first_row, chunk.rows)
            target[...] = rows.reshape(target.shape)
        if crc32c(payload) != crc:
            raise Corrupt("the image in memory holds other bytes")
        await self._store.put(key, [payload, struct.pack("<I", crc)])

    # -- metadata ----------------------------------------------------------------------------------------------------

    async def _metadata(self, entry: Entry) -> list[Fault]:
        """Check the ``zarr.json`` that are this rank's to write."""
        faults: list[Fault] = []

        async def look(document: tuple[str, bytes]) -> None:
            path, made = document
            key = data_of(entry.id) + (f"{path}/{GROUP}" if path else GROUP)
            try:
                reason = _unlike(await self._store.get(key), made)
            except (Corrupt, ObjectMissing) as error:
                reason = str(error)
            if reason is not None:
                faults.append(self._fault(key, reason))
                if self._repair:
                    await self._attempt(faults[-1], self._store.put(key, [made]))

        await each(await asyncio.to_thread(_documents, entry), look, _META_AT_ONCE)
        return faults


def _documents(entry: Entry) -> list[tuple[str, bytes]]:
    """Path and contents of the metadata that the entry's rank wrote."""
    wanted = plan(entry.layout, entry.rank)
    facts = {"format": FORMAT, "job": entry.job, "run": entry.id.run, "generation": entry.id.generation,
             "step": entry.id.step, "world": entry.world}  # fmt: skip
    found = [(path, group_metadata(None if path else facts)) for path in wanted.groups]
    found += [(array.path, array_metadata(array)) for array in wanted.arrays]
    return [*found, (values_path(entry.rank), values_metadata(entry.values.nbytes))]


def _unlike(held: bytes, made: bytes) -> str | None:
    """What zarr metadata say that they should not; other versions of zarr may say the same in more words."""
    try:
        document = json.loads(held)
        wanted = json.loads(made)
        unlike = [key for key in _MATTERS if document.get(key) != wanted.get(key)]
    except (ValueError, AttributeError, RecursionError) as error:
        return f"unreadable metadata: {error}"
    return f"metadata with another {', '.join(unlike)}" if unlike else None
