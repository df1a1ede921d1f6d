"""Who copies what: the balanced, row-split share of state that several ranks hold alike. Pure.

Ranks that are replicas of each other (DDP, the replicate dimension of HSDP, tensors replicated over tensor-parallel
ranks) hold the same boxes with the same bytes. Each copies a disjoint share; together they copy every byte once. The
idea is REFT's (arXiv 2310.12670, "sharding the snapshot"); cutting by rows keeps every piece one contiguous box.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layout import Slice


def share(slices: Sequence[Slice], rank: int) -> list[Slice]:
    """The slices that *rank* copies of the state it holds, in order.

    Slices without ``members`` are kept whole. The slices of one member group are laid end to end and cut into one equal
    part per member, each cut moved to the nearest row boundary: each share is within one row (and a byte) of its fair
    part. Every rank must pass its group's slices in the same order; then the shares of all members are disjoint and
    cover everything.
    """
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


def _row_at(piece: Slice, byte: int) -> int:
    """The row boundary nearest to *byte* (counted from the slice's own start), clamped to the slice."""
    row_bytes = piece.nbytes // piece.rows if piece.rows else 0
    if row_bytes == 0:
        return 0
    return min(max((byte + row_bytes // 2) // row_bytes, 0), piece.rows)


def bytes_of(slices: Sequence[Slice]) -> int:
    """Total bytes of *slices*, without alignment."""
    return sum(piece.nbytes for piece in slices)
