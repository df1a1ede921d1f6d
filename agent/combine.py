"""Computing bytes out of images and parity, here and at peers: one engine for protecting, rebuilding and fetching.

What is to be computed is a list of terms (``erasure.stripes``): each adds a multiple of some source's bytes to the target.
Terms are cut into pieces that end where the source's checksum blocks end; a piece is received (or read here), verified,
and only then added. One thread per source; buffers of one piece each, so memory stays bounded, and TCP does the rest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ..crashpoints import reach
from ..erasure.kernel import block_checksums, combine, multiply_add
from ..erasure.stripes import Kind, Term
from ..errors import HoldfastError
from .bulk import Stream
from .tasks import ended

PIECE_BYTES: Final = 1 << 22  # small enough to be verified and added while in the cache

Bytes = npt.NDArray[np.uint8]
Where = tuple[int, Kind]
"""A source as terms name it: index of the member, and which of its bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Bytes that terms refer to: in memory here, or at a peer.

    Attributes:
        block_bytes, checks: crc32c (``uint32[blocks]``) of each block of so many bytes; the last may be shorter.
        nbytes: length of the whole.
        here: the bytes, if they are in this node's memory; kept mapped by whoever gives them.
        open: asks the peer for these (offset, length) ranges, in this order; the stream is not connected yet.
    """

    nbytes: int
    block_bytes: int
    checks: npt.NDArray[np.uint32]
    here: Bytes | None = None
    open: Callable[[Sequence[tuple[int, int]]], Awaitable[Stream]] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One term, or a part of it. ``read_bytes``: up to the end of the last checksum block that it touches, which is read
    and verified with it."""

    target_offset: int
    source_offset: int
    nbytes: int
    coefficient: int
    read_bytes: int


@dataclass(slots=True)
class Outcome:
    """What came of it.

    Attributes:
        pulled_bytes: received from peers.
        damaged: pieces that do not match their checksum at the source itself, by source: found twice.
        refused: pieces that arrived damaged once.
    """

    pulled_bytes: int = 0
    refused: int = 0
    damaged: dict[Where, list[Piece]] = field(default_factory=dict)


class SourceFailed(HoldfastError):
    """A source could not be read. ``where`` says which; ``error`` why."""

    def __init__(self, where: Where, error: Exception) -> None:
        super().__init__(str(error))
        self.where = where
        self.error = error


