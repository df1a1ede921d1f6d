"""The shared memory of a job on this node: made, found again, measured, read. The only place where the agent touches it.

Nothing is remembered that the slots do not say themselves, so a restarted agent knows all that its predecessor did.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..crashpoints import reach
from ..erasure.kernel import crc32c
from ..errors import BudgetExceeded, ConfigError, Corrupt, SnapshotUnknown
from ..snapshot.arena import KnownChecks, Place, Slot, Window, place_for, scan
from ..snapshot.layout import Layout, align
from ..snapshot.record import OPEN_WORD, Record, SnapshotId, block_bytes_for, new_nonce
from ..snapshot.recovery import Held
from ..snapshot.unchanged import Unchanged
from .budget import Memory
from .guard import Cell, Stage
from .manifest import CellTable, Manifest
from .protocol import Flight
from .settings import NodeSettings, job_hash
from .sums import Sums
from .tasks import to_the_end

_log = logging.getLogger(__name__)
_WINDOW_STEP = 1 << 20  # windows are multiples of this: they seldom have to grow
Checks = npt.NDArray[np.uint32]


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
    """All slots of the job on this node. Methods may be called on any thread.

    What makes slots (``reserve``, ``grow``, ``free_slot``, ``reserve_cells``, ``open_cell``) takes as long as the kernel needs to
    clear their memory, so it is called in worker threads; one at a time, or two of them would spend the same budget. All
    others never wait for these: dictionaries are changed by single stores, which put whole slots there, and are copied
    before they are gone through. A slot that is being replaced by a larger one holds nothing meanwhile.

    Who may fill or free which slot, and when, is for the callers to keep apart.
    """

    def __init__(
        self, settings: NodeSettings, agent: str, limit_bytes: int | None, memory: Callable[[Path], Memory]
    ) -> None:
        self._settings = settings
        self._agent = agent
        self._limit_bytes = limit_bytes
        self._memory = memory
        self._slots: dict[tuple[int, int], Slot] = {}
        self._cells: dict[tuple[int, int], Slot] = {}  # by lane and index
        self._windows: dict[tuple[int, int], Window] = {}  # by reader and index
        self._named: dict[
            tuple[int, int], tuple[int, int, int]
        ] = {}  # by lane and index: nonce, key and me of its table
        self._asked: dict[int, int] = {}  # how many slots each rank has asked for
        self._filling: set[tuple[int, int]] = set()  # slots that ``free_slot`` gave to somebody who fills them now
        self._cell_shape = (0, 0)  # lanes, and cells of each, as reserved last
        self._making = threading.RLock()  # held from the look at the budget until the memory is taken
        self._job = job_hash(settings.job)
        self.foreign: list[str] = []
        # Checksums release the GIL; more threads than this gain nothing over memory bandwidth.
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "checksum")

    # -- finding and making slots ------------------------------------------------------------------------------------

    def adopt(self) -> list[Record]:
        """Map what lies in the folder already; returns the sealed records found. Foreign files are left alone, windows of the
        agent before are removed."""
        places, self.foreign = scan(self._settings.shm)
        for place in places:
            slot = Slot.open(place)
            (self._cells if place.parity else self._slots)[place.rank, place.index] = slot
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
        with self._making:
            missing = [place for place in wanted if not self._reusable(place)]
            self._check_budget(missing)
            for place in missing:
                self._make(place)
            self._asked[rank] = slots
            return [self._slots[rank, i].place for i in range(slots)]

    def grow(self, rank: int, index: int, *, image_bytes: int, table_bytes: int) -> Place:
        """Replace a slot by a larger one. What it held is gone: only its trainer knows that it may go.

        Raises ``BudgetExceeded``; the slot then is as large as it was, and free.
        """
        place = place_for(self._settings.shm, rank, index, image_bytes=image_bytes, table_bytes=table_bytes)
        with self._making:
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
            self._slots.pop((place.rank, place.index), None)
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
        mapped, where = self._mapped(place), (place.rank, place.index)
        old = mapped.get(where)
        if old is not None:  # its memory goes first: the budget has no room for both
            old.close()
            Path(old.place.path).unlink(missing_ok=True)
        try:
            mapped[where] = Slot.create(place)
        except BudgetExceeded:
            mapped.pop(where, None)  # it has no file any more
            raise

    def _mapped(self, place: Place) -> dict[tuple[int, int], Slot]:
        return self._cells if place.parity else self._slots

    def _check_budget(self, missing: Sequence[Place]) -> None:
        new = sum(place.file_bytes for place in missing)
        old = (self._mapped(place).get((place.rank, place.index)) for place in missing)
        freed = sum(slot.place.file_bytes for slot in old if slot is not None)
        self._check_room(new - freed)

    def _check_room(self, more_bytes: int) -> None:
        """Raise ``BudgetExceeded`` if so much more cannot be had."""
        if more_bytes <= 0:
            return
        after = self.reserved_bytes + more_bytes
        if self._limit_bytes is not None and after > self._limit_bytes:
            raise BudgetExceeded(
                f"snapshots on this node would take {after} bytes of memory, {self._limit_bytes} are allowed "
                f"(--memory-limit of holdfast agent, HOLDFAST_MEMORY_LIMIT)"
            )
        self._memory(self._settings.shm).check(more_bytes)

    # -- sealing -----------------------------------------------------------------------------------------------------

    def slot(self, rank: int, index: int) -> Slot:
        """The mapped slot. KeyError if there is none: our own bug, since every session begins with ``reserve``."""
        return self._slots[rank, index]

    def checksum(self, rank: int, index: int, image_bytes: int, unchanged: Unchanged | None = None) -> ImageSums:
        """Checksum the image that lies in the slot now; what is *unchanged* keeps the checksums that the slot has of it.

        Called in a worker thread. Raises ``Corrupt`` if it cannot.
        """
        if (rank, index) not in self._slots:
            raise Corrupt(f"rank {rank} has no slot {index}")
        slot, block_bytes = self._slots[rank, index], block_bytes_for(image_bytes)
        known = slot.known_checks(unchanged, image_bytes, block_bytes) if unchanged is not None else None
        return ImageSums(image_bytes, slot.checksums(image_bytes, block_bytes, self._pool, known))

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
                image_bytes=sums.image_bytes, table_bytes=slot.place.table_bytes, block_bytes=block_bytes_for(sums.image_bytes),
                layout_bytes=len(layout), checks_crc=crc32c(sums.checks), layout_crc=crc32c(layout), nonce=flight.nonce,
            )
        )  # fmt: skip
        reach("seal.after-record")

    # -- images for other agents -------------------------------------------------------------------------------------

    def manifest(self, rank: int, id: SnapshotId, checks_crc: int | None = None) -> Manifest | None:
        """The manifest of a recorded image, sealed or waiting for its trainer's verdict; None if it is not here."""
        slot = self.image(rank, id, checks_crc)
        if slot is None:
            return None
        record, _ = slot.read_record()
        try:
            checks, layout = slot.read_tables(record)
        except Corrupt:  # overwritten meanwhile, or damaged: either way it is not here
            return None
        return Manifest(record, checks, layout)

    def image(self, rank: int, id: SnapshotId, checks_crc: int | None = None) -> Slot | None:
        """The slot that holds that image, sealed or waiting for its trainer's verdict."""
        for (its_rank, _), slot in sorted(self._slots.items()):
            record = recorded(slot) if its_rank == rank else None
            if record is not None and record.id == id and checks_crc in (None, record.checks_crc):
                return slot
        return None

    def free_slot(
        self, rank: int, keep: SnapshotId, *, image_bytes: int, table_bytes: int, apart: bool = False
    ) -> Slot:
        """A slot for an image of *rank*, unsealed: a free one, else one that holds anything but *keep*, else a new one.

        Slots that are too small are replaced by larger ones; their trainer looks at them again after a restore. Nobody else
        is given the slot until ``filled`` says that this is over.

        Args:
            rank: whose image it will hold.
            keep: the snapshot that stays if it is here.
            image_bytes, table_bytes: what must fit.
            apart: none of those that a trainer of *rank* asked for: it is training, and they are its own.

        Raises ``BudgetExceeded``.
        """
        first = self._asked.get(rank, 0) if apart else 0

        def cost(slot: Slot) -> tuple[bool, bool]:
            held = slot.sealed_record()
            return held is not None, held is not None and held.id < keep

        with self._making:
            mine = {index: slot for (its, index), slot in sorted(self._slots.items()) if its == rank}
            others = [s for i, s in mine.items() if i >= first and (rank, i) not in self._filling]
            may_go = [s for s in sorted(others, key=cost) if (held := s.sealed_record()) is None or held.id != keep]
            for slot in may_go:
                if slot.word != OPEN_WORD and slot.place.table_bytes and slot.place.holds(table_bytes, image_bytes):
                    slot.unseal()
                    self._filling.add((rank, slot.place.index))
                    return slot
            index = may_go[0].place.index if may_go else max(max(mine, default=-1) + 1, first)
            place = place_for(self._settings.shm, rank, index, table_bytes=table_bytes, image_bytes=image_bytes)
            self._check_budget([place])
            self._make(place)
            self._filling.add((rank, index))
            return self._slots[rank, index]

    @asynccontextmanager
    async def filling(
        self, rank: int, keep: SnapshotId, *, image_bytes: int, table_bytes: int, apart: bool = False
    ) -> AsyncIterator[Slot]:
        """A ``free_slot``, mapped, which within this block is nobody else's. On the event loop."""
        taken: list[Slot] = []

        def take() -> None:
            # No prefault: the memory is reserved, and whoever writes maps it as he goes, on all cores, while bytes arrive.
            taken.append(self.free_slot(rank, keep, apart=apart, image_bytes=image_bytes, table_bytes=table_bytes))

        try:
            await to_the_end(asyncio.to_thread(take))
            yield taken[0]
        finally:
            for slot in taken:
                self.filled(slot)

    def filled(self, slot: Slot) -> None:
        """Whoever was given that slot is done with it, successfully or not."""
        self._filling.discard((slot.place.rank, slot.place.index))

    def seal_copy(self, slot: Slot, manifest: Manifest) -> None:
        """The image's bytes are in the slot, verified: make them count."""
        slot.write_tables(manifest.checks, manifest.layout)
        record = replace(manifest.record, table_bytes=slot.place.table_bytes)
        slot.write_record(record)
        slot.commit(record.nonce)

    def sums(self, slot: Slot, image_bytes: int) -> Sums:
        """For an image of so many bytes that is about to arrive in *slot*, piece by piece."""
        return Sums(slot.image[:image_bytes], block_bytes_for(image_bytes), self._pool)

    def seal_read(
        self, slot: Slot, id: SnapshotId, *, rank: int, world: int, watermark: int, image_bytes: int, layout: bytes,
        sums: Sums,
    ) -> Record:  # fmt: skip
        """The image's bytes are in the slot, as a tier had them, each piece verified: make it count, with its *sums*.

        Called in a worker thread. It was complete on all ranks: nothing else is spilled.
        """
        checks = sums.result()
        slot.write_tables(checks, layout)
        record = Record(
            id=id, watermark=watermark, rank=rank, world=world, job=self._job, image_bytes=image_bytes,
            table_bytes=slot.place.table_bytes, block_bytes=block_bytes_for(image_bytes), layout_bytes=len(layout),
            checks_crc=crc32c(checks), layout_crc=crc32c(layout), nonce=new_nonce(),
        )  # fmt: skip
        slot.write_record(record)
        slot.commit(record.nonce)
        slot.mark_complete()
        return record

    def mark_complete(self, ids: Collection[SnapshotId]) -> None:
        """All ranks had these snapshots: said in every image of them that is here."""
        for slot, record in self._sealed():
            if record.id in ids:
                slot.mark_complete()

    def let_go(self, ranks: Iterable[int]) -> list[Slot]:
        """No longer count the slots of all ranks but these, nor cells of lanes that are no more; to be ``release``d."""
        stay = frozenset(ranks)
        lanes, count = self._cell_shape
        gone = [self._slots.pop(key) for key in list(self._slots) if key[0] not in stay]
        gone += [self._cells.pop(key) for key in list(self._cells) if key[0] >= lanes or key[1] >= count]
        for slot in gone:
            _log.info("not needed here any more: %s", slot.place.path)
            Path(slot.place.path).unlink(missing_ok=True)
        return gone

    # -- parity ------------------------------------------------------------------------------------------------------

    def reserve_cells(self, lanes: int, count: int, *, image_bytes: int, table_bytes: int) -> None:
        """Have *count* cells for each lane, at least of the given sizes where they hold nothing.

        Raises ``BudgetExceeded``.
        """
        self._cell_shape = (lanes, count)
        sizes = {"image_bytes": image_bytes, "table_bytes": table_bytes}
        wanted = [
            place_for(self._settings.shm, lane, index, parity=True, **sizes)
            for lane in range(lanes)
            for index in range(count)
        ]
        with self._making:
            missing = [p for p in wanted if not self._cell_stays(p)]
            self._check_budget(missing)
            for place in missing:
                self._make(place)

    def prefault_cells(self) -> None:
        """Have the memory of all cells mapped. Blocks; called in a worker thread."""
        for slot in list(self._cells.values()):
            slot.prefault()

    def _cell_stays(self, place: Place) -> bool:
        slot = self._cells.get((place.rank, place.index))
        return slot is not None and (
            slot.sealed_record() is not None or slot.place.holds(place.table_bytes, place.image_bytes)
        )

    def open_cell(self, lane: int, index: int, *, image_bytes: int, table_bytes: int) -> Slot:
        """The cell, holding nothing, and large enough. Raises ``BudgetExceeded``."""
        slot = self._cells[lane, index]
        slot.unseal()
        if not slot.place.holds(table_bytes, image_bytes):
            sizes = {"image_bytes": image_bytes, "table_bytes": table_bytes}
            place = place_for(self._settings.shm, lane, index, parity=True, **sizes)
            with self._making:
                self._check_budget([place])
                self._make(place)
        return self._cells[lane, index]

    def reopen_cell(
        self, lane: int, index: int, *, image_bytes: int, table_bytes: int
    ) -> tuple[Slot, tuple[CellTable, Checks] | None]:
        """As ``open_cell``; and the table and the checksums of parity that it held, if the bytes still lie there."""
        slot = self._cells[lane, index]
        before = self._cell_table(slot)
        opened = self.open_cell(lane, index, image_bytes=image_bytes, table_bytes=table_bytes)
        return opened, before if opened is slot else None

    def _cell_table(self, slot: Slot) -> tuple[CellTable, Checks] | None:
        """What a sealed cell says of itself, and its block checksums; None if it holds nothing, or is damaged."""
        record = slot.sealed_record()
        if record is None:
            return None
        try:
            checks, text = slot.read_tables(record)
            return CellTable.from_text(text), checks
        except Corrupt as error:
            _log.warning("%s counts as lost: %s", slot.place.path, error)
            return None

    def seal_cell(
        self,
        lane: int,
        index: int,
        id: SnapshotId,
        table: CellTable,
        text: bytes,
        parity_bytes: int,
        known: KnownChecks | None = None,
    ) -> None:
        """The parity is in the cell: checksum what is not *known*, and make it count. Called in a worker thread."""
        slot = self._cells[lane, index]
        checks = slot.checksums(parity_bytes, table.unit, self._pool, known)
        slot.write_tables(checks, text)
        record = Record(
            id=id, watermark=-1, rank=lane, world=len(table.manifests), job=self._job, image_bytes=parity_bytes,
            table_bytes=slot.place.table_bytes, block_bytes=table.unit, layout_bytes=len(text),
            checks_crc=crc32c(checks), layout_crc=crc32c(text), nonce=new_nonce(),
        )  # fmt: skip
        reach("parity.before-record")
        slot.write_record(record)
        slot.commit(record.nonce)
        reach("parity.sealed")

    def drop_cell(self, lane: int, index: int) -> None:
        """What the cell holds is not needed any more."""
        self._cells[lane, index].unseal()

    def cells(self, me: int, kept: Collection[tuple[int, SnapshotId, int, int]] = ()) -> list[list[Cell]]:
        """Where the cells stand, by lane.

        Args:
            me: the place of this agent in its group; a cell that was filled in another place is held by no key that
                anybody looks for.
            kept: lane, snapshot, key and place of the cells that are to be kept.
        """
        places = sorted(self._cells)
        lanes = 1 + max((lane for lane, _ in places), default=-1)
        held = {
            (lane, i): Cell(Stage.HELD, id, table.key if table.me == me else 0, (lane, id, table.key, table.me) in kept)
            for (lane, i), id, table in self.tables()
        }
        return [[held.get((lane, i), Cell()) for its, i in places if its == lane] for lane in range(lanes)]

    def verify_cells(self, id: SnapshotId) -> int:
        """Read the parity of *id*, and drop what is damaged: it is made again. Returns how many blocks, or tables, are.

        Called in a worker thread.
        """
        damaged = 0
        for slot in list(self._cells.values()):
            record = slot.sealed_record()
            if record is None or record.id != id:
                continue
            try:
                checks, _ = slot.read_tables(record)
                found = slot.checksums(record.image_bytes, record.block_bytes, self._pool)
                bad = int(np.count_nonzero(found != checks))
            except Corrupt:
                bad = 1
            if bad:
                _log.warning("%s: %d blocks of the parity of %s are damaged; it is dropped", slot.place.path, bad, id)
                slot.unseal()
                damaged += bad
        return damaged

    def tables(self) -> list[tuple[tuple[int, int], SnapshotId, CellTable]]:
        """Every sealed cell: (lane, index), of which snapshot, and what it says of itself."""
        found = []
        for where, slot in sorted(self._cells.items()):
            record, held = slot.sealed_record(), self._cell_table(slot)
            if record is not None and held is not None:
                found.append((where, record.id, held[0]))
        return found

    def cell(self, lane: int, id: SnapshotId, key: int, member: int) -> tuple[Slot, Record] | None:
        """The sealed cell of that snapshot, key and member. What it holds is not verified, nor is all of its table."""
        for (its_lane, index), slot in sorted(self._cells.items()):
            record = slot.sealed_record() if its_lane == lane else None
            if record is not None and record.id == id and self._name(its_lane, index, slot, record) == (key, member):
                return slot, record
        return None

    def _name(self, lane: int, index: int, slot: Slot, record: Record) -> tuple[int, int] | None:
        """Key and member of a cell; its table, which may be megabytes, is read once for each time that it is filled."""
        known = self._named.get((lane, index))
        if known is None or known[0] != record.nonce:
            try:
                table = CellTable.from_text(slot.read_tables(record)[1])
            except Corrupt as error:
                _log.warning("%s counts as lost: %s", slot.place.path, error)
                return None
            known = self._named[lane, index] = record.nonce, table.key, table.me
        return known[1], known[2]

    @property
    def parity_bytes(self) -> int:
        """Shared memory taken by cells."""
        return sum(slot.place.file_bytes for slot in list(self._cells.values()))

    # -- windows -----------------------------------------------------------------------------------------------------

    def window(self, reader: int, index: int, nbytes: int) -> Window:
        """A window of *reader*, of that many bytes at least. Called in a worker thread. Raises ``BudgetExceeded``."""
        size = max(align(nbytes, _WINDOW_STEP), _WINDOW_STEP)
        with self._making:
            old = self._windows.get((reader, index))
            if old is not None and old.in_place and old.bytes.nbytes >= nbytes:
                return old
            self._check_room(size - (old.bytes.nbytes if old is not None else 0))
            self._close_window(reader, index)
            window = self._windows[reader, index] = Window.create(self._settings.shm, reader, index, size)
            return window

    def close_windows(self, reader: int) -> None:
        """Give back the memory of all windows of *reader*."""
        with self._making:
            for its, index in list(self._windows):
                if its == reader:
                    self._close_window(its, index)

    def _close_all_windows(self) -> None:
        for reader in {reader for reader, _ in self._windows}:
            self.close_windows(reader)

    def _close_window(self, reader: int, index: int) -> None:
        window = self._windows.pop((reader, index), None)
        if window is not None:
            if window.in_place:
                Path(window.path).unlink(missing_ok=True)
            window.close()

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def reserved_bytes(self) -> int:
        """Shared memory taken by all slots, cells and windows."""
        windows = sum(window.bytes.nbytes for window in list(self._windows.values()))
        return sum(slot.place.file_bytes for slot in self._all()) + windows

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
        self._close_all_windows()
        for slot in self._all():
            Path(slot.place.path).unlink(missing_ok=True)
            slot.close()
        self._slots.clear()
        self._cells.clear()

    def close(self) -> None:
        """Unmap everything; the slots stay for the next agent, windows do not."""
        self._pool.shutdown(wait=True)
        self._close_all_windows()
        for slot in self._all():
            slot.close()
        self._slots.clear()
        self._cells.clear()

    def _all(self) -> list[Slot]:
        return [*self._slots.values(), *self._cells.values()]

    def _sealed(self) -> Iterator[tuple[Slot, Record]]:
        for _, slot in sorted(self._slots.items()):
            record = slot.sealed_record()
            if record is not None:
                yield slot, record

    def _held(self, slot: Slot, r: Record) -> Held:
        complete = slot.complete(r)
        return Held(
            r.id, r.rank, r.world, r.watermark, self._agent, slot.place.path, r.image_bytes, complete, r.checks_crc
        )

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


def recorded(slot: Slot) -> Record | None:
    """The record of an image that is sealed, or may yet be: recorded, and its trainer's verdict outstanding."""
    if slot.word != OPEN_WORD:
        return slot.sealed_record()
    try:
        return slot.read_record()[0]
    except Corrupt:
        return None


def release(slots: Iterable[Slot]) -> None:
    """Give the memory of what was let go back. Blocks: a fifth of a second for each GB."""
    for slot in slots:
        slot.close()
