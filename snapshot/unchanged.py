"""Which bytes of an image its slot held before, so that what was computed of them need not be computed again. Pure.

Who copies into a slot knows it, and names the earlier filling by its nonce: who has something of that very filling (its
checksums, parity made of it) may go on using it where the bytes are the same. Who has not, or is not sure, computes all.

What is never written again is never looked at again, so damage would stay for good. Hence ``due``: a small share in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
ROUND: Final = 1024
"""Whatever could be left alone is made anew at least once in so many fillings."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Bytes of an image that are as in an earlier filling of the same slot.

    Attributes:
        since: the nonce of that filling.
        ranges: (start, end) in bytes, half-open, ascending and disjoint.
    """

    since: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """How much that is."""
        return sum(end - start for start, end in self.ranges)

    def blocks(self, image_bytes: int, block_bytes: int) -> Mask:
        """``bool[blocks]``: which blocks of an image of *image_bytes* lie within the ranges, each as a whole."""
        return blocks_within(self.ranges, image_bytes, block_bytes)


def blocks_within(ranges: Sequence[tuple[int, int]], nbytes: int, block_bytes: int) -> Mask:
    """``bool[blocks]``: which blocks of *nbytes* lie within (start, end) ranges, each as a whole; the last may be shorter."""
    count = -(-nbytes // block_bytes)
    same = np.zeros(count, np.bool_)
    for start, end in _joined(ranges):
        same[-(-start // block_bytes) : count if end >= nbytes else end // block_bytes] = True
    return same


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges, those that meet made one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif start < end:
            found.append((start, end))
    return found


def due(count: int, turn: int) -> slice:
    """Which of *count* things are made anew in that turn, whatever speaks for leaving them alone."""
    return slice(count * (turn % ROUND) // ROUND, count * (turn % ROUND + 1) // ROUND)


def runs(mask: Mask) -> list[tuple[int, int]]:
    """The (first, last + 1) of every run of True, ascending."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
