"""From images back into live tensors: every block is verified before any byte of it is used.

Images are read in windows that fit the cache: a window's blocks are checksummed, then copied to where they belong, so the
second pass over the bytes costs little; windows are shared out over threads, none of which holds the GIL while it works.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..crashpoints import reach
from ..erasure.kernel import crc32c_at
from ..errors import Corrupt
from .arena import Place, Slot
from .assembly import Read
from .layout import Layout, Placed
from .record import Record, SnapshotId
from .regions import Box, Span, box_of, cut, span
from .state import Item

_WINDOW_BLOCKS: Final = 4


class SourceImage:
    """One rank's image, opened to be restored from. Closes with the context.

    Attributes:
        record, layout: what it says of itself, both verified; the image's bytes are verified as they are read.
    """

    def __init__(self, path: str, rank: int, id: SnapshotId, mapped: Slot | None = None) -> None:
        """Open, or borrow a slot that is *mapped* already.

        Raises ``Corrupt`` if the slot no longer holds that image, or its record or tables are damaged.
        """
        self._borrowed = mapped is not None
        self._slot = mapped or _open(path, rank)
        self._verified: set[int] = set()
        record = self._slot.sealed_record()
        if record is None or record.id != id or record.rank != rank:
            raise Corrupt(f"{path} no longer holds {id} of rank {rank}")
        self.record: Record = record
        self.nbytes = record.image_bytes
        self._checks, text = self._slot.read_tables(record)
        self.layout = Layout.from_text(text)
        if self.layout.values_offset > record.image_bytes:
            raise Corrupt(f"{path}: the layout of {id} is longer than its image")

    @property
    def address(self) -> int:
        """Where the image starts in this process."""
        return int(self._slot.image.ctypes.data)

    @property
    def checks(self) -> npt.NDArray[np.uint32]:
        """The checksum of each block, as it was taken when the image was sealed; verified."""
        return self._checks

    def values(self) -> npt.NDArray[np.uint8]:
        """The encoded values, verified and copied. Raises ``Corrupt``."""
        first = self.layout.values_offset // self.record.block_bytes
        for block in range(first, len(self._checks)):
            self.verify(block)
        return self._slot.image[self.layout.values_offset : self.record.image_bytes].copy()

    def verify(self, block: int) -> None:
        """Raise ``Corrupt`` if the bytes of *block* do not match their checksum. Each block is read once."""
        if block in self._verified:
            return
        start = block * self.record.block_bytes
        nbytes = min(self.record.block_bytes, self.record.image_bytes - start)
        found = crc32c_at(self.address + start, nbytes)
        if found != int(self._checks[block]):
            raise Corrupt(
                f"block {block} of {self.record.id} of rank {self.record.rank} ({self._slot.place.path}): "
                f"crc32c {found:08x}, {int(self._checks[block]):08x} expected"
            )
        self._verified.add(block)

    def fill(self, parts: Sequence[Part], pool: Executor) -> None:
        """Fill live tensors. Raises ``Corrupt``; what came before the damage is filled already."""
        dense = [part for part in parts if part.dense]
        copies = [
            _Copy(part.placed.offset + part.span.offset, part.span.nbytes, part.tensor.data_ptr()) for part in dense
        ]
        window_bytes = self.record.block_bytes * _WINDOW_BLOCKS
        windows = _windows(copies, window_bytes)
        list(pool.map(lambda window: _fill(self, window), windows))
        reach("restore.inside-apply")
        scattered = [small for part in parts if not part.dense for small in part.cut(window_bytes)]
        list(pool.map(self._scatter, scattered))

    def _scatter(self, part: Part) -> None:
        start = part.placed.offset + part.span.offset
        _verify_range(self, start, part.span.nbytes)
        part.copy_from(self._slot.image[start : start + part.span.nbytes])

    def close(self) -> None:
        """Unmap, unless it was borrowed."""
        if not self._borrowed:
            self._slot.close()


def _open(path: str, rank: int) -> Slot:
    """Map a slot by its path; its geometry is told by its record, which is checked on reading."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        record, _ = Record.from_bytes(file.read(255))
    room = size - 8192
    if not 0 <= record.table_bytes <= room:
        raise Corrupt(
            f"{path}: its record speaks of {record.table_bytes} bytes of tables, the file has room for {room}"
        )
    return Slot.open(Place(path, rank, 0, record.table_bytes, room - record.table_bytes))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A box of a slice of an image, and the view of a live tensor that it fills.

    Attributes:
        span: where the box lies in the slice's bytes.
    """

    placed: Placed
    box: Box
    tensor: torch.Tensor
    span: Span

    @property
    def dense(self) -> bool:
        """Whether one run of bytes goes, as it is, to one place in this process's memory."""
        return self.span.dense and self.tensor.device.type == "cpu" and self.tensor.is_contiguous()

    def cut(self, most: int) -> Iterator[Part]:
        """The part in pieces whose spans are no longer than *most* bytes, or one element."""
        for box in cut(self.box, self.placed.slice, most):
            yield Part(self.placed, box, _view(self.tensor, self.box, box), span(box, self.placed.slice))

    def copy_from(self, found: npt.NDArray[np.uint8]) -> None:
        """Fill the live tensor; *found* are the bytes of the span."""
        # torch warns of memory that it may not write; it only reads here.
        memory = (ctypes.c_uint8 * found.nbytes).from_address(found.ctypes.data)
        flat = torch.frombuffer(memory, dtype=torch.uint8).view(self.tensor.dtype)
        with torch.no_grad():
            self.tensor.copy_(flat.as_strided(self.box.extent, self.span.strides))


