"""Where an image can be had from, block by block: a slot here, another agent's slot, or what its group still has of it.

All three are sums of blocks that lie elsewhere (``combine``). An ``Origin`` knows which, and puts any ranges of the image where
they are wanted, verified. Whatever proves damaged on the way is an erasure: what was to come from there is computed from others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..erasure.kernel import block_checksums
from ..erasure.stripes import Geometry, Kind, Term, Unrecoverable, rebuild_terms
from ..errors import Corrupt, HoldfastError, Remedy, SnapshotLost, SnapshotUnknown
from ..snapshot.arena import Slot
from ..snapshot.record import Record
from . import wire_pb2 as wire
from .arenas import Arenas
from .bulk import Stream
from .client import id_of, wire_id
from .combine import PIECE_BYTES, Outcome, Source, SourceFailed, Where
from .manifest import CellTable, Manifest
from .peers import Peers
from .ranges import Blocks, Grain, Span

_log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Extents = Sequence[tuple[int, int]]
Combine = Callable[[Any, int, Sequence[Term], dict[Where, Source], Extents | None], Awaitable[Outcome]]
Open = Callable[[str, wire.GrantRequest, Extents], Awaitable[Stream]]
Terms = Callable[[Collection[Where], int, int], list[Term]]
"""What computes a range of an image without these sources. Raises ``Unrecoverable``."""


class Origin(Protocol):
    """An image, wherever it is."""

    @property
    def image_bytes(self) -> int:
        """Its length."""
        ...

    @property
    def layout(self) -> bytes:
        """Its layout's text."""
        ...

    @property
    def how(self) -> str:
        """In words, how it is had from there."""
        ...

    @property
    def grain(self) -> Grain:
        """The bounds between which it is read."""
        ...

    @property
    def room_bytes(self) -> int:
        """Memory that reading takes besides what it is read into."""
        ...

    async def fill(self, target: Bytes, spans: Sequence[Span]) -> int:
        """Put these bytes into *target*, verified; how many came from elsewhere. Spans begin and end at bounds of the grain.

        Raises:
            Corrupt, Unrecoverable: some of them are damaged there; others need not be.
            HoldfastError: they cannot be had from there.
        """
        ...

    async def close(self) -> None:
        """Nobody reads from it any more."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """A span that is still to be computed, without some sources: these are damaged there."""

    span: Span
    without: frozenset[Where] = frozenset()

    @property
    def extent(self) -> tuple[int, int]:
        return self.span.at, self.span.at + self.span.nbytes


class Blockwise:
    """An image of which the block checksums are known, as a sum of sources that have checksums of their own. An ``Origin``."""

    def __init__(
        self, manifest: Manifest, unit: int, sources: dict[Where, Source], terms: Terms, combine: Combine, how: str
    ) -> None:
        """*unit*: the longest checksum block of any source."""
        self.manifest = manifest
        self.image_bytes = manifest.record.image_bytes
        self.layout = manifest.layout
        self.how = how
        self.grain = Blocks(unit, self.image_bytes)
        pulled = [source for source in sources.values() if source.open is not None]
        self.room_bytes = len(pulled) * max(PIECE_BYTES, unit) if len(sources) > 1 else 0
        # What a peer sends of the image itself is verified before it is put anywhere. What is computed is verified at the end;
        # and what lies in a slot here, as its trainer may overwrite it after it was verified there.
        self._proved = len(pulled) == len(sources) == 1 and pulled[0].checks is manifest.checks
        self._sources = sources
        self._terms = terms
        self._combine = combine
        self._failed: set[Where] = set()

    async def fill(self, target: Bytes, spans: Sequence[Span]) -> int:
        """As ``Origin.fill``. Sources that cannot be read are left out from then on; those that are damaged, where they are."""
        todo, pulled_bytes = [_Part(span) for span in spans], 0
        while todo:
            terms = [term for part in todo for term in self._moved(part)]
            extents = [part.extent for part in todo]
            try:
                outcome = await self._combine(target, self.grain.unit, terms, self._sources, extents)
            except SourceFailed as error:
                if len(self._sources) == 1:
                    raise
                member, kind = error.where
                _log.warning("going on without %s of member %d: %s", kind.value, member, error)
                self._failed.add(error.where)
            else:
                pulled_bytes += outcome.pulled_bytes
                todo = _lacking(todo, outcome, self.grain.unit)
        if not self._proved:
            await asyncio.to_thread(self._verify, target, spans)
        return pulled_bytes

    def _moved(self, part: _Part) -> list[Term]:
        span, without = part.span, self._failed | part.without
        terms = self._terms(without, span.start, span.end)
        return [replace(term, target_offset=term.target_offset - span.start + span.at) for term in terms]

    def _verify(self, target: Bytes, spans: Sequence[Span]) -> None:
        record, bad = self.manifest.record, 0
        for span in spans:
            found = block_checksums(target.ctypes.data + span.at, span.nbytes, record.block_bytes)
            first = span.start // record.block_bytes
            bad += int(np.count_nonzero(found != self.manifest.checks[first : first + len(found)]))
        if bad:
            raise Corrupt(
                f"{bad} blocks of {record.id} of rank {record.rank}, {self.how}, do not match their checksums"
            )

    async def close(self) -> None:
        """As ``Origin.close``."""


class Origins:
    """Opens what a trainer's request names."""

    def __init__(self, name: str, arenas: Arenas, peers: Peers, opened: Open, combine: Combine) -> None:
        self._name = name
        self._arenas = arenas
        self._peers = peers
        self._open = opened
        self._combine = combine

    def ways(self, request: wire.MaterialiseRequest) -> Iterator[tuple[str, Callable[[], Awaitable[Blockwise]]]]:
        """All ways to have the image out of other agents' memory, the nearest first, each with its name."""
        for image in request.images:
            if image.rank == request.rank and image.agent != self._name:
                yield f"fetching from {image.agent}", partial(self.copy_at, request, image)
        # Between two groupings there may be parity of both, and of one of them too little.
        for key in dict.fromkeys(p.parity.key for p in request.parities if request.rank in p.parity.ranks):
            yield "rebuilding", partial(self.group, request, key)

    def here(self, request: wire.MaterialiseRequest) -> Slot | None:
        """The slot here that holds the image; None if there is none, or the request does not name it."""
        named = any(image.rank == request.rank and image.agent == self._name for image in request.images)
        return self._arenas.image(request.rank, id_of(request.id)) if named else None

    async def copy_here(self, request: wire.MaterialiseRequest) -> Blockwise:
        """The image in a slot here. Raises ``SnapshotUnknown``."""
        slot = self.here(request)
        record = slot.sealed_record() if slot is not None else None
        if slot is None or record is None:
            raise SnapshotUnknown(f"no slot here holds {id_of(request.id)} of rank {request.rank}")
        checks, layout = await asyncio.to_thread(slot.read_tables, record)
        manifest = _of_world(Manifest(record, checks, layout), request)
        here = slot.image[: record.image_bytes]
        return self._copy(
            manifest, Source(record.image_bytes, record.block_bytes, checks, here=here), "read from a slot here"
        )

    async def copy_at(self, request: wire.MaterialiseRequest, image: wire.Source) -> Blockwise:
        """The image in another agent's slot."""
        ask = wire.ManifestRequest(id=request.id, image=_image(image.rank, image.checks_crc))
        told = await self._peers.manifest(image.address, ask)
        manifest = _of_world(Manifest.of(told.record, told.checks, told.text), request)
        record = manifest.record
        if (record.id, record.rank, record.checks_crc) != (id_of(request.id), image.rank, image.checks_crc):
            raise Corrupt(f"agent {image.agent} answers for {record.id} of rank {record.rank}")
        source = self._image_at(image.address, manifest, "fetch")
        return self._copy(manifest, source, f"fetched from agent {image.agent}")

    def _copy(self, manifest: Manifest, source: Source, how: str) -> Blockwise:
        sources: dict[Where, Source] = {(0, Kind.IMAGE): source}
        return Blockwise(manifest, manifest.record.block_bytes, sources, _copied, self._combine, how)

    async def group(self, request: wire.MaterialiseRequest, key: int) -> Blockwise:
        """What can be had of a group's images and parity. Raises ``SnapshotLost`` if not even one cell's table can."""
        table: CellTable | None = None  # all say the same, and may be long: one is kept
        sources: dict[Where, Source] = {}
        for mate in (p for p in request.parities if p.parity.key == key):
            try:
                parity, its = await self._table(request, mate)
            except HoldfastError as error:
                _log.warning("the parity of agent %s counts as lost: %s", mate.agent, error)
                continue
            table = table or its
            sources[its.me, Kind.PARITY] = self._at(mate.address, parity, "rebuild", parity=_cell(mate.parity))
        if table is None:
            raise SnapshotLost(f"no table of the group of rank {request.rank} can be read")
        for index, manifest in enumerate(table.manifests):
            where = _holder(request, manifest.record) if manifest is not None else None
            if manifest is not None and where is not None and manifest.record.rank != request.rank:
                sources[index, Kind.IMAGE] = self._image_at(where.address, manifest, "rebuild")
        lost = table.ranks.index(request.rank)
        wanted = table.manifests[lost]
        assert wanted is not None
        how = f"rebuilt from {len(sources)} pieces of its group"
        terms = _rebuilding(table, lost, sources.keys())
        return Blockwise(_of_world(wanted, request), table.unit, sources, terms, self._combine, how)

    async def _table(self, request: wire.MaterialiseRequest, mate: wire.ParitySource) -> tuple[Manifest, CellTable]:
        """What that cell says of itself. Raises ``Corrupt``, and what peers do."""
        ask = wire.ManifestRequest(id=request.id, parity=_cell(mate.parity))
        told = await self._peers.manifest(mate.address, ask)
        parity, its = Manifest.of(told.record, told.checks, told.text), CellTable.from_text(told.text)
        if (its.key, its.me, its.ranks) != (mate.parity.key, mate.parity.index, list(mate.parity.ranks)):
            raise Corrupt(f"it answers for member {its.me} of {its.ranks}")
        return parity, its

    def _image_at(self, address: str, manifest: Manifest, purpose: str) -> Source:
        record = manifest.record
        return self._at(address, manifest, purpose, image=_image(record.rank, record.checks_crc))

    def _at(self, address: str, manifest: Manifest, purpose: str, **what: Any) -> Source:
        record = manifest.record
        request = wire.GrantRequest(id=wire_id(record.id), purpose=purpose, **what)
        opened = partial(self._open, address, request)
        return Source(record.image_bytes, record.block_bytes, manifest.checks, open=opened)


