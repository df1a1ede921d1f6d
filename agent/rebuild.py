"""Having an image in a slot of this node: as it is here, fetched from another agent, computed from its group, or read from a
tier; always verified.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar

import numpy as np

from ..crashpoints import reach
from ..errors import BudgetExceeded, Corrupt, HoldfastError, Remedy, SnapshotLost
from ..snapshot.arena import Slot
from ..snapshot.record import SnapshotId
from . import wire_pb2 as wire
from .arenas import Arenas
from .client import id_of
from .origins import Blockwise, Origins, passing
from .peers import Peers
from .ranges import Span

_log = logging.getLogger(__name__)
_PAUSES_S: Final = (0.2, 1.0, 3.0)  # before trying again what did not work for a passing reason

Result = TypeVar("Result")
Way = Callable[[], Awaitable[wire.MaterialiseReply]]


class Load(Protocol):
    """``Tiers.load``."""

    async def __call__(
        self, id: SnapshotId, rank: int, world: int, tiers: Sequence[int], *, apart: bool = False
    ) -> wire.MaterialiseReply:
        """Have that image in a slot, read from a tier."""
        ...


class Troubles:
    """Why an image cannot be had, source by source."""

    def __init__(self, request: wire.MaterialiseRequest) -> None:
        self._what = f"the image of {id_of(request.id)} of rank {request.rank}"
        self._reasons: list[str] = []
        self._passing: HoldfastError | None = None  # what may be otherwise next time, or with more memory

    def note(self, source: str, error: Exception) -> None:
        """That source could not serve."""
        self._reasons.append(f"{source}: {error}")
        if isinstance(error, BudgetExceeded):
            self._passing = error
        self._passing = passing(error) or self._passing

    def error(self) -> HoldfastError:
        """What to raise: what may pass, if anything may; else it is lost."""
        if self._passing is not None:
            return self._passing
        return SnapshotLost(f"{self._what} cannot be had: {'; '.join(self._reasons) or 'no source'}")


async def persistently(what: str, attempt: Callable[[], Awaitable[Result]]) -> Result:
    """The result of *attempt*, which is tried again while it fails for reasons that may pass."""
    for pause_s in _PAUSES_S:
        try:
            return await attempt()
        except HoldfastError as error:
            if error.remedy is not Remedy.RETRY:
                raise
            _log.warning("%s: %s; trying again", what, error)
            await asyncio.sleep(pause_s)
    return await attempt()


def by_agent(request: wire.MaterialiseRequest, name: str) -> Iterator[tuple[str, list[wire.TierSource]]]:
    """The tiers that each agent can read the image from: agent *name* first, then those that have it in the nearest."""
    nearest = sorted(request.tiers, key=lambda tier: (tier.agent != name, tier.tier))
    for agent in dict.fromkeys(tier.agent for tier in nearest):
        yield agent, [tier for tier in request.tiers if tier.agent == agent]


async def brought(peers: Peers, request: wire.MaterialiseRequest, tiers: list[wire.TierSource]) -> wire.Source:
    """Have the agent of these tiers read the image into its memory; where it can be fetched from then."""
    first = tiers[0]
    ask = wire.MaterialiseRequest(id=request.id, rank=request.rank, world=request.world, tiers=tiers)
    there = await peers.bring(first.address, ask)
    return wire.Source(rank=request.rank, agent=first.agent, address=first.address, checks_crc=there.checks_crc)


class Rebuilder:
    """Serves one request for an image.

    Attributes:
        repaired: damaged blocks of an image that was here, and tables, put right in their place.
    """

    def __init__(self, name: str, arenas: Arenas, peers: Peers, origins: Origins, load: Load) -> None:
        self._name = name
        self._arenas = arenas
        self._peers = peers
        self._origins = origins
        self._load = load
        self.repaired = 0

    async def run(self, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
        """See ``Protector.materialise``.

        Raises:
            SnapshotLost: it cannot be had, however often one tries.
            AgentUnreachable, DeadlinePassed, BudgetExceeded, …: what stood in the way may be over at the next try.
        """
        return await persistently(f"bringing the image of rank {request.rank}", partial(self._try, request))

    async def _try(self, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
        here = self._origins.here(request)
        if here is not None:
            return wire.MaterialiseReply(path=here.place.path, how="held here")
        troubles = Troubles(request)
        for what, attempt in self._ways(request):
            try:
                return await attempt()
            except BudgetExceeded:
                raise
            except (HoldfastError, ValueError) as error:  # ``Unrecoverable``; or a table that makes no sense
                troubles.note(what, error)
        raise troubles.error()

    def _ways(self, request: wire.MaterialiseRequest) -> Iterator[tuple[str, Way]]:
        """All ways to have the image here, the nearest first, each with its name."""
        for what, opened in self._origins.ways(request):
            yield what, partial(self._have, opened)
        for agent, tiers in by_agent(request, self._name):
            yield f"reading what agent {agent} finds in its tiers", partial(self._from_tiers, request, agent, tiers)

    async def _from_tiers(
        self, request: wire.MaterialiseRequest, agent: str, tiers: list[wire.TierSource]
    ) -> wire.MaterialiseReply:
        """Read the image here; or, from a tier of another node, have its agent read it, and fetch it from there."""
        if agent == self._name:
            return await self._load(id_of(request.id), request.rank, request.world, [tier.tier for tier in tiers])
        source = await brought(self._peers, request, tiers)
        reply = await self._have(partial(self._origins.copy_at, request, source))
        reply.how = f"read from its tiers by agent {agent}, and fetched from there"
        return reply

    async def _have(self, opened: Callable[[], Awaitable[Blockwise]]) -> wire.MaterialiseReply:
        """The image in a slot here: a free one, or the one that holds it already, with damage."""
        origin = await opened()
        manifest, record = origin.manifest, origin.manifest.record
        here = self._arenas.image(record.rank, record.id, record.checks_crc)
        if here is not None and here.sealed_record() is not None:
            return wire.MaterialiseReply(path=here.place.path, how=await self._repair(here, origin))
        needed = manifest.checks.nbytes + len(manifest.layout)
        filling = self._arenas.filling(record.rank, record.id, image_bytes=record.image_bytes, table_bytes=needed)
        async with filling as slot:
            reach("rebuild.begun")
            await origin.fill(slot.image[: record.image_bytes], [Span(0, record.image_bytes, 0)])
            reach("rebuild.verified")
            self._arenas.seal_copy(slot, manifest)
        return wire.MaterialiseReply(path=slot.place.path, how=origin.how)

    async def _repair(self, slot: Slot, origin: Blockwise) -> str:
        """Have the damaged blocks of an image that is here put right, in place; in words, what was done.

        To be killed in between leaves it as damaged.
        """
        manifest, record = origin.manifest, origin.manifest.record
        found = await asyncio.to_thread(slot.checksums, record.image_bytes, record.block_bytes)
        bad = np.flatnonzero(found != manifest.checks) * record.block_bytes
        starts = np.unique(origin.grain.floor(bad))
        ends = origin.grain.ceil(starts + 1)
        spans = [Span(start, end, start) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        await origin.fill(slot.image[: record.image_bytes], spans)
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
        how += f", {origin.how}"
        _log.warning("%s of rank %d: %s", record.id, record.rank, how)
        return how
