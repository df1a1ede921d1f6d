"""Slots in shared memory: how their bytes lie, how they are made, written and read. No decisions are taken here.

A slot is one file ``rank-<rank>.slot-<index>`` in the job's shared-memory folder (mode 0600); a *cell*, which holds parity,
is the same under the name ``lane-<lane>.cell-<index>``, and written by its agent alone::

    0                     record page: the 255-byte codeword of ``record``, zeros up to 4096
    4096                  commit page: the commit word (u64), the complete word (u64), zeros up to 8192
    8192                  tables: block checksums (u32 each), then the layout text; ``table_bytes`` in all
    8192 + table_bytes    image, up to the end of the file; page-aligned

The trainer writes the image and the commit word, the agent the record and the tables. Before the first byte of an
image is overwritten, the commit word says so: from then on the slot holds nothing.

The complete word holds the record's nonce once the trainer knows that this snapshot is complete on every rank: before
anything is overwritten that the job would otherwise go back to. So whoever lost the image of some rank knows whether that
rank had sealed it, and hence whether it may be rebuilt.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ..crashpoints import reach
from ..erasure.kernel import block_checksums, crc32c
from ..errors import BudgetExceeded, ConfigError, Corrupt
from .layout import Layout, align
from .record import FREE_WORD, OPEN_WORD, RECORD_BYTES, Record
from .unchanged import Mask, Unchanged, runs

PAGE: Final = 4096
_WORD_OFFSET: Final = PAGE
_TABLE_OFFSET: Final = 2 * PAGE
_MADV_POPULATE_WRITE: Final = 23
_NAME: Final = re.compile(  # one name for each slot
    r"(?:rank-(?P<rank>[0-9]{5}|[1-9][0-9]{5,})\.slot|lane-(?P<lane>[0-9]{5})\.cell)-(?P<index>0|[1-9][0-9]*)"
)

_WINDOW: Final = re.compile(r"window-(?:[0-9]{5}|[1-9][0-9]{5,})\.[0-9]")

Bytes = npt.NDArray[np.uint8]
KnownChecks = tuple[Mask, npt.NDArray[np.uint32]]
"""Of which blocks the checksum is known, ``bool[blocks]``, and a table that has it for each of these."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a slot lies and how much it can hold. ``table_bytes`` and ``image_bytes`` are multiples of 4096.

    ``parity``: it is a cell, and ``rank`` counts lanes.
    """

    path: str
    rank: int
    index: int
    table_bytes: int
    image_bytes: int
    parity: bool = False

    @property
    def file_bytes(self) -> int:
        """Shared memory that the slot takes."""
        return _TABLE_OFFSET + self.table_bytes + self.image_bytes

    def holds(self, table_bytes: int, image_bytes: int) -> bool:
        """Whether so many bytes of tables and image fit."""
        return self.table_bytes >= table_bytes and self.image_bytes >= image_bytes


def place_for(
    folder: Path, rank: int, index: int, *, table_bytes: int, image_bytes: int, parity: bool = False
) -> Place:
    """The place of a slot (or of a cell, of lane *rank*) that holds at least so many bytes of tables and image."""
    path = folder / (f"lane-{rank:05d}.cell-{index}" if parity else f"rank-{rank:05d}.slot-{index}")
    return Place(str(path), rank, index, align(table_bytes, PAGE), align(image_bytes, PAGE), parity)


def parse_name(name: str) -> tuple[int, int, bool] | None:
    """``(rank or lane, index, whether a cell)`` if *name* is that of a slot file, else None."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return int(match["rank"] or match["lane"]), int(match["index"]), match["rank"] is None


