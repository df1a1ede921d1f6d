"""Reading the images that agents hold, for those who are no agent: block by block, each verified before it is given out.

A slot on this machine is mapped, read-only; any other is streamed from its agent's bulk port. Either way the manifest, which the
agent gives or the slot has, says which bytes are right. Nothing is asked of an agent but to send: no slot is filled or kept for a
reader, so a job that trains on may overwrite what is being read, which then is ``SourceGone``.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from ..erasure.kernel import block_checksums
from ..errors import ConfigError, Corrupt, HoldfastError, SourceGone
from ..snapshot.arena import measure, parse_name
from ..snapshot.layout import Layout
from ..snapshot.record import FREE_WORD, OPEN_WORD, RECORD_BYTES, Record, SnapshotId
from . import wire_pb2 as wire
from .bulk import Stream
from .client import wire_id
from .manifest import Manifest
from .peers import Peers

_WORD_OFFSET: Final = 4096
_TABLE_OFFSET: Final = 8192
# Read at least so much at a time: thousands of small tensors are not asked for one by one. All images share what is kept of it.
_AHEAD_BYTES: Final = 16 << 20
_KEPT_BYTES: Final = 256 << 20
_STREAM_S: Final = 600.0

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of an image: whose it is, and where.

    Attributes:
        address: where its agent is called by its peers.
        path: of its slot.
        local: whether the slot is on this machine and may be mapped.
    """

    agent: str
    address: str
    path: str
    rank: int
    checks_crc: int
    local: bool


