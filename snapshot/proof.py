"""Whether what now lies in the live tensors of all ranks together is what was sealed, by the checksums taken then.

Each rank sums up the bytes that it has taken from an image, where they lie now; the XOR of what all ranks' parts contribute to a
block of the image has to give that block's checksum (``erasure.crc``). So nobody needs all of it, and however the tensors are cut
now, a part that went elsewhere, or was left out, or taken twice, shows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..erasure.crc import contributions, whole
from ..erasure.kernel import crc32c_at
from .layout import ITEM_BYTES, Layout, Slice
from .live import Part, SourceImage

Numbers = npt.NDArray[np.int64]


def is_private(piece: Slice) -> bool:
    """Whether a slice is a whole tensor that its rank shared with nobody: others may have one of the same name, and no rank need
    want this one."""
    return not piece.members and piece.extent == piece.shape


def identities(held: Sequence[Slice]) -> npt.NDArray[np.uint64]:
    """``uint64[n]``: a digest of which box of which tensor each slice is; the same on all ranks that hold it."""
    digests = (hashlib.blake2b(json.dumps([s.name, s.start, s.extent]).encode(), digest_size=8).digest() for s in held)
    return np.frombuffer(b"".join(digests), np.uint64)


@dataclass(slots=True)
class Parts:
    """Parts of one image, and their checksums. ``add`` cuts them where blocks end."""

    block_bytes: int
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)

    def add(self, start: int, nbytes: int, address: int) -> None:
        """The *nbytes* of the image from *start* on lie at *address*."""
        end = start + nbytes
        while start < end:
            stop = min(end, (start // self.block_bytes + 1) * self.block_bytes)
            self.starts.append(start)
            self.lengths.append(stop - start)
            self.sums.append(crc32c_at(address, stop - start))
            address += stop - start
            start = stop

    def add_live(self, parts: Iterable[Part]) -> None:
        """What lies in live tensors now."""
        for part in parts:
            tensor = part.tensor.detach().cpu().contiguous()
            run, offsets = _runs(part)
            for number, offset in enumerate(offsets):
                self.add(part.placed.offset + int(offset), run, tensor.data_ptr() + number * run)

    def by_block(self, image_bytes: int) -> Tally:
        """What they contribute to each block of an image of that length."""
        starts, lengths = np.array(self.starts, np.int64), np.array(self.lengths, np.int64)
        ends = np.minimum((starts // self.block_bytes + 1) * self.block_bytes, image_bytes)
        shares = contributions(np.array(self.sums, np.uint32), lengths, ends - starts - lengths)
        tally = Tally.empty(image_bytes, self.block_bytes)
        np.bitwise_xor.at(tally.sums, starts // self.block_bytes, shares)
        np.add.at(tally.nbytes, starts // self.block_bytes, lengths)
        return tally


def _runs(part: Part) -> tuple[int, Numbers]:
    """Of a part: how long the runs are in which it lies in its slice's bytes, and where in them each begins, row-major."""
    extent, of, strides = part.box.extent, part.placed.slice.extent, part.span.strides
    item = ITEM_BYTES[part.placed.slice.dtype]
    outer = len(extent)
    while outer and (outer == len(extent) or extent[outer] == of[outer]):
        outer -= 1
    run = item
    for size in extent[outer:]:
        run *= size
    offsets: Numbers = np.array([part.span.offset], np.int64)
    for size, stride in zip(extent[:outer], strides[:outer], strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride * item).reshape(-1)
    return run, offsets


@dataclass(slots=True)
class Tally:
    """For each block of an image: the XOR of what parts contribute to its checksum, and how many bytes they have."""

    sums: npt.NDArray[np.uint32]
    nbytes: Numbers

    @classmethod
    def empty(cls, image_bytes: int, block_bytes: int) -> Tally:
        """Of no parts."""
        blocks = -(-image_bytes // block_bytes)
        return cls(np.zeros(blocks, np.uint32), np.zeros(blocks, np.int64))

    def add(self, other: Tally) -> None:
        """Of the parts of both."""
        self.sums ^= other.sums
        self.nbytes += other.nbytes

    def to_value(self) -> dict[str, Any]:
        """For ``codec.encode``: the blocks that have any."""
        blocks = np.flatnonzero(self.nbytes)
        return {"blocks": blocks, "sums": self.sums[blocks], "nbytes": self.nbytes[blocks]}

    def add_value(self, value: dict[str, Any]) -> None:
        """Of those that ``to_value`` gave elsewhere, too."""
        self.sums[value["blocks"]] ^= value["sums"]
        self.nbytes[value["blocks"]] += value["nbytes"]

    def judge(
        self, checks: npt.NDArray[np.uint32], image_bytes: int, block_bytes: int, aside: Numbers
    ) -> tuple[int, list[int]]:
        """How many live bytes are proved to be those that *checks* were taken of, and the blocks that are not.

        *aside*, ``int64[blocks]``: how many of the bytes are the image's own, which prove nothing.

        Of a block of which not every byte was counted once, nothing can be said: parts of it are held by several, or by nobody.
        """
        lengths = np.minimum(image_bytes - np.arange(len(checks)) * block_bytes, block_bytes)
        told = self.nbytes == lengths
        right = whole(self.sums, lengths) == checks
        return int((lengths - aside)[told & right].sum()), [int(block) for block in np.flatnonzero(told & ~right)]


def judged(source: SourceImage, told: Iterable[dict[str, Any]]) -> tuple[int, list[int]]:
    """As ``Tally.judge``: of an image that is mapped here, and what all ranks have *told* of it (``Tally.to_value``)."""
    rest = Parts(source.record.block_bytes)
    for start, nbytes in not_wanted(source.layout, source.nbytes):
        rest.add(start, nbytes, source.address + start)
    tally = rest.by_block(source.nbytes)
    aside = tally.nbytes.copy()
    for sums in told:
        tally.add_value(sums)
    return tally.judge(source.checks, source.nbytes, source.record.block_bytes, aside)


def not_wanted(layout: Layout, image_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what of an image no live tensor is compared with: private slices, gaps, and the values."""
    end = 0
    for placed in layout.placed:
        if placed.offset > end:
            yield end, placed.offset - end
        if is_private(placed.slice) and placed.slice.nbytes:
            yield placed.offset, placed.slice.nbytes
        end = placed.end
    if image_bytes > end:
        yield end, image_bytes - end
