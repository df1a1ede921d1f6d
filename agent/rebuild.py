"""Having an image on this node: as it is here, fetched from another agent, or computed from its group; always verified.

Whatever proves damaged on the way is an erasure: what was to come from there is computed from other members instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

from ..crashpoints import reach
from ..erasure.stripes import Geometry, Kind, Term, rebuild_terms
from ..errors import BudgetExceeded, Corrupt, HoldfastError, Remedy, SnapshotLost
from ..snapshot.arena import Slot
from ..snapshot.record import Record, SnapshotId
from . import wire_pb2 as wire
from .arenas import Arenas
from .bulk import Stream
from .client import id_of, wire_id
from .combine import Outcome, Source, SourceFailed, Where
from .manifest import CellTable, Manifest
from .peers import Peers

_log = logging.getLogger(__name__)
_PAUSES_S: Final = (0.2, 1.0, 3.0)  # before trying again what did not work for a passing reason

Ranges = Sequence[tuple[int, int]]
Combine = Callable[[Any, int, Sequence[Term], dict[Where, Source], Ranges | None], Awaitable[Outcome]]
Open = Callable[[str, wire.GrantRequest, Sequence[tuple[int, int]]], Awaitable[Stream]]
Way = Callable[[], Awaitable[wire.MaterialiseReply]]


class Load(Protocol):
    """``Tiers.load``."""

    async def __call__(
        self, id: SnapshotId, rank: int, world: int, tiers: Sequence[int], *, apart: bool = False
    ) -> wire.MaterialiseReply:
        """Have that image in a slot, read from a tier."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """A group that can compute an image: what one of its cells says, and what of it can still be had."""

    table: CellTable
    lost: int  # index of the member whose image is wanted
    sources: dict[Where, Source]

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.table.lengths, self.table.tolerance, self.table.unit)

    def terms(self, without: set[Where], start: int = 0, end: int | None = None) -> list[Term]:
        """What computes that range of the image. Raises ``Unrecoverable``."""
        having = self.sources.keys() - without
        images = [i for i, manifest in enumerate(self.table.manifests) if manifest is None]
        images += [member for member, kind in having if kind is Kind.IMAGE]
        parities = [member for member, kind in having if kind is Kind.PARITY]
        return rebuild_terms(self.geometry, self.table.lengths, self.lost, images, parities, start, end)


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes ``start .. end-1`` of an image, which are to be computed without some sources: these are damaged there."""

    start: int
    end: int
    without: frozenset[Where] = frozenset()