class Slot:
    """One slot, mapped read-write. Whoever opens it closes it; views into it die with the mapping.

    Attributes:
        place: where it lies.
        inode: identity of the file behind the mapping; a slot that was replaced has another one.
        image: ``uint8[place.image_bytes]``, shared with every other process that maps the slot.
        before: the commit word that the filling under way, if it was begun here, has overwritten.
    """

    def __init__(self, place: Place, descriptor: int) -> None:
        self.place = place
        self.inode = os.fstat(descriptor).st_ino
        self.before = FREE_WORD
        self._map = mmap.mmap(descriptor, place.file_bytes)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self.image: Bytes = self._bytes[_TABLE_OFFSET + place.table_bytes :]
        self._word = self._bytes[_WORD_OFFSET : _WORD_OFFSET + 16].view(np.uint64)

    @classmethod
    def open(cls, place: Place) -> Slot:
        """Map an existing slot. Raises ``Corrupt`` if the file is not of the size that *place* says."""
        with _descriptor(place.path, os.O_RDWR) as fd:
            if (found := os.fstat(fd).st_size) != place.file_bytes:
                raise Corrupt(f"{place.path} has {found} bytes, {place.file_bytes} expected")
            return cls(place, fd)

    @classmethod
    def create(cls, place: Place) -> Slot:
        """Make a slot with all its memory reserved, replacing any file of that name; it holds nothing.

        The file gets its name only when it has its memory, so a crash leaves a ``.new`` file for the next scan to remove,
        never a slot that faults. Raises ``BudgetExceeded`` if the file system is full.
        """
        with _reserved(place.path, place.file_bytes) as fd:
            reach("attach.reserved")
            os.replace(place.path + ".new", place.path)
            return cls(place, fd)

    @property
    def in_place(self) -> bool:
        """Whether the file of that name still is the one that is mapped."""
        return _inode(self.place.path) == self.inode

    def prefault(self) -> None:
        """Have the kernel map every page now, so that no first touch (1 GB/s) falls into a snapshot. Without the GIL."""
        held = self._bytes  # whoever works on addresses keeps the mapping alive by this
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if libc.madvise(held.ctypes.data, held.nbytes, _MADV_POPULATE_WRITE) != 0:
            # Kernels before 5.14. Reading maps what is reserved; writing could undo what another process writes.
            held[::PAGE].max()

    # -- the commit word ---------------------------------------------------------------------------------------------

    @property
    def word(self) -> int:
        """The commit word as it stands."""
        return int(self._word[0])

    def unseal_to_fill(self) -> None:
        """The slot is being filled. Must come before the first byte of the image is overwritten."""
        self.before = self.word
        self._word[0] = OPEN_WORD

    def commit(self, nonce: int) -> None:
        """The image is exact: one aligned 8-byte store. With the record of that nonce, this seals the snapshot."""
        self._word[0] = nonce

    def unseal(self) -> None:
        """From here on the slot holds nothing."""
        self._word[0] = FREE_WORD

    def mark_complete(self) -> None:
        """All ranks have sealed this snapshot."""
        self._word[1] = self._word[0]

    def complete(self, record: Record) -> bool:
        """Whether all ranks had sealed the snapshot that *record*, of this slot, describes."""
        return record.sealed_by(int(self._word[1]))

    # -- record and tables -------------------------------------------------------------------------------------------

    def read_record(self) -> tuple[Record, int]:
        """The record, sealed or not, and the number of damaged bytes repaired in it. Raises ``Corrupt``."""
        return Record.from_bytes(self._bytes[:RECORD_BYTES].tobytes())

    def sealed_record(self) -> Record | None:
        """The record if this slot holds a sealed snapshot, else None; damaged records count as none."""
        if self.word in (FREE_WORD, OPEN_WORD):
            return None
        try:
            record, repaired = self.read_record()
        except Corrupt:
            return None
        if not self._fits(record) or not record.sealed_by(self.word):
            return None
        if repaired:
            self.write_record(record)
        return record

    @property
    def spoiled(self) -> bool:
        """Whether this slot was sealed, by its commit word, and its record cannot be read any more."""
        if self.word in (FREE_WORD, OPEN_WORD) or not self._bytes[:RECORD_BYTES].any():
            return False
        try:
            self.read_record()
        except Corrupt:
            return True
        return False

    def write_record(self, record: Record) -> None:
        """Write the record, after the tables. With the commit word of its nonce, this seals the snapshot."""
        self._bytes[:RECORD_BYTES] = np.frombuffer(record.to_bytes(), np.uint8)

    def write_tables(self, checks: npt.NDArray[np.uint32], layout_text: bytes) -> None:
        """Write block checksums and layout. Raises ``BudgetExceeded`` if they do not fit."""
        if (needed := checks.nbytes + len(layout_text)) > self.place.table_bytes:
            raise BudgetExceeded(f"tables of {needed} bytes, {self.place.table_bytes} reserved in {self.place.path}")
        table = self._bytes[_TABLE_OFFSET:]
        table[: checks.nbytes] = checks.view(np.uint8)
        table[checks.nbytes : needed] = np.frombuffer(layout_text, np.uint8)

    def read_tables(self, record: Record) -> tuple[npt.NDArray[np.uint32], bytes]:
        """Block checksums (copied) and layout text of the snapshot that *record* describes, both verified.

        Raises ``Corrupt`` if either does not match its checksum in the record.
        """
        blocks = -(-record.image_bytes // record.block_bytes)
        table = self._bytes[_TABLE_OFFSET:]
        checks = table[: 4 * blocks].copy().view(np.uint32)
        text = table[4 * blocks : 4 * blocks + record.layout_bytes].tobytes()
        if crc32c(checks) != record.checks_crc:
            raise Corrupt(f"{self.place.path}: the block checksums of {record.id} do not match their own checksum")
        if crc32c(text) != record.layout_crc:
            raise Corrupt(f"{self.place.path}: the layout of {record.id} does not match its checksum")
        return checks, text

    def read_layout(self, record: Record) -> Layout:
        """The verified layout of the snapshot that *record* describes. Raises ``Corrupt``."""
        layout = Layout.from_text(self.read_tables(record)[1])
        if layout.values_offset > record.image_bytes:
            raise Corrupt(f"{self.place.path}: the layout of {record.id} is longer than its image")
        return layout

    def checksums(
        self, image_bytes: int, block_bytes: int, pool: Executor | None = None, known: KnownChecks | None = None
    ) -> npt.NDArray[np.uint32]:
        """crc32c of each block of the first *image_bytes* of the image, computed now; ``uint32[blocks]``.

        *known*: of which blocks it is not computed, but taken from there.

        Raises ``Corrupt`` if the slot has not so many bytes.
        """
        image = self.image
        if image_bytes > image.nbytes:
            raise Corrupt(
                f"an image of {image_bytes} bytes is said to be in {self.place.path}, which holds {image.nbytes}"
            )
        address = int(image.ctypes.data)
        if known is None:
            return block_checksums(address, image_bytes, block_bytes, pool)
        same, checks = known
        found = np.empty(len(same), np.uint32)
        found[same] = checks[np.flatnonzero(same)]
        for first, last in runs(~same):
            start, end = first * block_bytes, min(last * block_bytes, image_bytes)
            found[first:last] = block_checksums(address + start, end - start, block_bytes, pool)
        return found

    def known_checks(self, unchanged: Unchanged, image_bytes: int, block_bytes: int) -> KnownChecks | None:
        """What need not be computed again: the checksums of blocks that are as in an earlier filling, by its tables.

        None if the slot does not have that filling's tables any more, whole, or in blocks of that size.
        """
        try:
            record, _ = self.read_record()
            if record.nonce != unchanged.since or record.block_bytes != block_bytes or not self._fits(record):
                return None
            checks, _ = self.read_tables(record)
        except Corrupt:
            return None
        same = unchanged.blocks(image_bytes, block_bytes)
        same[min(record.image_bytes, image_bytes) // block_bytes :] = False  # a last, shorter one may have been longer
        return same, checks

    def _fits(self, record: Record) -> bool:
        """Whether every length in the record stays inside this slot: checked before any of them is used."""
        return (
            record.table_bytes == self.place.table_bytes
            and record.block_bytes > 0
            and record.image_bytes <= self.place.image_bytes
            and 4 * -(-record.image_bytes // record.block_bytes) + record.layout_bytes <= self.place.table_bytes
        )

    def close(self) -> None:
        """Drop the mapping as soon as the last view into it is gone. Closing twice is harmless."""
        self._bytes = self.image = np.empty(0, np.uint8)
        self._word = np.zeros(2, np.uint64)
        with contextlib.suppress(BufferError):
            self._map.close()


class Window:
    """A file in which an agent lays bytes out for one reader, mapped. Whoever opens it closes it; views die with it.

    Attributes:
        path: where it lies.
        bytes: ``uint8[n]``; only the agent, who made it, may write there.
    """

    def __init__(self, path: str, descriptor: int, protection: int) -> None:
        self.path = path
        stat = os.fstat(descriptor)
        self._inode = stat.st_ino
        self._map = mmap.mmap(descriptor, stat.st_size, prot=protection)
        self.bytes: Bytes = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, folder: Path, reader: int, index: int, nbytes: int) -> Window:
        """Make one with all its memory reserved, in place of any of that name. Raises ``BudgetExceeded``."""
        path = str(folder / f"window-{reader:05d}.{index}")
        with _reserved(path, nbytes) as fd:
            os.replace(path + ".new", path)
            return cls(path, fd, mmap.PROT_READ | mmap.PROT_WRITE)

    @classmethod
    def open(cls, path: str) -> Window:
        """Map one to read it. Raises ``Corrupt`` if there is none: its agent has ended, or taken it back."""
        if not _WINDOW.fullmatch(Path(path).name):
            raise Corrupt(f"{path} is no window")
        with _descriptor(path, os.O_RDONLY) as fd:
            return cls(path, fd, mmap.PROT_READ)

    @property
    def in_place(self) -> bool:
        """Whether the file of that name still is the one that is mapped."""
        return _inode(self.path) == self._inode

    def close(self) -> None:
        """Drop the mapping as soon as the last view into it is gone. Closing twice is harmless."""
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


def scan(folder: Path) -> tuple[list[Place], list[str]]:
    """The slots that lie in *folder*, and the names of files that are not ours. Half-made slots are removed, and windows: an
    agent that scans has made none yet.

    A slot's division into tables and image is told by its record; a slot without a readable record holds nothing, and
    its file counts as all image.
    """
    places: list[Place] = []
    foreign: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        regular = entry.is_file(follow_symlinks=False)
        made = entry.name.removesuffix(".new")
        if regular and (_WINDOW.fullmatch(made) or (made != entry.name and parse_name(made))):
            os.unlink(entry.path)
        elif regular and (identity := parse_name(entry.name)) and (place := measure(Path(entry.path), *identity)):
            places.append(place)
        elif entry.name not in _NEIGHBOURS:
            foreign.append(entry.name)
    return places, foreign


_NEIGHBOURS: Final = frozenset(
    {"agent.sock", "agent.pid", "agent.lock", "agent.log", "agent.json", "agent.json.new", "launch.lock"}
)


def measure(path: Path, rank: int, index: int, parity: bool) -> Place | None:
    """The place of an existing slot, divided by its record; None if it is not ours, or too short to be one."""
    with _descriptor(str(path), os.O_RDONLY) as fd:
        stat = os.fstat(fd)
        if stat.st_uid != os.getuid() or stat.st_size < _TABLE_OFFSET:
            return None
        codeword = os.pread(fd, RECORD_BYTES, 0)
    room = stat.st_size - _TABLE_OFFSET
    try:
        record, _ = Record.from_bytes(codeword)
    except Corrupt:
        return Place(str(path), rank, index, 0, room, parity)
    if record.table_bytes > room or record.table_bytes % PAGE:
        return Place(str(path), rank, index, 0, room, parity)
    return Place(str(path), rank, index, record.table_bytes, room - record.table_bytes, parity)


def _inode(path: str) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_ino
    except OSError:
        return None


@contextlib.contextmanager
def _reserved(path: str, nbytes: int) -> Iterator[int]:
    """A new file ``<path>.new`` with its memory reserved. Raises ``BudgetExceeded`` if the file system is full."""
    fresh = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    with _descriptor(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        try:
            # Reserves now, with an error we can report; touching pages of a full tmpfs would be SIGBUS.
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            os.unlink(fresh)
            raise BudgetExceeded(
                f"{path}: cannot reserve {nbytes} bytes of shared memory ({error.strerror}); "
                f"enlarge that file system, or point HOLDFAST_SHM at a larger one"
            ) from error
        yield fd


@contextlib.contextmanager
def _descriptor(path: str, flags: int) -> Iterator[int]:
    """An open file descriptor, never through a symbolic link."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise ConfigError(f"{path}: {error.strerror}; the shared-memory folder must belong to this user") from error
    except OSError as error:
        raise Corrupt(f"{path} cannot be opened: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)