class Held(Protocol):
    """The bytes of one copy, once it is open."""

    manifest: Manifest

    async def read(self, out: Bytes, start: int) -> None:
        """Fill *out* with the bytes of the image from *start* on; not verified."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class MappedSlot:
    """A slot on this machine, mapped read-only. Raises ``SourceGone`` if it no longer holds that snapshot."""

    def __init__(self, copy: Copy, id: SnapshotId) -> None:
        self._copy, self._id = copy, id
        identity = parse_name(Path(copy.path).name)
        place = None if identity is None else measure(Path(copy.path), *identity)
        if place is None:
            raise SourceGone(f"{copy.path} is no slot of ours")
        with open(_no_link(copy.path), "rb") as file:
            self._map = mmap.mmap(file.fileno(), place.file_bytes, prot=mmap.PROT_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        self._image = self._bytes[_TABLE_OFFSET + place.table_bytes :]
        self.manifest = self._manifest()
        if self.manifest.record.image_bytes > self._image.nbytes:
            raise Corrupt(f"{copy.path} is too short for its image")

    def _manifest(self) -> Manifest:
        """What the slot says of itself; verified against the checksums in its record."""
        record = self._sealed()
        table = self._bytes[_TABLE_OFFSET:]
        checks = 4 * -(-record.image_bytes // record.block_bytes)
        return Manifest.of(
            self._bytes[:RECORD_BYTES].tobytes(),
            table[:checks].tobytes(),
            table[checks : checks + record.layout_bytes].tobytes(),
        )

    def _sealed(self) -> Record:
        word = int(self._bytes[_WORD_OFFSET : _WORD_OFFSET + 8].view(np.uint64)[0])
        record, _ = Record.from_bytes(self._bytes[:RECORD_BYTES].tobytes())
        same = (record.id, record.rank, record.checks_crc) == (self._id, self._copy.rank, self._copy.checks_crc)
        if word in (FREE_WORD, OPEN_WORD) or not record.sealed_by(word) or not same:
            raise SourceGone(f"{self._copy.path} no longer holds {self._id} of rank {self._copy.rank}")
        return record

    async def read(self, out: Bytes, start: int) -> None:
        """As ``Held.read``. Raises ``SourceGone`` if it was overwritten before it was read, or meanwhile."""
        await asyncio.to_thread(np.copyto, out, self._image[start : start + out.nbytes])
        self._sealed()

    def close(self) -> None:
        """Drop the mapping."""
        self._bytes = self._image = np.empty(0, np.uint8)
        try:
            self._map.close()
        except BufferError:  # a read was cancelled, and its thread still copies: the mapping goes with its last view
            return


def _no_link(path: str) -> str:
    if os.path.islink(path):
        raise SourceGone(f"{path} is a symbolic link, not a slot")
    return path


class StreamedSlot:
    """A slot of an agent elsewhere. Every read is a grant and a stream of its own."""

    def __init__(
        self, copy: Copy, id: SnapshotId, manifest: Manifest, peers: Peers, tls: ssl.SSLContext | None
    ) -> None:
        self._copy, self._id, self._peers, self._tls = copy, id, peers, tls
        self.manifest = manifest

    @classmethod
    async def open(cls, copy: Copy, id: SnapshotId, peers: Peers, tls: ssl.SSLContext | None) -> StreamedSlot:
        """Ask for the manifest. Raises ``SnapshotUnknown``, ``Corrupt``, and what peers do."""
        image = wire.ImageSource(rank=copy.rank, checks_crc=copy.checks_crc)
        told = await peers.manifest(copy.address, wire.ManifestRequest(id=wire_id(id), image=image))
        manifest = Manifest.of(told.record, told.checks, told.text)
        record = manifest.record
        if (record.id, record.rank, record.checks_crc) != (id, copy.rank, copy.checks_crc):
            raise Corrupt(f"agent {copy.agent} answers for {record.id} of rank {record.rank}")
        return cls(copy, id, manifest, peers, tls)

    async def read(self, out: Bytes, start: int) -> None:
        """As ``Held.read``."""
        request = wire.GrantRequest(
            id=wire_id(self._id), purpose="read",
            image=wire.ImageSource(rank=self._copy.rank, checks_crc=self._copy.checks_crc),
            ranges=[wire.Range(offset=start, nbytes=out.nbytes)],
        )  # fmt: skip
        reply = await self._peers.grant(self._copy.address, request)
        host = self._copy.address.rpartition(":")[0].strip("[]")
        stream = Stream(host, reply.port, reply.token, peer=self._copy.agent, tls=self._tls, deadline_s=_STREAM_S)
        ended = threading.Event()
        try:
            await asyncio.to_thread(_receive, stream, out, ended)
        except asyncio.CancelledError:
            stream.cancel()  # the thread writes into memory of the caller: it has to be over first
            await asyncio.to_thread(ended.wait, 5.0)
            raise

    def close(self) -> None:
        """Nothing is held between reads."""


def _receive(stream: Stream, out: Bytes, ended: threading.Event) -> None:
    try:
        with stream:
            stream.receive(out.data)
    finally:
        ended.set()


class HeldImage:
    """One rank's image, of which there may be several copies: the next one serves where one is damaged or gone.

    Attributes:
        layout: which slices there are.
        damaged: (agent, block) of what did not match its checksum.
    """

    def __init__(
        self,
        copies: Sequence[Held],
        names: Sequence[str],
        note: Callable[[str], None] = lambda text: None,
        ahead_bytes: int = _AHEAD_BYTES,
    ) -> None:
        """*copies*: open, of the same bytes, at least one; *names*: what each is called. *note* is told of every fallback.
        At most *ahead_bytes* of what was read are kept."""
        self._copies, self._names, self._note = list(copies), list(names), note
        self._manifest = copies[0].manifest
        self.layout = Layout.from_text(self._manifest.layout)
        if self.layout.values_offset > self.nbytes:
            raise Corrupt(f"the layout of {self._manifest.record.id} is longer than its image")
        self.damaged: list[tuple[str, int]] = []
        self._ahead_bytes = ahead_bytes
        self._lock = asyncio.Lock()  # one reads at a time: neighbours then find what they want in the window
        self._window: Bytes = np.empty(0, np.uint8)
        self._window_start = 0

    @property
    def nbytes(self) -> int:
        """Length of the image."""
        return self._manifest.record.image_bytes

    @property
    def record(self) -> Record:
        """What its slot's record says."""
        return self._manifest.record

    async def read_slice(self, index: int, out: Bytes, first_row: int = 0, rows: int | None = None) -> None:
        """Rows of slice number *index* into *out*, verified. Raises ``Corrupt``, ``SourceGone``, …"""
        placed = self.layout.placed[index]
        count = placed.slice.rows - first_row if rows is None else rows
        width = placed.slice.nbytes // max(placed.slice.rows, 1)
        if out.nbytes != count * width:
            raise ValueError(f"{out.nbytes} bytes for {count} rows of {width}")
        await self.read(placed.offset + first_row * width, out)

    async def read_values(self) -> bytes:
        """The encoded values, verified."""
        out = np.empty(self.nbytes - self.layout.values_offset, np.uint8)
        await self.read(self.layout.values_offset, out)
        return out.tobytes()

    async def read(self, start: int, out: Bytes) -> None:
        """Bytes of the image from *start* on, verified."""
        end = start + out.nbytes
        if not 0 <= start <= end <= self.nbytes:
            raise ValueError(f"bytes {start} to {end} of an image of {self.nbytes}")
        if not out.nbytes:
            return
        async with self._lock:
            if not (self._window_start <= start and end <= self._window_start + self._window.nbytes):
                block = self._manifest.record.block_bytes
                first = start // block * block
                last = max(-(-end // block) * block, first + self._ahead_bytes // block * block)
                self._window = np.empty(0, np.uint8)  # first: two of them are not needed at a time
                self._window = await self._verified(first, min(self.nbytes, last))
                self._window_start = first
            at = start - self._window_start
            np.copyto(out, self._window[at : at + out.nbytes])
            if self._window.nbytes > max(self._ahead_bytes, self._manifest.record.block_bytes):
                self._window = np.empty(0, np.uint8)

    async def _verified(self, start: int, end: int) -> Bytes:
        """Bytes ``start .. end`` of the image, which begin and end with blocks; from whichever copies have them sound."""
        reasons: list[HoldfastError] = []
        found = np.empty(end - start, np.uint8)
        for copy, name in zip(self._copies, self._names, strict=True):
            try:
                await copy.read(found, start)
                await self._check(found, start, name)
            except HoldfastError as error:
                self._note(str(error) if name in str(error) else f"{name}: {error}")
                reasons.append(error)
                continue
            return found
        raise next((error for error in reasons if isinstance(error, Corrupt)), reasons[-1])

    async def _check(self, found: Bytes, start: int, name: str) -> None:
        block = self._manifest.record.block_bytes
        sums = await asyncio.to_thread(block_checksums, found.ctypes.data, found.nbytes, block)
        bad = np.flatnonzero(sums != self._manifest.checks[start // block :][: len(sums)])
        if len(bad):
            numbers = [int(b) + start // block for b in bad]
            self.damaged += [(name, number) for number in numbers]
            shown = ", ".join(map(str, numbers[:5]))
            raise Corrupt(
                f"{name}: {len(bad)} blocks of {self.record.id} of rank {self.record.rank} do not match their checksum: {shown}"
            )

    def close(self) -> None:
        """Give back mappings and memory."""
        self._window = np.empty(0, np.uint8)
        for copy in self._copies:
            copy.close()


async def open_image(
    id: SnapshotId,
    copies: Sequence[Copy],
    peers: Peers,
    tls: ssl.SSLContext | None,
    note: Callable[[str], None] = lambda text: None,
    images: int = 1,
) -> HeldImage:
    """Open one rank's image; *copies* are those that agents say they hold, the nearest first. *images* are read together.

    Raises:
        Whatever stood in the way of the last copy, if none can be opened.
    """
    held: list[Held] = []
    names: list[str] = []
    failed: HoldfastError = SourceGone(f"nobody holds {id}")
    for copy in copies:
        if held and copy.checks_crc != held[0].manifest.record.checks_crc:
            continue  # other bytes under the same name; the first one's word counts
        try:
            held.append(await _open(copy, id, peers, tls))
            names.append(f"agent {copy.agent}, {copy.path}")
        except (HoldfastError, OSError) as error:
            failed = error if isinstance(error, HoldfastError) else ConfigError(f"{copy.path}: {error.strerror}")
            note(f"agent {copy.agent}: {failed}")
    if not held:
        raise failed
    return HeldImage(held, names, note, min(_AHEAD_BYTES, _KEPT_BYTES // images))


async def _open(copy: Copy, id: SnapshotId, peers: Peers, tls: ssl.SSLContext | None) -> Held:
    if copy.local:
        try:
            return await asyncio.to_thread(MappedSlot, copy, id)
        except (SourceGone, Corrupt, ConfigError, OSError):
            if not copy.address:
                raise
    return await StreamedSlot.open(copy, id, peers, tls)
