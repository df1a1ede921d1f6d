"""Which bytes of which image fill which tensor at a restore. Pure.

Each wanted box is filled from the images' slices of the same name: from this rank's own image first, since only that
has what belongs to this rank alone; then from the others, which hold the rest of what was shared (``partition``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import LayoutMismatch
from .layout import Layout, Placed, Slice


@dataclass(frozen=True, slots=True)
class Read:
    """Rows ``first_row .. first_row + rows`` of wanted box number *target* are the *nbytes* at *offset* of *rank*'s image."""

    rank: int
    offset: int
    nbytes: int
    target: int
    first_row: int
    rows: int


def assemble(wanted: Sequence[Slice], layouts: Mapping[int, Layout], rank: int) -> list[Read]:
    """All reads that fill every row of every wanted box exactly once, by image and offset.

    Args:
        wanted: the boxes of this rank, whole.
        layouts: the layout of each rank's image.
        rank: whose own image comes first.

    Raises:
        LayoutMismatch: rows that no image holds, by name.
    """
    names = {box.name for box in wanted}
    offers: dict[str, list[tuple[int, Placed]]] = {}
    for owner in sorted(layouts, key=lambda r: (r != rank, r)):
        for placed in layouts[owner].placed:
            if placed.slice.name in names:
                offers.setdefault(placed.slice.name, []).append((owner, placed))
    reads: list[Read] = []
    missing: list[str] = []
    for target, box in enumerate(wanted):
        if not box.nbytes:
            continue
        gaps = [(0, box.rows)]
        for owner, placed in offers.get(box.name, []):
            gaps = _fill(box, target, owner, placed, gaps, reads)
            if not gaps:
                break
        missing += [f"{box.name}: rows {a} to {b} of box {list(box.start)}+{list(box.extent)}" for a, b in gaps]
    if missing:
        shown = "\n  ".join(missing[:20])
        raise LayoutMismatch(f"no image holds {len(missing)} parts of the state as this rank needs them:\n  {shown}")
    return sorted(reads, key=lambda read: (read.rank, read.offset))


def _fill(
    box: Slice, target: int, owner: int, placed: Placed, gaps: list[tuple[int, int]], reads: list[Read]
) -> list[tuple[int, int]]:
    """Fill what *placed* can of the *gaps* (half-open row ranges of the box); append the reads, return what is left."""
    held = placed.slice
    if held.start[1:] != box.start[1:] or held.extent[1:] != box.extent[1:]:
        return gaps
    shift = held.start[0] - box.start[0] if box.start else 0
    row_bytes = box.nbytes // box.rows
    left: list[tuple[int, int]] = []
    for first, last in gaps:
        low, high = max(first, shift), min(last, shift + held.rows)
        if low >= high:
            left.append((first, last))
            continue
        offset = placed.offset + (low - shift) * row_bytes
        reads.append(Read(owner, offset, (high - low) * row_bytes, target, low, high - low))
        left += [gap for gap in ((first, low), (high, last)) if gap[0] < gap[1]]
    return left
