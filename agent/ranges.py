"""Which bytes of an image are to be read for the ranges of it that somebody wants, in which order, and where they go. Pure.

What is verified is verified in blocks or, in tiers, in chunks. So reads begin and end at bounds of these, a *grain*; what several
ranges touch is read once; and only so much is read at a time as there is memory for, a *batch*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Grain(Protocol):
    """The bounds at which an image may be cut. Positions are byte offsets, ``int64[n]``."""

    def floor(self, at: Ints) -> Ints:
        """For each position, the last bound that is not after it."""
        ...

    def ceil(self, at: Ints) -> Ints:
        """For each position, the first bound that is not before it. Positions are above 0."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of *unit* bytes each, but for the last, of an image of *nbytes*."""

    unit: int
    nbytes: int

    def floor(self, at: Ints) -> Ints:
        """As ``Grain.floor``."""
        return at // self.unit * self.unit

    def ceil(self, at: Ints) -> Ints:
        """As ``Grain.ceil``."""
        return np.minimum(-(-at // self.unit) * self.unit, self.nbytes)


class Pieces:
    """Pieces of various lengths that do not overlap; every byte between them is by itself."""

    def __init__(self, pieces: Iterable[tuple[int, int]]) -> None:
        """*pieces*: first byte, and the one after the last; in ascending order, none empty."""
        # One that nothing lies in comes before all: then every position has a piece that begins before it.
        bounds = np.array([(-1, -1), *pieces], np.int64)
        self._starts, self._ends = bounds[:, 0], bounds[:, 1]

    def floor(self, at: Ints) -> Ints:
        """As ``Grain.floor``."""
        piece = np.searchsorted(self._starts, at, "right") - 1
        return np.where(at < self._ends[piece], self._starts[piece], at)

    def ceil(self, at: Ints) -> Ints:
        """As ``Grain.ceil``."""
        piece = np.searchsorted(self._starts, at - 1, "right") - 1
        return np.maximum(at, self._ends[piece])


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Ranges of an image, ``int64[n]`` each: the first byte, the one after the last, and where it goes. None is empty."""

    starts: Ints
    ends: Ints
    places: Ints

    @classmethod
    def of(cls, offsets: Ints, lengths: Ints) -> Wanted:
        """Ranges that go one after the other, in this order. Those without bytes are left out."""
        places: Ints = np.cumsum(lengths, dtype=np.int64) - lengths
        filled = lengths > 0
        return cls(offsets[filled], (offsets + lengths)[filled], places[filled])

    @classmethod
    def joined(cls, parts: Sequence[Wanted]) -> Wanted:
        """All of them."""
        none = np.empty(0, np.int64)
        starts = np.concatenate([none, *(part.starts for part in parts)])
        ends = np.concatenate([none, *(part.ends for part in parts)])
        return cls(starts, ends, np.concatenate([none, *(part.places for part in parts)]))

    def __len__(self) -> int:
        return len(self.starts)

    def within(self, start: int, end: int) -> Wanted:
        """What of them lies in the bytes ``start .. end-1`` of the image."""
        starts, ends = np.maximum(self.starts, start), np.minimum(self.ends, end)
        some = starts < ends
        return Wanted(starts[some], ends[some], (self.places + starts - self.starts)[some])


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start .. end-1`` of an image, which are read to ``at`` of whatever they are read into."""

    start: int
    end: int
    at: int

    @property
    def nbytes(self) -> int:
        """How many they are."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """What is read at a time: spans, one after the other and in ascending order, and what is wanted of them."""

    spans: tuple[Span, ...]
    wanted: Wanted

    @property
    def nbytes(self) -> int:
        """Memory that its spans take."""
        return self.spans[-1].at + self.spans[-1].nbytes

    def sources(self) -> Ints:
        """Where in that memory each of the wanted ranges begins."""
        starts = np.array([span.start for span in self.spans], np.int64)
        shifts = np.array([span.at - span.start for span in self.spans], np.int64)
        return self.wanted.starts + shifts[np.searchsorted(starts, self.wanted.starts, "right") - 1]


def batches(wanted: Wanted, grain: Grain, most_bytes: int) -> Iterator[Batch]:
    """All that has to be read for *wanted*, each byte once; *most_bytes* at a time, or one piece of *grain* that is longer."""
    spans: list[Span] = []
    held = 0
    for start, end in runs(grain.floor(wanted.starts), grain.ceil(wanted.ends)):
        at = start
        while at < end:
            stop = _stop(grain, at, end, most_bytes - held)
            if stop == at:
                if spans:
                    yield _batch(spans, wanted)
                    spans, held = [], 0
                    continue
                stop = int(grain.ceil(np.array([at + 1]))[0])
            spans.append(Span(at, stop, held))
            held, at = held + stop - at, stop
    if spans:
        yield _batch(spans, wanted)


def runs(starts: Ints, ends: Ints) -> list[tuple[int, int]]:
    """The union of ranges, as ranges that neither touch nor overlap, in ascending order. None is empty."""
    if not len(starts):
        return []
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.concatenate([[True], starts[1:] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return list(zip(starts[first].tolist(), reach[last].tolist(), strict=True))


def _stop(grain: Grain, start: int, end: int, room: int) -> int:
    """The last bound up to which *room* suffices; *start* if there is none."""
    return end if end - start <= room else max(start, int(grain.floor(np.array([start + room]))[0]))


def _batch(spans: Sequence[Span], wanted: Wanted) -> Batch:
    # Between its first byte and its last, nothing is wanted that is in none of its spans.
    return Batch(tuple(spans), wanted.within(spans[0].start, spans[-1].end))
