"""Parts of images for trainers that restore onto another world: laid out in windows, which they map.

A trainer of a new world needs ranges of images of an old one. It asks for so many bytes at a time as a window takes; they are
had from wherever they are nearest, verified here, and put there one after the other. Memory is bounded: windows count as slots
do, and all reading together takes ``_ROOM_BYTES`` beside them, and beside what ``Tiers`` takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, Corrupt, HoldfastError
from ..snapshot.record import SnapshotId
from ..snapshot.vectored import Regions
from ..storage.inflight import Buffers, Room
from . import wire_pb2 as wire
from .arenas import Arenas
from .client import WINDOW_BYTES, WINDOW_RANGES, WINDOWS, id_of
from .origins import Origin, Origins
from .peers import Peers
from .ranges import Batch, Wanted, batches
from .rebuild import Troubles, brought, by_agent, persistently
from .tasks import to_the_end

_BATCH_BYTES: Final = 32 << 20  # read at a time for one window
_ROOM_BYTES: Final = 96 << 20
_IMAGES: Final = 16  # that are kept open: each new rank reads parts of several, again and again
_LARGE_BYTES: Final = 64 << 10  # from there on, pieces are copied one by one
_FAR: Final = 1 << 62  # no image is that long

Bytes = npt.NDArray[np.uint8]
OpenTiers = Callable[[SnapshotId, int, int, Sequence[int]], Awaitable[Origin]]
"""``Tiers.origin``."""


@dataclass(slots=True, eq=False)
class _Way:
    """One way to have an image, opened when it is first needed. ``closed``: it is of no use, and not tried again."""

    what: str
    open: Callable[[], Awaitable[Origin]]
    closed: bool = False
    origin: Origin | None = None
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def opened(self, troubles: Troubles) -> Origin | None:
        """What it leads to; None if it leads nowhere, which *troubles* then has."""
        async with self._opening:
            if self.origin is None and not self.closed:
                try:
                    self.origin = await self.open()
                except (HoldfastError, ValueError) as error:  # a table that makes no sense
                    troubles.note(self.what, error)
                    self.closed = True
            return None if self.closed else self.origin


@dataclass(slots=True, eq=False)
class _Image:
    """An image that is being read: the ways to have it, nearest first, and how many reads use them now."""

    ways: list[_Way]
    users: int = 0
    retired: bool = False  # it is closed as soon as nobody uses it

    async def close_if_over(self) -> None:
        if self.retired and not self.users:
            origins = [way.origin for way in self.ways if way.origin is not None]
            self.ways.clear()
            for origin in origins:
                await origin.close()


@dataclass(slots=True, eq=False)
class _Reading:
    """One answer in the making: what is still wanted, the window that it goes to, and what came of it so far."""

    wanted: Wanted
    into: Bytes
    hows: dict[str, None] = field(default_factory=dict)
    pulled_bytes: int = 0


class Windows:
    """Answers ``Describe`` and ``Read``. All methods run on the event loop; heavy work goes to threads."""

    def __init__(self, name: str, arenas: Arenas, peers: Peers, origins: Origins, tiers: OpenTiers) -> None:
        self._name = name
        self._arenas = arenas
        self._peers = peers
        self._origins = origins
        self._tiers = tiers
        self._images: dict[bytes, _Image] = {}  # by request; the one used last is last
        self._locks: dict[tuple[int, int], asyncio.Lock] = {}  # by reader and window
        self._readers: set[int] = set()  # who may have windows
        self._room = Room(_ROOM_BYTES)
        self._buffers = Buffers(_ROOM_BYTES)

    # -- what trainers ask -------------------------------------------------------------------------------------------

    async def describe(self, request: wire.MaterialiseRequest) -> wire.Description:
        """What that image looks like, from whoever can say.

        Raises ``SnapshotLost`` if nobody can; what stood in the way, if that may pass.
        """
        return await persistently(f"describing the image of rank {request.rank}", partial(self._describe, request))

    async def _describe(self, request: wire.MaterialiseRequest) -> wire.Description:
        troubles = Troubles(request)
        async with self._using(request) as image:
            for way in image.ways:
                if (origin := await way.opened(troubles)) is not None:
                    return wire.Description(layout=origin.layout, image_bytes=origin.image_bytes, how=origin.how)
        await self._retire(request)
        raise troubles.error()

    async def read(self, request: wire.ReadRequest) -> wire.ReadReply:
        """Lay the ranges of an image out in a window; without any, give the reader's windows back.

        Raises:
            ConfigError: too much is asked for, or bytes that are not there.
            BudgetExceeded: there is no memory for the window.
            SnapshotLost: the bytes cannot be had, however often one tries.
            AgentUnreachable, DeadlinePassed, …: what stood in the way may be over at the next try.
        """
        if not request.ranges:
            await self.give_back(request.reader)
            return wire.ReadReply()
        wanted, nbytes = _wanted(request)
        async with self._lock(request.reader, request.window):
            self._readers.add(request.reader)
            made = asyncio.to_thread(self._arenas.window, request.reader, request.window, nbytes)
            window = await to_the_end(made)
            what = f"reading from the image of rank {request.image.rank}"
            reading = _Reading(wanted, window.bytes)
            await persistently(what, partial(self._lay_out, request.image, reading))
            return wire.ReadReply(path=window.path, how=" and ".join(reading.hows), pulled_bytes=reading.pulled_bytes)

    async def give_back(self, reader: int) -> None:
        """Free the windows of *reader*; with the last of them, all that was kept for reading."""
        async with AsyncExitStack() as stack:
            for index in range(WINDOWS):
                await stack.enter_async_context(self._lock(reader, index))
            await to_the_end(asyncio.to_thread(self._arenas.close_windows, reader))
            self._readers.discard(reader)
        if not self._readers:
            await self.forget()

    async def forget(self) -> None:
        """Close what is open for reading: the job is somewhere else by now, or nobody reads."""
        images, self._images = list(self._images.values()), {}
        self._buffers = Buffers(_ROOM_BYTES)
        for image in images:
            image.retired = True
            await image.close_if_over()

    def _lock(self, reader: int, index: int) -> asyncio.Lock:
        return self._locks.setdefault((reader, index), asyncio.Lock())

    # -- where it comes from -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _using(self, request: wire.MaterialiseRequest) -> AsyncIterator[_Image]:
        """The image that is asked for, which stays open while the block runs."""
        key = request.SerializeToString(deterministic=True)
        image = self._images.pop(key, None) or _Image([_Way(what, opened) for what, opened in self._ways(request)])
        self._images[key] = image
        image.users += 1
        try:
            while len(self._images) > _IMAGES:
                await self._drop(next(iter(self._images)))
            yield image
        finally:
            image.users -= 1
            await image.close_if_over()

    async def _retire(self, request: wire.MaterialiseRequest) -> None:
        """It could not be had: whoever asks again begins anew."""
        await self._drop(request.SerializeToString(deterministic=True))

    async def _drop(self, key: bytes) -> None:
        image = self._images.pop(key, None)
        if image is not None:
            image.retired = True
            await image.close_if_over()

    def _ways(self, request: wire.MaterialiseRequest) -> Iterator[tuple[str, Callable[[], Awaitable[Origin]]]]:
        """All ways to have parts of the image, the nearest first, each with its name."""
        if self._origins.here(request) is not None:
            yield "reading the slot here", partial(self._origins.copy_here, request)
        yield from self._origins.ways(request)
        which = id_of(request.id), request.rank, request.world
        for agent, tiers in by_agent(request, self._name):
            what = f"reading what agent {agent} finds in its tiers"
            if agent != self._name:
                yield what, partial(self._brought, request, tiers)
                continue
            # At first the nearest only: another may be away, and would be waited for.
            indices = sorted({tier.tier for tier in tiers})
            yield what, partial(self._tiers, *which, indices[:1])
            if len(indices) > 1:
                yield what, partial(self._tiers, *which, indices)

    async def _brought(self, request: wire.MaterialiseRequest, tiers: list[wire.TierSource]) -> Origin:
        return await self._origins.copy_at(request, await brought(self._peers, request, tiers))

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _lay_out(self, request: wire.MaterialiseRequest, reading: _Reading) -> None:
        """Put what is still wanted into the window, from as many origins as it takes."""
        troubles = Troubles(request)
        async with self._using(request) as image:
            for way in image.ways:
                origin = await way.opened(troubles)
                if origin is None:
                    continue
                if (end := int(reading.wanted.ends.max(initial=0))) > origin.image_bytes:
                    raise ConfigError(f"bytes up to {end} of an image of {origin.image_bytes} are asked for")
                await self._read_from(way, origin, reading, troubles)
                if not len(reading.wanted):
                    return
        await self._retire(request)
        raise troubles.error()

    async def _read_from(self, way: _Way, origin: Origin, reading: _Reading, troubles: Troubles) -> None:
        """Put what *origin* has of what is wanted into the window.

        Damage costs no more than the batch in which it is; an origin that cannot be read at all is not asked again.
        """
        left: list[Wanted] = []
        for batch in batches(reading.wanted, origin.grain, _BATCH_BYTES):
            if way.closed:
                left.append(batch.wanted)
                continue
            try:
                reading.pulled_bytes += await self._read_batch(origin, batch, reading.into)
                reading.hows[origin.how] = None
            except (HoldfastError, ValueError) as error:
                troubles.note(way.what, error)
                way.closed = not isinstance(error, Corrupt | ValueError)
                left.append(batch.wanted)
        reading.wanted = Wanted.joined(left)

    async def _read_batch(self, origin: Origin, batch: Batch, into: Bytes) -> int:
        async with self._room.take(batch.nbytes + origin.room_bytes):
            with self._buffers.borrow(batch.nbytes) as held:
                pulled_bytes = await origin.fill(held, batch.spans)
                await to_the_end(asyncio.to_thread(_hand_out, held, batch, into))
        return pulled_bytes


def _wanted(request: wire.ReadRequest) -> tuple[Wanted, int]:
    """The ranges that are asked for, and how many bytes they have together. Raises ``ConfigError``."""
    if request.window >= WINDOWS:
        raise ConfigError(f"window {request.window} is asked for; a reader has {WINDOWS}")
    if len(request.ranges) % 16:
        raise ConfigError(f"ranges of {len(request.ranges)} bytes are asked for: each takes 16")
    table = np.frombuffer(request.ranges, "<u8").reshape(-1, 2)
    offsets, lengths = table[:, 0], table[:, 1]
    # One by one first: the sum of any might be small again.
    if len(table) > WINDOW_RANGES or max(lengths.max(), lengths.sum()) > WINDOW_BYTES:
        nbytes = sum(lengths.tolist())
        raise ConfigError(
            f"{nbytes} bytes in {len(table)} ranges are asked for at once; a window takes {WINDOW_BYTES} in {WINDOW_RANGES}"
        )
    if offsets.max() > _FAR:
        raise ConfigError(f"bytes from {offsets.max()} on of an image are asked for")
    return Wanted.of(offsets.astype(np.int64), lengths.astype(np.int64)), int(lengths.sum())


def _hand_out(held: Bytes, batch: Batch, into: Bytes) -> None:
    """Copy what is wanted of a batch from where it was read to where it belongs."""
    wanted, sources = batch.wanted, batch.sources()
    lengths = wanted.ends - wanted.starts
    if int(lengths.max()) < _LARGE_BYTES:
        targets = Regions((wanted.places + into.ctypes.data).astype(np.uint64), lengths.tolist())
        targets.copy_from(targets.moved_to((sources + held.ctypes.data).astype(np.uint64)))
        return
    for at, source, nbytes in zip(wanted.places.tolist(), sources.tolist(), lengths.tolist(), strict=True):
        into[at : at + nbytes] = held[source : source + nbytes]
