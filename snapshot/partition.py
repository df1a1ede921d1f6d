"""Who copies what: the balanced share of state that several ranks hold alike, and the grids on which it is cut. Pure.

Ranks that are replicas of each other (DDP, the replicate dimension of HSDP, tensors replicated over tensor-parallel
ranks) hold the same boxes with the same bytes. Each copies a disjoint share; together they copy every byte once. The
idea is REFT's (arXiv 2310.12670, "sharding the snapshot"); cutting by rows keeps every piece one contiguous box.

A tensor that all ranks cut on one grid (``Slice.chunk``) becomes one array in a tier, each box of the grid one object. So
shares are cut where such objects end, and the grid is made so fine that this costs little balance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .layout import ITEM_BYTES, Slice

LARGEST_CHUNK: Final = 64 << 20
"""What a chunk is cut down to, in bytes, where its tensor can be cut so finely and evenly."""

SMALLEST_CHUNK: Final = 64 << 10
"""What a chunk is not cut below for the sake of balance."""

# Into how many chunks, at least, a replica's share is to fall: one of these is how far it may be off its fair part.
_CHUNKS_PER_SHARE: Final = 32


def share(slices: Sequence[Slice], rank: int) -> list[Slice]:
    """The slices that *rank* copies of the state it holds, in order, each on the grid on which it will be stored.

    Slices without ``members`` are kept whole. The slices of one member group are laid end to end and cut into one equal
    part per member, each cut moved to the nearest boundary of the tensor's grid, or of a row where it has none: each share
    is within one chunk, or row, (and a byte) of its fair part. Every rank must pass its group's slices in the same order;
    then the shares of all members are disjoint and cover everything.
    """
    slices = gridded(slices)
    totals: dict[tuple[int, ...], int] = {}
    for piece in slices:
        if piece.members:
            totals[piece.members] = totals.get(piece.members, 0) + piece.nbytes
    passed: dict[tuple[int, ...], int] = dict.fromkeys(totals, 0)
    mine: list[Slice] = []
    for piece in slices:
        if not piece.members:
            mine.append(piece)
            continue
        base, total = passed[piece.members], totals[piece.members]
        passed[piece.members] = base + piece.nbytes
        count, place = len(piece.members), piece.members.index(rank)
        first = _row_at(piece, total * place // count - base)
        last = _row_at(piece, total * (place + 1) // count - base)
        if last > first or (piece.nbytes == 0 and place == 0):
            mine.append(piece.narrowed(first, last - first))
    return mine


def gridded(slices: Sequence[Slice]) -> list[Slice]:
    """*slices*, with the chunks of those that have any cut down along dimension 0 to what is to be one object.

    All ranks must conclude alike, though each sees its own slices only. So what is shared among so and so many ranks is
    counted as if every slice filled its box of the grid: that sum is the same on all ranks, since they hold the same tensors.
    """
    shared: dict[int, int] = {}
    for piece in slices:
        if piece.members and piece.chunk is not None:
            shared[len(piece.members)] = shared.get(len(piece.members), 0) + chunk_bytes(piece)
    targets = {count: _target(nbytes // (count * _CHUNKS_PER_SHARE)) for count, nbytes in shared.items()}
    return [_cut_down(piece, targets.get(len(piece.members), LARGEST_CHUNK)) for piece in slices]


def chunk_rows(rows: int, most: int, *, spans: bool) -> int:
    """Into how many rows each a box of *rows* rows is cut, at most *most* of them where that can be had.

    Args:
        rows: of the box; at least 1.
        most: at least 1.
        spans: the box is all there is of dimension 0, so that the last piece may be shorter. Else other boxes follow, and all
            pieces must be equal; if that would make them less than an eighth of what was wanted, the box stays whole.
    """
    if rows <= most:
        return rows
    pieces = -(-rows // most)
    if spans:
        return -(-rows // pieces)
    return next((rows // n for n in range(pieces, 8 * rows // most + 1) if rows % n == 0), rows)


def chunk_bytes(piece: Slice) -> int:
    """What one whole chunk of *piece*'s grid takes; 0 if it has none."""
    return 0 if piece.chunk is None else math.prod(piece.chunk) * ITEM_BYTES[piece.dtype]


def _target(nbytes: int) -> int:
    """The power of two not above *nbytes*, within the bounds of a chunk."""
    return min(max(1 << max(nbytes.bit_length() - 1, 0), SMALLEST_CHUNK), LARGEST_CHUNK)


def _cut_down(piece: Slice, target: int) -> Slice:
    if not piece.chunk:
        return piece
    rows, *rest = piece.chunk
    most = max(target * rows // chunk_bytes(piece), 1)
    return replace(piece, chunk=(chunk_rows(rows, most, spans=rows >= piece.shape[0]), *rest))


def _row_at(piece: Slice, byte: int) -> int:
    """The boundary nearest to *byte* (counted from the slice's own start) at which it may be cut, clamped to the slice."""
    if byte <= 0 or piece.nbytes == 0:
        return 0
    if byte >= piece.nbytes:
        return piece.rows
    row_bytes, unit = piece.nbytes // piece.rows, piece.chunk[0] if piece.chunk else 1
    low = byte // (row_bytes * unit) * unit
    high = min(low + unit, piece.rows)  # the last chunk may be shorter
    return high if 2 * byte >= (low + high) * row_bytes else low


def bytes_of(slices: Sequence[Slice]) -> int:
    """Total bytes of *slices*, without alignment."""
    return sum(piece.nbytes for piece in slices)
