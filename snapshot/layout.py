"""The layout of an image: which slice of which tensor lies at which byte.

An image is ``tensors | values``: the tensors' bytes at the offsets that the layout gives, 64-byte aligned, large ones at
pages; then, from ``values_offset`` to the end of the image, the eager values as one ``codec`` message whose length may differ
from step to step. A layout is immutable, numbered within its arena, and travels as canonical JSON text (``Layout.to_text``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Corrupt

ALIGNMENT = 64
_LARGE_BYTES = 1 << 20  # such slices begin at pages, so that disks take them from where they lie
_PAGE_BYTES = 4096
_FORMAT = 2
_DIMENSIONS = 64  # torch's own limit

# Element sizes in bytes of every dtype that may lie in an image; names are torch's, without the "torch." prefix.
ITEM_BYTES: dict[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


def room(nbytes: int) -> int:
    """The most that a slice of so many bytes takes in an image, the gap before it included."""
    return nbytes + (_PAGE_BYTES if nbytes >= _LARGE_BYTES else ALIGNMENT)


def align(offset: int, to: int = ALIGNMENT) -> int:
    """The smallest multiple of *to* that is not below *offset*."""
    return -(-offset // to) * to


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of one global tensor: its identity, where it lies in that tensor, and nothing about memory.

    ``start[d] .. start[d] + extent[d]`` is the half-open range along dimension d. A 0-d tensor has empty tuples.
    ``members`` are the ranks that hold the very same box with the very same bytes, in rank order, or empty when only
    this rank does; what such ranks hold is copied once between them (``partition``).

    ``chunk`` is the regular grid on which *all* ranks of the job cut this tensor, the same on each of them: every slice
    that holds anything begins at a multiple of it in every dimension, ends at one or at the tensor's end, and is no
    longer than it but in dimension 0. Where it is None, what this rank holds of the tensor is stored by itself.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]
    device: str = "cpu"  # device *type* the tensor lived on; a hint for tensors that restore has to create
    members: tuple[int, ...] = ()
    chunk: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.extent) * ITEM_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """How many rows (indices of dimension 0) the slice has; a 0-d slice is one row."""
        return self.extent[0] if self.extent else 1

    @property
    def on_grid(self) -> bool:
        """Whether the slice keeps to its ``chunk``; true of one that has none, and of one that holds nothing."""
        if self.chunk is None:
            return True
        bounds = zip(self.shape, self.start, self.extent, self.chunk, strict=True)
        return self.nbytes == 0 or all(
            s % c == 0 and ((s + e) % c == 0 or s + e == n) and (d == 0 or e <= c)
            for d, (n, s, e, c) in enumerate(bounds)
        )

    def narrowed(self, first: int, count: int) -> Slice:
        """The rows ``first .. first + count`` of this slice, counted from its own start.

        A part that does not keep to the grid has none.
        """
        if not self.extent:
            return self
        part = replace(self, start=(self.start[0] + first, *self.start[1:]), extent=(count, *self.extent[1:]))
        return part if part.on_grid else replace(part, chunk=None)


@dataclass(frozen=True, slots=True)
class Placed:
    """A slice and the byte at which it starts in the image (row-major, a multiple of 64)."""

    slice: Slice
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.slice.nbytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All slices of one rank's image, in the order of their offsets."""

    number: int
    placed: tuple[Placed, ...]
    values_offset: int

    @classmethod
    def of(cls, number: int, slices: Iterable[Slice]) -> Layout:
        """Place *slices* one after the other, in the given order."""
        placed: list[Placed] = []
        offset = 0
        for piece in slices:
            offset = align(offset, _PAGE_BYTES if piece.nbytes >= _LARGE_BYTES else ALIGNMENT)
            placed.append(Placed(piece, offset))
            offset += piece.nbytes
        return cls(number, tuple(placed), align(offset))

    def to_text(self) -> bytes:
        """Canonical JSON; equal layouts give equal bytes. Member lists and chunks are written once, and referred to by index."""
        groups = sorted({p.slice.members for p in self.placed})
        index = {members: i for i, members in enumerate(groups)}
        chunks = sorted({p.slice.chunk for p in self.placed}, key=lambda chunk: (chunk is not None, chunk or ()))
        grid = {chunk: i for i, chunk in enumerate(chunks)}
        rows = [
            [p.slice.name, p.slice.dtype, p.slice.shape, p.slice.start, p.slice.extent, p.slice.device,
             index[p.slice.members], grid[p.slice.chunk], p.offset]
            for p in self.placed
        ]  # fmt: skip
        document = {
            "format": _FORMAT,
            "number": self.number,
            "values_offset": self.values_offset,
            "groups": groups,
            "chunks": chunks,
            "slices": rows,
        }
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")

    @classmethod
    def from_text(cls, text: bytes) -> Layout:
        """Inverse of ``to_text``. Raises ``Corrupt`` for anything that ``to_text`` cannot have written."""
        try:
            document = json.loads(text.decode("utf-8", "surrogatepass"))
            if document["format"] != _FORMAT:
                raise Corrupt(f"layout of format {document['format']!r}, this version reads {_FORMAT}")
            groups = [tuple(_naturals(g)) for g in document["groups"]]
            chunks = [None if c is None else tuple(_naturals(c)) for c in document["chunks"]]
            placed = tuple(_placed(row, groups, chunks) for row in document["slices"])
            layout = cls(_natural(document["number"]), placed, _natural(document["values_offset"]))
        except Corrupt:
            raise
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise Corrupt(f"unreadable layout: {type(error).__name__}") from error
        layout._check()
        if layout.to_text() != text:
            raise Corrupt("layout text that no layout writes")
        return layout

    def _check(self) -> None:
        end = 0
        for item in self.placed:
            if item.offset < end or item.offset % ALIGNMENT:
                raise Corrupt(f"layout places {item.slice.name} at byte {item.offset}, over what lies before it")
            end = item.end
        if self.values_offset < end:
            raise Corrupt(f"layout ends at {self.values_offset}, before its last slice does at {end}")


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 96:
        raise Corrupt(f"layout holds {str(value)[:40]!r} where a natural number belongs")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    return tuple(_natural(v) for v in values)


def _placed(row: Sequence[Any], groups: Sequence[tuple[int, ...]], chunks: Sequence[tuple[int, ...] | None]) -> Placed:
    name, dtype, shape, start, extent, device, group, chunk, offset = row
    if type(name) is not str or type(device) is not str or dtype not in ITEM_BYTES:
        raise Corrupt(f"layout entry {name!r} has dtype {dtype!r} on {device!r}")
    piece = Slice(
        name,
        dtype,
        _naturals(shape),
        _naturals(start),
        _naturals(extent),
        device,
        groups[_natural(group)],
        chunks[_natural(chunk)],
    )
    if (
        len(piece.shape) > _DIMENSIONS
        or not len(piece.shape) == len(piece.start) == len(piece.extent)
        or any(s + e > n for s, e, n in zip(piece.start, piece.extent, piece.shape, strict=True))
    ):
        raise Corrupt(f"layout entry {name!r} reaches outside its tensor")
    if not _has_grid(piece):
        raise Corrupt(f"layout entry {name!r} is not cut on its grid")
    return Placed(piece, _natural(offset))


def _has_grid(piece: Slice) -> bool:
    """Whether the slice's chunk, if it has one, is one of its tensor, and the slice keeps to it."""
    if piece.chunk is None:
        return True
    sane = len(piece.chunk) == len(piece.shape) and all(
        1 <= c <= max(n, 1) for c, n in zip(piece.chunk, piece.shape, strict=True)
    )
    return sane and piece.on_grid
