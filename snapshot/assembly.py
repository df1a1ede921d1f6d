"""Which parts of which images fill which tensors at a restore, whatever ranks and meshes they were taken by. Pure.

Each wanted box is filled from the images' slices of the same name, each element once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import LayoutMismatch
from .layout import Layout, Slice
from .regions import Box, box_of


@dataclass(frozen=True, slots=True)
class Read:
    """*box* of the global tensor, which lies in slice number *index* of *rank*'s image, goes into wanted box number *target*."""

    rank: int
    index: int
    target: int
    box: Box


@dataclass(slots=True)
class _Offers:
    """Who holds parts of one tensor: (first row, rank, index of the slice, box), by first row; and the most rows of any."""

    parts: list[tuple[int, int, int, Box]] = field(default_factory=list)
    rows: int = 0

    def near(self, box: Box) -> list[tuple[int, int, int, Box]]:
        """Those that may meet *box*."""
        if not box.start:
            return self.parts
        low = bisect_left(self.parts, (box.start[0] - self.rows + 1,))
        return self.parts[low : bisect_left(self.parts, (box.start[0] + box.extent[0],))]


def assemble(
    wanted: Sequence[Slice],
    layouts: Mapping[int, Layout],
    rank: int,
    *,
    near: Collection[int] = (),
    alike: bool = False,
) -> list[Read]:
    """All reads that fill every element of every wanted box exactly once, by image and slice.

    Where several images hold the same part, the one of *rank* itself comes first: only that has what belongs to this rank
    alone. Then come those of *near*, then the lower ranks.

    Args:
        wanted: the boxes of this rank, whole.
        layouts: the layout of each rank's image.
        alike: what several ranks want (``members``), all of them are to take from the same image.

    Only slices of the same dtype and global shape count: ranks may have had tensors of one name that are not one tensor.

    Raises:
        LayoutMismatch: parts that no image holds, by name.
    """
    offers = _offers({_kind(box) for box in wanted}, layouts)
    reads: list[Read] = []
    missing: list[str] = []
    for target, piece in enumerate(wanted):
        gaps = [box_of(piece)] if piece.nbytes else []
        same = alike and bool(piece.members)
        these = offers.get(_kind(piece))
        found = these.near(gaps[0]) if gaps and these is not None else []
        for _, owner, index, held in sorted(
            found, key=lambda f: (f[1],) if same else (f[1] != rank, f[1] not in near, f[1])
        ):
            if not gaps:
                break
            left: list[Box] = []
            for gap in gaps:
                part = gap.meets(held)
                if part is None:
                    left.append(gap)
                    continue
                reads.append(Read(owner, index, target, part))
                left += gap.without(part)
            gaps = left
        missing += [f"{piece.name}: {list(gap.start)}+{list(gap.extent)} of {list(piece.shape)}" for gap in gaps]
    if missing:
        shown = "\n  ".join(missing[:20])
        raise LayoutMismatch(f"no image holds {len(missing)} parts of the state as this rank needs them:\n  {shown}")
    return sorted(reads, key=lambda read: (read.rank, read.index, read.box.start))


_Kind = tuple[str, str, tuple[int, ...]]


def _kind(piece: Slice) -> _Kind:
    """What tells one tensor from any other."""
    return piece.name, piece.dtype, piece.shape


def _offers(kinds: Collection[_Kind], layouts: Mapping[int, Layout]) -> dict[_Kind, _Offers]:
    """What all images hold of these tensors."""
    offers: dict[_Kind, _Offers] = {}
    for owner, layout in layouts.items():
        for index, placed in enumerate(layout.placed):
            piece = placed.slice
            if _kind(piece) in kinds and piece.nbytes:
                these = offers.setdefault(_kind(piece), _Offers())
                these.parts.append((piece.start[0] if piece.start else 0, owner, index, box_of(piece)))
                these.rows = max(these.rows, piece.rows)
    for these in offers.values():
        these.parts.sort(key=lambda part: part[:3])
    return offers