class Rebuilder:
    """Serves one request for an image.

    Attributes:
        repaired: damaged blocks of an image that was here, and tables, put right in their place.
    """

    def __init__(self, name: str, arenas: Arenas, peers: Peers, opened: Open, combine: Combine, load: Load) -> None:
        self._name = name
        self._arenas = arenas
        self._peers = peers
        self._open = opened
        self._combine = combine
        self._load = load
        self.repaired = 0

    async def run(self, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
        """See ``Protector.materialise``.

        Raises:
            SnapshotLost: it cannot be had, however often one tries.
            AgentUnreachable, DeadlinePassed, BudgetExceeded, …: what stood in the way may be over at the next try.
        """
        for pause_s in _PAUSES_S:
            try:
                return await self._try(request)
            except HoldfastError as error:
                if error.remedy is not Remedy.RETRY:
                    raise
                _log.warning("bringing the image of rank %d: %s; trying again", request.rank, error)
                await asyncio.sleep(pause_s)
        return await self._try(request)

    async def _try(self, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
        id = id_of(request.id)
        here = self._arenas.image(request.rank, id)
        if here is not None and any(i.rank == request.rank and i.agent == self._name for i in request.images):
            return wire.MaterialiseReply(path=here.place.path, how="held here")
        reasons: list[str] = []
        passing: HoldfastError | None = None  # what may be otherwise next time
        for what, attempt in self._ways(id, request):
            try:
                return await attempt()
            except BudgetExceeded:
                raise
            except (HoldfastError, ValueError) as error:  # ``Unrecoverable``; or a table that makes no sense
                reasons.append(f"{what}: {error}")
                passing = _passing(error) or passing
        if passing is not None:
            raise passing
        raise SnapshotLost(
            f"the image of {id} of rank {request.rank} cannot be had: {'; '.join(reasons) or 'no source'}"
        )

    def _ways(self, id: SnapshotId, request: wire.MaterialiseRequest) -> Iterator[tuple[str, Way]]:
        """All ways to have the image here, the nearest first, each with its name."""
        for image in request.images:
            if image.rank == request.rank and image.agent != self._name:
                yield f"fetching from {image.agent}", partial(self._fetch, id, image)
        # Between two groupings there may be parity of both, and of one of them too little.
        for key in dict.fromkeys(p.parity.key for p in request.parities if request.rank in p.parity.ranks):
            yield "rebuilding", partial(self._rebuild, id, request, key)
        nearest = sorted(request.tiers, key=lambda tier: (tier.agent != self._name, tier.tier))
        for agent in dict.fromkeys(tier.agent for tier in nearest):
            yield f"reading what agent {agent} finds in its tiers", partial(self._from_tiers, id, request, agent)

    # -- tiers -------------------------------------------------------------------------------------------------------

    async def _from_tiers(self, id: SnapshotId, request: wire.MaterialiseRequest, agent: str) -> wire.MaterialiseReply:
        """Read the image here; or, from a tier of another node, have its agent read it, and fetch it from there."""
        mine = [tier for tier in request.tiers if tier.agent == agent]
        if agent == self._name:
            return await self._load(id, request.rank, request.world, [tier.tier for tier in mine])
        ask = wire.MaterialiseRequest(id=request.id, rank=request.rank, world=request.world, tiers=mine)
        there = await self._peers.bring(mine[0].address, ask)
        source = wire.Source(rank=request.rank, agent=agent, address=mine[0].address, checks_crc=there.checks_crc)
        fetched = await self._fetch(id, source)
        fetched.how = f"{there.how} by agent {agent}, and fetched from there"
        return fetched

    # -- fetching ----------------------------------------------------------------------------------------------------

    async def _fetch(self, id: SnapshotId, image: wire.Source) -> wire.MaterialiseReply:
        request = wire.ManifestRequest(id=wire_id(id), image=_image(image.rank, image.checks_crc))
        told = await self._peers.manifest(image.address, request)
        manifest = Manifest.of(told.record, told.checks, told.text)
        record = manifest.record
        if (record.id, record.rank, record.checks_crc) != (id, image.rank, image.checks_crc):
            raise Corrupt(f"agent {image.agent} answers for {record.id} of rank {record.rank}")
        sources = {(0, Kind.IMAGE): self._image_at(image.address, manifest, "fetch")}

        async def pull(slot: Slot, ranges: Ranges) -> None:
            terms = [Term(start, 0, Kind.IMAGE, start, end - start, 1) for start, end in ranges]
            target = slot.image[: record.image_bytes]
            outcome = await self._combine(target, record.block_bytes, terms, sources, ranges)
            if outcome.damaged:
                raise Corrupt(f"{len(outcome.damaged[0, Kind.IMAGE])} pieces are damaged there")

        here = self._arenas.image(image.rank, id, record.checks_crc)
        if here is not None and here.sealed_record() is not None:
            how = await self._repair(here, manifest, record.block_bytes, pull)
            return wire.MaterialiseReply(path=here.place.path, how=f"{how} from agent {image.agent}")
        async with self._filling(manifest, id) as slot:
            await pull(slot, [(0, record.image_bytes)])
            self._arenas.seal_copy(slot, manifest)
        return wire.MaterialiseReply(path=slot.place.path, how=f"fetched from agent {image.agent}")

    def _filling(self, manifest: Manifest, keep: SnapshotId) -> AbstractAsyncContextManager[Slot]:
        record, needed = manifest.record, manifest.checks.nbytes + len(manifest.layout)
        return self._arenas.filling(record.rank, keep, image_bytes=record.image_bytes, table_bytes=needed)

    # -- rebuilding --------------------------------------------------------------------------------------------------

    async def _rebuild(self, id: SnapshotId, request: wire.MaterialiseRequest, key: int) -> wire.MaterialiseReply:
        group = await self._group(id, request, key)
        manifest = group.table.manifests[group.lost]
        assert manifest is not None
        record = manifest.record
        here = self._arenas.image(request.rank, id, record.checks_crc)
        if here is not None and here.sealed_record() is not None:
            how = await self._repair(here, manifest, group.table.unit, partial(self._compute, group))
            return wire.MaterialiseReply(path=here.place.path, how=how)
        async with self._filling(manifest, id) as slot:
            reach("rebuild.begun")
            await self._compute(group, slot, [(0, record.image_bytes)])
            found = await asyncio.to_thread(slot.checksums, record.image_bytes, record.block_bytes)
            if not np.array_equal(found, manifest.checks):
                raise Corrupt(f"the rebuilt image of {id} of rank {record.rank} does not match its checksums")
            reach("rebuild.verified")
            self._arenas.seal_copy(slot, manifest)
        return wire.MaterialiseReply(path=slot.place.path, how=f"rebuilt from {len(group.sources)} pieces of its group")

    async def _repair(
        self, slot: Slot, manifest: Manifest, unit: int, compute: Callable[[Slot, Ranges], Awaitable[None]]
    ) -> str:
        """Have the damaged blocks of an image that is here put right, in place; in words, what was done.

        To be killed in between leaves it as damaged. *compute* does ranges that begin at multiples of *unit*.
        """
        record = manifest.record
        found = await asyncio.to_thread(slot.checksums, record.image_bytes, record.block_bytes)
        bad = [int(block) * record.block_bytes for block in np.flatnonzero(found != manifest.checks)]
        starts = sorted({at // unit * unit for at in bad})
        await compute(slot, [(at, min(at + unit, record.image_bytes)) for at in starts])
        found = await asyncio.to_thread(slot.checksums, record.image_bytes, record.block_bytes)
        if not np.array_equal(found, manifest.checks):
            raise Corrupt(f"the repaired image of {record.id} of rank {record.rank} does not match its checksums")
        how = f"{len(bad)} damaged blocks repaired"
        try:
            slot.read_tables(record)
        except Corrupt as error:
            slot.write_tables(manifest.checks, manifest.layout)
            how += f", and tables: {error}"
            self.repaired += 1
        self.repaired += len(bad)
        _log.warning("%s of rank %d: %s", record.id, record.rank, how)
        return how

    async def _compute(self, group: _Group, slot: Slot, ranges: Ranges) -> None:
        """Compute these ranges. Sources that cannot be read are left out; those that are damaged, where they are.

        Raises ``Unrecoverable`` when too few are left.
        """
        failed: set[Where] = set()
        todo = [_Range(start, end) for start, end in ranges]
        while todo:
            terms = [term for part in todo for term in group.terms(failed | part.without, part.start, part.end)]
            image = slot.image[: group.table.lengths[group.lost]]
            extents = [(part.start, part.end) for part in todo]
            try:
                outcome = await self._combine(image, group.table.unit, terms, group.sources, extents)
            except SourceFailed as error:
                _log.warning(
                    "rebuilding goes on without %s of member %d: %s", error.where[1].value, error.where[0], error
                )
                failed.add(error.where)
            else:
                todo = _lacking(todo, outcome, group.table.unit)

    async def _group(self, id: SnapshotId, request: wire.MaterialiseRequest, key: int) -> _Group:
        """Gather what of the group can be had. Raises ``SnapshotLost`` if not even one cell's table can."""
        mates = [p for p in request.parities if p.parity.key == key]
        cells: dict[int, tuple[wire.ParitySource, wire.Manifest]] = {}
        for mate in mates:
            ask = wire.ManifestRequest(id=wire_id(id), parity=_cell(mate.parity), agent=self._name)
            try:
                told = await self._peers.manifest(mate.address, ask)
            except HoldfastError as error:
                _log.warning("the parity of agent %s cannot be had: %s", mate.agent, error)
                continue
            cells[mate.parity.index] = (mate, told)
        table: CellTable | None = None
        sources: dict[Where, Source] = {}
        for index, (mate, told) in cells.items():
            try:
                parity, its = Manifest.of(told.record, told.checks, told.text), CellTable.from_text(told.text)
                if (its.key, its.me, its.ranks) != (key, index, list(mate.parity.ranks)):
                    raise Corrupt(f"it answers for member {its.me} of {its.ranks}")
                table = table or its
            except Corrupt as error:
                _log.warning("the parity of agent %s counts as lost: %s", mate.agent, error)
                continue
            sources[index, Kind.PARITY] = self._parity_at(mate, parity)
        if table is None:
            raise SnapshotLost(f"no table of the group of rank {request.rank} can be read")
        for index, manifest in enumerate(table.manifests):
            where = self._holder(request, manifest.record) if manifest is not None else None
            if manifest is not None and where is not None and manifest.record.rank != request.rank:
                sources[index, Kind.IMAGE] = self._image_at(where.address, manifest, "rebuild")
        return _Group(table, table.ranks.index(request.rank), sources)

    @staticmethod
    def _holder(request: wire.MaterialiseRequest, record: Record) -> wire.Source | None:
        """Who has that very image."""
        return next((i for i in request.images if i.rank == record.rank and i.checks_crc == record.checks_crc), None)

    # -- sources -----------------------------------------------------------------------------------------------------

    def _image_at(self, address: str, manifest: Manifest, purpose: str) -> Source:
        record = manifest.record
        request = wire.GrantRequest(
            id=wire_id(record.id), purpose=purpose, image=_image(record.rank, record.checks_crc)
        )
        return Source(
            record.image_bytes, record.block_bytes, manifest.checks, open=partial(self._open, address, request)
        )

    def _parity_at(self, mate: wire.ParitySource, manifest: Manifest) -> Source:
        record = manifest.record
        request = wire.GrantRequest(id=wire_id(record.id), purpose="rebuild", parity=_cell(mate.parity))
        return Source(
            record.image_bytes, record.block_bytes, manifest.checks, open=partial(self._open, mate.address, request)
        )


def _passing(error: Exception) -> HoldfastError | None:
    """The error, if what it tells of may be over at the next try."""
    cause = error.error if isinstance(error, SourceFailed) else error
    return cause if isinstance(cause, HoldfastError) and cause.remedy is Remedy.RETRY else None


def _lacking(todo: Sequence[_Range], outcome: Outcome, unit: int) -> list[_Range]:
    """What is still to be computed: where a piece was damaged. Of all sources, pieces begin alike.

    A damaged piece of several blocks does not tell which of them is: it is tried again block by block, and only what is found
    damaged then is left out, there.
    """
    found: dict[int, _Range] = {}
    for where, pieces in outcome.damaged.items():
        for piece in pieces:
            part = next(part for part in todo if part.start <= piece.target_offset < part.end)
            without = part.without if piece.nbytes > unit else part.without | {where}
            stop = piece.target_offset + piece.nbytes
            for at in range(piece.target_offset, stop, unit):
                same = found.get(at, _Range(at, at, part.without))
                found[at] = _Range(at, max(same.end, min(at + unit, stop)), same.without | without)
    return [found[at] for at in sorted(found)]


def _cell(parity: wire.Parity) -> wire.ParityCell:
    return wire.ParityCell(lane=parity.lane, key=parity.key, index=parity.index)


def _image(rank: int, checks_crc: int) -> wire.ImageSource:
    return wire.ImageSource(rank=rank, checks_crc=checks_crc)