def cut(terms: Sequence[Term], source: Source, step: int) -> list[Piece]:
    """The pieces of *terms*, all of *source*; *step* bytes each but for the last of each term."""
    pieces = []
    for term in terms:
        for at in range(0, term.nbytes, step):
            start, nbytes = term.source_offset + at, min(step, term.nbytes - at)
            whole = -(-nbytes // source.block_bytes) * source.block_bytes
            read_bytes = min(whole, source.nbytes - start)
            pieces.append(Piece(term.target_offset + at, start, nbytes, term.coefficient, read_bytes))
    return pieces


@dataclass(slots=True, eq=False)
class _Spot:
    """The bytes of the target that pieces of one offset make up; one thread works on them at a time.

    Attributes:
        nbytes: of the longest of these pieces. count: how many there are.
        begun: one of them is there, so that others are added to it.
    """

    nbytes: int = 0
    count: int = 0
    begun: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Combiner:
    """Adds terms up in one target, which stays mapped until ``run`` has returned."""

    def __init__(self, target: Bytes, unit: int, pool: Executor, streams: asyncio.Semaphore) -> None:
        """*unit*: the longest checksum block of any source; all terms begin at multiples of it, there and in the target.
        *streams*: how many may be open at a time; each takes a thread of *pool*.
        """
        self._admitted = streams
        self._target = target
        self._step = max(PIECE_BYTES, unit)
        self._address = int(target.ctypes.data)
        self._pool = pool
        self._spots: dict[int, _Spot] = {}  # by offset; all sources are cut alike
        self._stop = threading.Event()
        self._streams: set[Stream] = set()

    async def run(
        self, terms: Sequence[Term], sources: Mapping[Where, Source], ranges: Sequence[tuple[int, int]] | None = None
    ) -> Outcome:
        """Compute the target, or these (start, end) ranges of it, as the sum of all *terms*; what none names is zero.

        Raises ``SourceFailed`` if one cannot be read; then what was to be computed is undefined. Damaged pieces are left
        out, and told.
        """
        by_source: dict[Where, list[Term]] = {}
        for term in terms:
            by_source.setdefault((term.member, term.kind), []).append(term)
        pieces = {where: cut(mine, sources[where], self._step) for where, mine in by_source.items()}
        for piece in (piece for mine in pieces.values() for piece in mine):
            spot = self._spots.setdefault(piece.target_offset, _Spot())
            spot.nbytes, spot.count = max(spot.nbytes, piece.nbytes), spot.count + 1
        outcome = Outcome()
        work: list[asyncio.Future[None]] = [
            asyncio.ensure_future(
                asyncio.to_thread(self._clear, [(0, len(self._target))] if ranges is None else ranges)
            )
        ]
        work += [
            asyncio.ensure_future(self._add(where, mine, sources[where], outcome)) for where, mine in pieces.items()
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            if not all(task.done() for task in work):
                self._stop.set()
                for stream in list(self._streams):
                    stream.cancel()
            await ended(work)  # until then, threads write to the target
        errors = {task: error for task in work if (error := task.exception()) is not None}
        if errors:  # those that failed later did so because all were stopped
            raise next(error for task, error in errors.items() if task in done)
        return outcome

    def _clear(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Zeros where no piece goes."""
        spots = sorted((offset, offset + spot.nbytes) for offset, spot in self._spots.items())
        for start, end in ranges:
            at = start
            for first, last in (spot for spot in spots if start <= spot[0] < end):
                self._target[at:first] = 0
                at = last
            self._target[at:end] = 0

    async def _add(self, where: Where, pieces: list[Piece], source: Source, outcome: Outcome) -> None:
        """One source's pieces, each of them tried twice."""
        try:
            bad = await self._try(_rotated(pieces, where[0]), source, outcome)
            if bad:
                outcome.refused += len(bad)
                bad = await self._try(bad, source, outcome)
        except (HoldfastError, OSError) as error:
            raise SourceFailed(where, error) from error
        if bad:
            outcome.damaged[where] = bad

    async def _try(self, pieces: list[Piece], source: Source, outcome: Outcome) -> list[Piece]:
        loop = asyncio.get_running_loop()
        if source.here is not None:
            return await loop.run_in_executor(self._pool, self._add_here, pieces, source)
        assert source.open is not None
        async with self._admitted:  # before it is opened: what peers grant is not good for long
            stream = await source.open([(piece.source_offset, piece.read_bytes) for piece in pieces])
            if self._stop.is_set():
                return []
            self._streams.add(stream)
            try:
                bad = await loop.run_in_executor(self._pool, self._add_pulled, pieces, source, stream)
            finally:
                self._streams.discard(stream)
        outcome.pulled_bytes += sum(piece.read_bytes for piece in pieces)
        return bad

    def _add_here(self, pieces: Sequence[Piece], source: Source) -> list[Piece]:
        assert source.here is not None
        address = int(source.here.ctypes.data)
        return [p for p in pieces if not self._stop.is_set() and not self._take(p, source, address + p.source_offset)]

    def _add_pulled(self, pieces: Sequence[Piece], source: Source, stream: Stream) -> list[Piece]:
        buffer = np.empty(max(piece.read_bytes for piece in pieces), np.uint8)
        bad: list[Piece] = []
        with stream:
            for piece in pieces:
                if self._stop.is_set():
                    break
                into = self._target[piece.target_offset :] if self._is_whole(piece) else buffer
                stream.receive(into[: piece.read_bytes].data)
                if self._stop.is_set():
                    break
                if not self._take(piece, source, int(into.ctypes.data)):
                    bad.append(piece)
        return bad

    def _is_whole(self, piece: Piece) -> bool:
        """Whether the piece's bytes, just as they are, are all that goes there."""
        alone = self._spots[piece.target_offset].count == 1
        return alone and piece.coefficient == 1 and piece.read_bytes == piece.nbytes

    def _take(self, piece: Piece, source: Source, address: int) -> bool:
        """Verify what lies at *address*, then add it; False if it is not what the source's manifest says."""
        first = piece.source_offset // source.block_bytes
        found = block_checksums(address, piece.read_bytes, source.block_bytes)
        if not np.array_equal(found, source.checks[first : first + len(found)]):
            return False
        spot, target = self._spots[piece.target_offset], self._address + piece.target_offset
        with spot.lock:
            if spot.begun:
                multiply_add(target, address, piece.nbytes, piece.coefficient)
            else:  # the first overwrites what is there: clearing it, and reading the zeros back, would take as long
                if address != target:
                    combine(np.array([[piece.coefficient]], np.uint8), [address], [target], piece.nbytes)
                self._target[piece.target_offset + piece.nbytes : piece.target_offset + spot.nbytes] = 0
                spot.begun = True
        reach("combine.mid-stripe")
        return True


def _rotated(pieces: list[Piece], turn: int) -> list[Piece]:
    """Begin elsewhere than the other sources, which add to the same target."""
    start = (turn * 7919) % len(pieces) if pieces else 0
    return pieces[start:] + pieces[:start]
