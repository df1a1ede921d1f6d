"""Boxes of global tensors: where they meet, what is left of one without another, and which bytes of a slice they are. Pure.

A box is the product of one half-open range along each dimension; that of a 0-d tensor has none, and holds one element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from .layout import ITEM_BYTES, Slice


@dataclass(frozen=True, slots=True)
class Box:
    """``start[d] .. start[d] + extent[d]`` along each dimension d."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many elements it has."""
        return math.prod(self.extent)

    def meets(self, other: Box) -> Box | None:
        """What is in both; None if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.extent, other.start, other.extent, strict=True)
        )
        extent = tuple(end - first for end, first in zip(ends, start, strict=True))
        return Box(start, extent) if all(n > 0 for n in extent) else None

    def without(self, hole: Box) -> list[Box]:
        """Disjoint boxes that make up what is left of it without *hole*, which lies within it; at most two per dimension."""
        left: list[Box] = []
        start, extent = list(self.start), list(self.extent)
        for d, (first, size) in enumerate(zip(hole.start, hole.extent, strict=True)):
            below, above = first - start[d], start[d] + extent[d] - first - size
            if below:
                left.append(Box(tuple(start), (*extent[:d], below, *extent[d + 1 :])))
            if above:
                left.append(Box((*start[:d], first + size, *start[d + 1 :]), (*extent[:d], above, *extent[d + 1 :])))
            start[d], extent[d] = first, size
        return left


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes of a row-major slice from the first to the last that belongs to a box in it.

    Attributes:
        offset: of the first, from the slice's own start. nbytes: up to the end of the last.
        strides: in elements; of the slice, and so of the box.
        dense: none of these bytes is outside the box.
    """

    offset: int
    nbytes: int
    strides: tuple[int, ...]
    dense: bool


def box_of(piece: Slice) -> Box:
    """The box that a slice is."""
    return Box(piece.start, piece.extent)


def span(box: Box, of: Slice) -> Span:
    """Where *box*, which lies within the slice *of* and is not empty, lies in its bytes."""
    strides = _strides(of.extent)
    item = ITEM_BYTES[of.dtype]
    first = sum((b - s) * step for b, s, step in zip(box.start, of.start, strides, strict=True))
    length = 1 + sum((n - 1) * step for n, step in zip(box.extent, strides, strict=True))
    return Span(first * item, length * item, strides, length == box.volume)


def cut(box: Box, of: Slice, most: int) -> Iterator[Box]:
    """*box* in pieces whose spans in the slice *of* are no longer than *most* bytes, or one element; in row-major order."""
    todo = [box]
    while todo:
        box = todo.pop()
        if box.volume == 1 or span(box, of).nbytes <= most:
            yield box
            continue
        d = next(d for d, n in enumerate(box.extent) if n > 1)
        row = span(Box(box.start, (*box.extent[:d], 1, *box.extent[d + 1 :])), of)
        rows = max(1, 1 + (most - row.nbytes) // (row.strides[d] * ITEM_BYTES[of.dtype]))
        for at in reversed(range(0, box.extent[d], rows)):
            start = (*box.start[:d], box.start[d] + at, *box.start[d + 1 :])
            todo.append(Box(start, (*box.extent[:d], min(rows, box.extent[d] - at), *box.extent[d + 1 :])))


def _strides(extent: Sequence[int]) -> tuple[int, ...]:
    """Of a row-major array, in elements."""
    return tuple(accumulate(reversed(extent[1:]), mul, initial=1))[::-1] if extent else ()