def passing(error: Exception) -> HoldfastError | None:
    """The error, if what it tells of may be over at the next try."""
    cause = error.error if isinstance(error, SourceFailed) else error
    return cause if isinstance(cause, HoldfastError) and cause.remedy is Remedy.RETRY else None


def _of_world(manifest: Manifest, request: wire.MaterialiseRequest) -> Manifest:
    record = manifest.record
    if record.world != request.world:
        raise SnapshotUnknown(
            f"{record.id} of rank {record.rank} is of {record.world} ranks; one of {request.world} is wanted"
        )
    return manifest


def _copied(without: Collection[Where], start: int, end: int) -> list[Term]:
    if without:
        raise Unrecoverable(f"blocks between byte {start} and {end} are damaged there")
    return [Term(start, 0, Kind.IMAGE, start, end - start, 1)]


def _rebuilding(table: CellTable, lost: int, there: Collection[Where]) -> Terms:
    """How ranges of the image of member *lost* are computed from the sources that are *there*."""
    lengths, geometry = table.lengths, Geometry.of(table.lengths, table.tolerance, table.unit)
    none = [index for index, manifest in enumerate(table.manifests) if manifest is None]
    having = frozenset(there)

    def terms(without: Collection[Where], start: int, end: int) -> list[Term]:
        left = having.difference(without)
        images = [*none, *(member for member, kind in left if kind is Kind.IMAGE)]
        parities = [member for member, kind in left if kind is Kind.PARITY]
        return rebuild_terms(geometry, lengths, lost, images, parities, start, end)

    return terms


