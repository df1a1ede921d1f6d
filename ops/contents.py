"""What is in a snapshot, wherever it lies: global tensors, put together from the slices of its images. Pure but for the reads.

Everything here works on an ``Opened`` snapshot, which a source (``sources``) gives: its images by rank, each with its layout,
each read in verified pieces. A tensor is read in *cells*, the boxes of a grid that follows how it is stored, so that no chunk is
read twice, and no more than a few cells are in memory.
"""

from __future__ import annotations

import asyncio
import fnmatch
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, Corrupt, HoldfastError, SnapshotLost
from ..snapshot.layout import ITEM_BYTES, Layout, Slice
from ..snapshot.record import SnapshotId
from ..storage.inflight import each

CELL_BYTES: Final = 64 << 20
_PARTS_AT_ONCE: Final = 16  # of one cell: in an object store, small ones are waited for more than they are read
_AHEAD: Final = 2  # cells that are read while one is being written

Bytes = npt.NDArray[np.uint8]
Box = tuple[tuple[int, int], ...]
"""Half-open ranges, one for each dimension."""


class Image(Protocol):
    """One rank's bytes of a snapshot. Whatever is read has been verified.

    Reads raise ``Corrupt`` where no copy of the bytes is sound, and whatever else a source cannot do.
    """

    @property
    def layout(self) -> Layout:
        """Which slices there are."""
        ...

    async def read_slice(self, index: int, out: Bytes, first_row: int = 0, rows: int | None = None) -> None:
        """Read rows of slice number *index* of the layout into *out*, exactly as long."""
        ...

    async def read_values(self) -> bytes:
        """The eager values, as ``snapshot.codec`` encodes them."""
        ...


@dataclass(frozen=True, slots=True)
class Opened:
    """A snapshot that is being read.

    Attributes:
        images: those that can be had, by rank.
        values_bytes: how long the values of each are.
        reasons: of some that cannot be had, why.
    """

    source: str
    job: str
    id: SnapshotId
    world: int
    images: Mapping[int, Image]
    values_bytes: Mapping[int, int]
    reasons: Mapping[int, HoldfastError] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """The ranks whose image cannot be had."""
        return [rank for rank in range(self.world) if rank not in self.images]

    def lacking(self, what: str) -> HoldfastError:
        """The error to raise where *what* cannot be done without the missing images: ``Corrupt`` if damage is why, or
        ``SnapshotLost``."""
        kind = Corrupt if any(isinstance(error, Corrupt) for error in self.reasons.values()) else SnapshotLost
        ranks = f"; the images of ranks {', '.join(map(str, self.missing))} cannot be had" if self.missing else ""
        reasons = "".join(f"; rank {rank}: {error}" for rank, error in list(self.reasons.items())[:3])
        return kind(f"{self.id} in {self.source}: {what}{ranks}{reasons}")


