"""The shared memory of a job on this node: made, found again, measured, read. The only place where the agent touches it.

Nothing is remembered that the slots do not say themselves, so a restarted agent knows all that its predecessor did.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..crashpoints import reach
from ..erasure.kernel import BLOCK_BYTES, crc32c
from ..errors import BudgetExceeded, ConfigError, Corrupt, SnapshotUnknown
from ..snapshot.arena import Place, Slot, place_for, scan
from ..snapshot.layout import Layout
from ..snapshot.record import Record
from ..snapshot.recovery import Held
from .budget import Memory
from .protocol import Flight
from .settings import NodeSettings, job_hash

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageSums:
    """The block checksums of one image, ``uint32[blocks]``."""

    image_bytes: int
    checks: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class ImageReading:
    """One image, read in full: checksum of each slice's bytes and of the values, and the blocks that are damaged."""

    held: Held
    layout: Layout
    slice_crcs: list[int]
    values_crc: int
    bad_blocks: list[int]
    block_bytes: int


class Arenas:
    """All slots of the job on this node. Not thread safe, except where a method says so."""

    def __init__(
        self, settings: NodeSettings, agent: str, limit_bytes: int | None, memory: Callable[[Path], Memory]
    ) -> None:
        self._settings = settings
        self._agent = agent
        self._limit_bytes = limit_bytes
        self._memory = memory
        self._slots: dict[tuple[int, int], Slot] = {}
        self._job = job_hash(settings.job)
        self.foreign: list[str] = []
        # Checksums release the GIL; more threads than this gain nothing over memory bandwidth.
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "checksum")

    # -- finding and making slots ------------------------------------------------------------------------------------

    def adopt(self) -> list[Record]:
        """Map what lies in the folder already; returns the sealed records found. Foreign files are left alone."""
        places, self.foreign = scan(self._settings.shm)
        for place in places:
            slot = Slot.open(place)
            self._slots[place.rank, place.index] = slot
            record = slot.sealed_record()
            if record is not None and record.job != self._job:
                raise ConfigError(
                    f"{place.path} holds a snapshot of another job than {self._settings.job!r}; "
                    f"give every job a folder of its own (HOLDFAST_SHM)"
                )
        if self.foreign:
            _log.warning(
                "files in %s that are not ours are left alone: %s", self._settings.shm, ", ".join(self.foreign)
            )
        return [record for _, record in self._sealed()]

    def reserve(self, rank: int, slots: int, *, image_bytes: int, table_bytes: int) -> list[Place]:
        """Have *slots* slots for *rank*, each free one at least of the given sizes. Their memory is reserved, not mapped.

        Sealed slots are kept as they are, whatever their size.

        Raises:
            BudgetExceeded: with what is needed, what is available, and where to change it. Nothing was made then.
        """
        wanted = [
            place_for(self._settings.shm, rank, i, image_bytes=image_bytes, table_bytes=table_bytes)
            for i in range(slots)
        ]
        missing = [place for place in wanted if not self._reusable(place)]
        self._check_budget(missing)
        for place in missing:
            self._make(place)
        return [self._slots[rank, i].place for i in range(slots)]

    def grow(self, rank: int, index: int, *, image_bytes: int, table_bytes: int) -> Place:
        """Replace a slot by a larger one. What it held is gone: only its trainer knows that it may go.

        Raises ``BudgetExceeded``; the slot then is as large as it was, and free.
        """
        place = place_for(self._settings.shm, rank, index, image_bytes=image_bytes, table_bytes=table_bytes)
        self._check_budget([place])
        before = self._slots[rank, index].place
        try:
            self._make(place)
        except BudgetExceeded:  # somebody else took the memory meanwhile; what we had is there again
            self._make(before)
            raise
        return place

    def place(self, rank: int, index: int) -> Place | None:
        """Where a slot lies now, if it exists."""
        slot = self._slots.get((rank, index))
        return slot.place if slot else None

    def prefault(self, places: Iterable[Place]) -> None:
        """Have the memory of these slots mapped. Blocks; called in a worker thread, for several ranks at once."""
        for place in places:
            self._slots[place.rank, place.index].prefault()

    def _reusable(self, place: Place) -> bool:
        """Whether the slot that lies there already can stay."""
        slot = self._slots.get((place.rank, place.index))
        if slot is None:
            return False
        if not slot.in_place:  # somebody removed the file, or put another in its place
            del self._slots[place.rank, place.index]
            slot.close()
            return False
        if slot.sealed_record() is not None:
            return True
        if slot.place.file_bytes == place.file_bytes:  # without a record its division is open; the trainer knows it
            if slot.place != place:
                self._slots[place.rank, place.index] = Slot.open(place)
                slot.close()
            return True
        divided = slot.place.table_bytes > 0
        # In flight: whoever fills it will tell us of it again, or is dead; it grows when it is free.
        return divided and (slot.word != 0 or slot.place.holds(place.table_bytes, place.image_bytes))

    def _make(self, place: Place) -> None:
        old = self._slots.pop((place.rank, place.index), None)
        if old is not None:  # its memory goes first: the budget has no room for both
            old.close()
            Path(old.place.path).unlink(missing_ok=True)
        self._slots[place.rank, place.index] = Slot.create(place)

    def _check_budget(self, missing: Iterable[Place]) -> None:
        new = sum(place.file_bytes for place in missing)
        freed = sum(self._slots[p.rank, p.index].place.file_bytes for p in missing if (p.rank, p.index) in self._slots)
        if new <= freed:
            return
        after = self.reserved_bytes - freed + new
        if self._limit_bytes is not None and after > self._limit_bytes:
            raise BudgetExceeded(
                f"snapshots on this node would take {after} bytes of memory, {self._limit_bytes} are allowed "
                f"(--memory-limit of holdfast agent, HOLDFAST_MEMORY_LIMIT)"
            )
        self._memory(self._settings.shm).check(new - freed)

    # -- sealing -----------------------------------------------------------------------------------------------------

    def slot(self, rank: int, index: int) -> Slot:
        """The mapped slot. KeyError if there is none: our own bug, since every session begins with ``reserve``."""
        return self._slots[rank, index]

    def checksum(self, rank: int, index: int, image_bytes: int) -> ImageSums:
        """Checksum the image that lies in the slot now. Called in a worker thread. Raises ``Corrupt`` if it cannot."""
        if (rank, index) not in self._slots:
            raise Corrupt(f"rank {rank} has no slot {index}")
        checks = self._slots[rank, index].checksums(image_bytes, BLOCK_BYTES, self._pool)
        return ImageSums(image_bytes, checks)

    def write_record(
        self, index: int, flight: Flight, sums: ImageSums, *, rank: int, world: int, layout: bytes
    ) -> None:
        """Write tables, then record. A crash before the record is whole leaves the slot unsealed."""
        slot = self._slots[rank, index]
        reach("seal.before-tables")
        slot.write_tables(sums.checks, layout)
        reach("seal.before-record")
        slot.write_record(
            Record(
                id=flight.id, watermark=flight.watermark, rank=rank, world=world, job=self._job,
                image_bytes=sums.image_bytes, table_bytes=slot.place.table_bytes, block_bytes=BLOCK_BYTES,
                layout_bytes=len(layout), checks_crc=crc32c(sums.checks), layout_crc=crc32c(layout), nonce=flight.nonce,
            )
        )  # fmt: skip
        reach("seal.after-record")

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def reserved_bytes(self) -> int:
        """Shared memory taken by all slots."""
        return sum(slot.place.file_bytes for slot in self._slots.values())

    @property
    def limit_bytes(self) -> int | None:
        """The declared budget, if there is one."""
        return self._limit_bytes

    def places(self) -> list[tuple[Place, Record | None, bool]]:
        """Every slot with its sealed record, if any, and whether it is being filled."""
        return [
            (slot.place, record := slot.sealed_record(), record is None and slot.word != 0)
            for _, slot in sorted(self._slots.items())
        ]

    def inventory(self) -> list[Held]:
        """Every sealed image held here."""
        return [self._held(slot, record) for slot, record in self._sealed()]

    def spoiled(self) -> list[str]:
        """Slots that were sealed once, and whose record cannot be read any more."""
        return [slot.place.path for _, slot in sorted(self._slots.items()) if slot.spoiled]

    def read(self, run: str, step: int) -> list[ImageReading]:
        """Read every image of a snapshot in full. *run* may be a prefix. Called in a worker thread.

        Raises ``SnapshotUnknown`` if no image of it is held here.
        """
        found = [(s, r) for s, r in self._sealed() if r.id.step == step and r.id.run.startswith(run)]
        if not found:
            held = ", ".join(sorted({str(h.id) for h in self.inventory()})) or "none"
            raise SnapshotUnknown(f"agent {self._agent} holds no snapshot {run}/{step}; it holds: {held}")
        return [self._reading(slot, record) for slot, record in found]

    def remove(self) -> None:
        """Give all memory back; what was held is gone."""
        for slot in self._slots.values():
            Path(slot.place.path).unlink(missing_ok=True)
            slot.close()
        self._slots.clear()

    def close(self) -> None:
        """Unmap everything; the slots stay for the next agent."""
        self._pool.shutdown(wait=True)
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()

    def _sealed(self) -> Iterator[tuple[Slot, Record]]:
        for _, slot in sorted(self._slots.items()):
            record = slot.sealed_record()
            if record is not None:
                yield slot, record

    def _held(self, slot: Slot, r: Record) -> Held:
        return Held(r.id, r.rank, r.world, r.watermark, self._agent, slot.place.path, r.image_bytes)

    def _reading(self, slot: Slot, record: Record) -> ImageReading:
        """Read one image. The trainer may overwrite it meanwhile: then what was read says nothing about it."""
        try:
            checks, text = slot.read_tables(record)
            layout = Layout.from_text(text)
            found = slot.checksums(record.image_bytes, record.block_bytes, self._pool)
            image = slot.image[: record.image_bytes]
            return ImageReading(
                self._held(slot, record),
                layout,
                [crc32c(image[item.offset : item.end]) for item in layout.placed],
                crc32c(image[layout.values_offset :]),
                [int(i) for i in np.flatnonzero(found != checks)],
                record.block_bytes,
            )
        finally:
            if slot.sealed_record() != record:
                raise SnapshotUnknown(
                    f"{record.id} of rank {record.rank} was overwritten while it was read; list again"
                )