class Source(Protocol):
    """One rank's image, wherever it lies, opened to be restored from.

    Attributes:
        nbytes: of the image.
    """

    layout: Layout
    nbytes: int

    def fill(self, parts: Sequence[Part], pool: Executor) -> None:
        """Fill live tensors; each byte is verified before it is used.

        Raises:
            Corrupt, SnapshotLost: the image is damaged, or cannot be had. What came before is filled already.
        """
        ...

    def values(self) -> npt.NDArray[np.uint8]:
        """The encoded values, verified. Raises as ``fill``."""
        ...

    def close(self) -> None:
        """Give back what it takes."""
        ...


@dataclass(frozen=True, slots=True)
class _Copy:
    """One part, or a window's share of it: *nbytes* at *offset* of the image go to *address*."""

    offset: int
    nbytes: int
    address: int


def apply(items: Sequence[Item], reads: Sequence[Read], images: Mapping[int, Source]) -> int:
    """Fill the live tensors of *items* as *reads* say; returns the number of bytes.

    Each byte is verified before it is used; yet if a later block proves damaged, what came before it is applied already.
    Version counters of all filled tensors are raised.

    Raises:
        Corrupt, SnapshotLost: an image is damaged, or cannot be had. The live tensors are then partly overwritten.
    """
    parts = {
        rank: [part_of(items[r.target], r, image.layout) for r in reads if r.rank == rank]
        for rank, image in images.items()
    }
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "holdfast-restore") as pool:
        for rank, image in images.items():
            image.fill(parts[rank], pool)
    if any(item.tensor.device.type == "cuda" for item in items):
        torch.cuda.synchronize()  # the slots may be unmapped as soon as we return
    torch.autograd.graph.increment_version([item.tensor for item in items])
    return sum(read.box.volume * items[read.target].tensor.element_size() for read in reads)


def part_of(item: Item, read: Read, layout: Layout) -> Part:
    """What *read* fills of *item*; *layout* is that of the image."""
    placed = layout.placed[read.index]
    return Part(
        placed, read.box, _view(item.tensor.detach(), box_of(item.slice), read.box), span(read.box, placed.slice)
    )


def _view(tensor: torch.Tensor, outer: Box, inner: Box) -> torch.Tensor:
    """The part *inner* of a tensor that is the box *outer*."""
    for d, (first, size) in enumerate(zip(inner.start, inner.extent, strict=True)):
        if size != outer.extent[d]:
            tensor = tensor.narrow(d, first - outer.start[d], size)
    return tensor


def _windows(copies: Sequence[_Copy], window_bytes: int) -> list[list[_Copy]]:
    """Cut the copies at multiples of *window_bytes* of the image, and gather what lies in the same window."""
    windows: dict[int, list[_Copy]] = {}
    for copy in copies:
        offset, end = copy.offset, copy.offset + copy.nbytes
        while offset < end:
            window = offset // window_bytes
            stop = min(end, (window + 1) * window_bytes)
            windows.setdefault(window, []).append(_Copy(offset, stop - offset, copy.address + offset - copy.offset))
            offset = stop
    return [windows[window] for window in sorted(windows)]


def _fill(image: SourceImage, window: Sequence[_Copy]) -> None:
    """Verify the blocks that the window touches, then copy out of the cache."""
    low, high = min(c.offset for c in window), max(c.offset + c.nbytes for c in window)
    _verify_range(image, low, high - low)
    for copy in window:
        ctypes.memmove(copy.address, image.address + copy.offset, copy.nbytes)


def _verify_range(image: SourceImage, offset: int, nbytes: int) -> None:
    size = image.record.block_bytes
    for block in range(offset // size, -(-(offset + nbytes) // size)):
        image.verify(block)