@dataclass(frozen=True, slots=True)
class Piece:
    """Slice number *index* of the image of *rank*."""

    rank: int
    index: int
    slice: Slice

    @property
    def box(self) -> Box:
        """Where it lies in its tensor."""
        return tuple((start, start + extent) for start, extent in zip(self.slice.start, self.slice.extent, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One global tensor.

    Attributes:
        pieces: those slices that make it up, in the order of preference: where they overlap, the first one counts.
        own: slices of other ranks with bytes of their own for what *pieces* already has: every rank's batch norm statistics,
            say, of which the global tensor has those of one rank.
        whole: whether *pieces* cover it.
        disjoint: whether no two of *pieces* overlap.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    own: tuple[Piece, ...]
    whole: bool
    disjoint: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the global tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def cell(self, most_bytes: int = CELL_BYTES) -> tuple[int, ...]:
        """Shape of the cells of its grid: of at most *most_bytes*, but for a single row, or a single chunk of a stored one.

        Where all images are cut on one grid, cells are its chunks, or several of them one below the other; else they are
        whole rows. Sizes are at least 1.
        """
        if not self.shape:
            return ()
        grids = {piece.slice.chunk for piece in self.pieces}
        found = next(iter(grids)) if len(grids) == 1 else None
        unit = found or (1, *(max(length, 1) for length in self.shape[1:]))
        most = max(1, most_bytes // (math.prod(unit) * ITEM_BYTES[self.dtype]))
        units = -(-max(self.shape[0], 1) // unit[0])
        together = -(-units // -(-units // most))  # as even as may be
        return (unit[0] * together, *unit[1:])

    def boxes(self, most_bytes: int = CELL_BYTES) -> Iterator[Box]:
        """The cells in row-major order, cut off at the tensor's end. None, if it has no bytes."""
        if not self.nbytes:
            return iter(())
        ranges = (
            [(start, min(start + step, length)) for start in range(0, length, step)]
            for length, step in zip(self.shape, self.cell(most_bytes), strict=True)
        )
        return itertools.product(*ranges)


def alone(piece: Piece) -> Tensor:
    """One rank's slice as a tensor of its own, of the slice's extent."""
    s = piece.slice
    moved = replace(s, shape=s.extent, start=(0,) * len(s.extent), chunk=None)
    return Tensor(s.name, s.dtype, s.extent, (replace(piece, slice=moved),), (), whole=True)


# -- putting together -------------------------------------------------------------------------------------------------


def tensors(layouts: Mapping[int, Layout], first: int = 0) -> list[Tensor]:
    """The global tensors of a snapshot, in the order in which they first appear.

    Where several ranks have bytes of their own for the same place, those of rank *first* count; without them, those of the
    lowest rank.
    """
    found: dict[tuple[str, str, tuple[int, ...]], list[Piece]] = {}
    for rank in sorted(layouts, key=lambda r: (r != first, r)):
        for index, placed in enumerate(layouts[rank].placed):
            s = placed.slice
            found.setdefault((s.name, s.dtype, s.shape), []).append(Piece(rank, index, s))
    return [_put_together(*identity, pieces) for identity, pieces in found.items()]


def _put_together(name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Tensor:
    open_: list[Box] = [tuple((0, length) for length in shape)] if math.prod(shape) else []
    taken: list[Piece] = []
    own: list[Piece] = []
    disjoint = True
    for piece in pieces:
        box = piece.box
        if any(a >= b for a, b in box):
            continue  # an empty slice says nothing
        left = [rest for gap in open_ for rest in _without(gap, box)]
        (own if left == open_ else taken).append(piece)
        if left != open_:
            disjoint = disjoint and _volume(open_) - _volume(left) == _volume([box])
        open_ = left
    return Tensor(name, dtype, shape, tuple(taken), tuple(own), whole=not open_, disjoint=disjoint)


def _volume(boxes: Iterable[Box]) -> int:
    return sum(math.prod(b - a for a, b in box) for box in boxes)


def _without(box: Box, other: Box) -> Iterator[Box]:
    """What is left of *box* without *other*, as disjoint boxes; *box* itself if they have nothing in common."""
    if any(b <= c or d <= a for (a, b), (c, d) in zip(box, other, strict=True)):
        yield box
        return
    rest = list(box)
    for dim, ((a, b), (c, d)) in enumerate(zip(box, other, strict=True)):
        if a < c:
            yield (*rest[:dim], (a, c), *rest[dim + 1 :])
        if d < b:
            yield (*rest[:dim], (d, b), *rest[dim + 1 :])
        rest[dim] = (max(a, c), min(b, d))


def select(found: Iterable[Tensor], patterns: Sequence[str]) -> list[Tensor]:
    """Those whose name one of *patterns* matches (``*``, ``?``, ``[…]``); all, without patterns.

    Raises:
        ConfigError: a pattern matches none.
    """
    every = list(found)
    if not patterns:
        return every
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(tensor.name, pattern) for tensor in every):
            near = ", ".join(tensor.name for tensor in every[:5])
            raise ConfigError(f"no tensor is called {pattern!r}; there are {len(every)}, such as {near or 'none'}")
    return [t for t in every if any(fnmatch.fnmatchcase(t.name, pattern) for pattern in patterns)]


def require_whole(opened: Opened, chosen: Iterable[Tensor]) -> None:
    """Raise ``SnapshotLost``, or ``Corrupt``, unless every byte of every one of these tensors can be had."""
    partial = [tensor.name for tensor in chosen if not tensor.whole]
    if partial:
        more = f" and {len(partial) - 5} more" if len(partial) > 5 else ""
        raise opened.lacking(f"it does not hold all of {', '.join(partial[:5])}{more}")


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """A box of a tensor, and its bytes: row-major, verified."""

    tensor: Tensor
    box: Box
    bytes: Bytes

    def put_into(self, whole: Bytes) -> None:
        """Copy it to where it belongs in *whole*, the bytes of the tensor."""
        if not self.box:
            whole[:] = self.bytes
            return
        place, item = _indices(self.box, (0,) * len(self.box), self.tensor.dtype), ITEM_BYTES[self.tensor.dtype]
        whole.reshape(*self.tensor.shape[:-1], -1)[place] = self.bytes.reshape(_extent(self.box, item))


def _extent(box: Box, item: int) -> tuple[int, ...]:
    """The shape of *box* in bytes: the last dimension counts them."""
    *outer, inner = (b - a for a, b in box)
    return (*outer, inner * item)


def _indices(box: Box, origin: Sequence[int], dtype: str) -> tuple[slice, ...]:
    """Where *box* lies in an array, shaped in bytes, whose first element is *origin*."""
    item = ITEM_BYTES[dtype]
    *outer, inner = ((a - o, b - o) for (a, b), o in zip(box, origin, strict=True))
    return (*(slice(a, b) for a, b in outer), slice(inner[0] * item, inner[1] * item))


async def read_box(opened: Opened, tensor: Tensor, box: Box) -> Bytes:
    """The bytes of a box of a global tensor, row-major, verified; zeros where no piece covers it."""
    item = ITEM_BYTES[tensor.dtype]
    out = np.zeros(math.prod(b - a for a, b in box) * item, np.uint8)
    parts: list[tuple[Piece, Box]] = []
    for piece in reversed(tensor.pieces):  # the first one last: where they overlap, it counts
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True))
        if all(a < b for a, b in common):
            parts.append((piece, common))

    async def read(part: tuple[Piece, Box]) -> None:
        await _read_part(opened.images[part[0].rank], part[0], box, part[1], out)

    await each(parts, read, _PARTS_AT_ONCE if tensor.disjoint else 1)
    return out


async def _read_part(image: Image, piece: Piece, box: Box, common: Box, out: Bytes) -> None:
    """Read what *piece* has of *box* into *out*: whole rows of the piece, of which it may be a part."""
    s = piece.slice
    if not box:
        await image.read_slice(piece.index, out)
        return
    first, rows = common[0][0] - s.start[0], common[0][1] - common[0][0]
    row_bytes = s.nbytes // s.rows
    if common[1:] == box[1:] == piece.box[1:]:
        at = (common[0][0] - box[0][0]) * row_bytes
        await image.read_slice(piece.index, out[at : at + rows * row_bytes], first, rows)
        return
    buffer = np.empty(rows * row_bytes, np.uint8)
    await image.read_slice(piece.index, buffer, first, rows)
    held = (common[0], *piece.box[1:])
    item = ITEM_BYTES[s.dtype]
    source = buffer.reshape(_extent(held, item))[_indices(common, [a for a, _ in held], s.dtype)]
    out.reshape(_extent(box, item))[_indices(common, [a for a, _ in box], s.dtype)] = source


async def stream(opened: Opened, chosen: Iterable[Tensor], most_bytes: int = CELL_BYTES) -> AsyncIterator[Cell]:
    """All cells of these tensors, in order; some are read ahead while the caller works on the one before."""
    under_way: deque[asyncio.Task[Cell]] = deque()
    try:
        for tensor in chosen:
            for box in tensor.boxes(most_bytes):
                under_way.append(asyncio.ensure_future(_read_cell(opened, tensor, box)))
                if len(under_way) > _AHEAD:
                    yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _read_cell(opened: Opened, tensor: Tensor, box: Box) -> Cell:
    return Cell(tensor, box, await read_box(opened, tensor, box))