def _lacking(todo: Sequence[_Part], outcome: Outcome, unit: int) -> list[_Part]:
    """What is still to be computed: where a piece was damaged. Of all sources, pieces begin alike.

    A damaged piece of several blocks does not tell which of them is: it is tried again block by block, and only what is found
    damaged then is left out, there.
    """
    found: dict[int, _Part] = {}
    for where, pieces in outcome.damaged.items():
        for piece in pieces:
            part = next(part for part in todo if part.extent[0] <= piece.target_offset < part.extent[1])
            without = part.without if piece.nbytes > unit else part.without | {where}
            ahead = part.span.start - part.span.at
            stop = piece.target_offset + piece.nbytes
            for at in range(piece.target_offset, stop, unit):
                same = found.get(at, _Part(Span(at + ahead, at + ahead, at), part.without))
                end = max(same.span.end, min(at + unit, stop) + ahead)
                found[at] = _Part(replace(same.span, end=end), same.without | without)
    return [found[at] for at in sorted(found)]


def _holder(request: wire.MaterialiseRequest, record: Record) -> wire.Source | None:
    """Who has that very image."""
    return next((i for i in request.images if i.rank == record.rank and i.checks_crc == record.checks_crc), None)


def _cell(parity: wire.Parity) -> wire.ParityCell:
    return wire.ParityCell(lane=parity.lane, key=parity.key, index=parity.index)


def _image(rank: int, checks_crc: int) -> wire.ImageSource:
    return wire.ImageSource(rank=rank, checks_crc=checks_crc)
