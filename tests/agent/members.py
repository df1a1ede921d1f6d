"""Agents of one group in one process: real memory, real bulk streams, and calls between them that cannot fail unless told to.

Their trainers are played by the test, which puts images into slots as it likes.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.arenas import Arenas
from holdfast.agent.budget import Memory
from holdfast.agent.bulk import BulkServer
from holdfast.agent.client import id_of, wire_id
from holdfast.agent.inventory import parity_source
from holdfast.agent.origins import Origin
from holdfast.agent.peers import Peers
from holdfast.agent.protector import Protector
from holdfast.agent.protocol import Flight
from holdfast.agent.settings import NodeSettings
from holdfast.errors import AgentUnreachable, HoldfastError, SnapshotUnknown
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.beat import NONE
from holdfast.snapshot.record import SnapshotId, new_nonce, table_bytes_for
from holdfast.snapshot.recovery import HeldParity

JOB = "members"
WAIT_S = 120.0
RUN = uuid.UUID(int=1).hex
LAYOUT_BYTES = 300
Reply = TypeVar("Reply")


def snapshot(step: int, generation: int = 1, run: str = RUN) -> SnapshotId:
    return SnapshotId(generation, step, run)


class Wires(Peers):
    """One member's calls to the others: as bytes, to their ``Protector``. Those that are *down* do not answer."""

    def __init__(self, group: Group, name: str) -> None:
        super().__init__(JOB, name, None)
        self._group = group

    async def _ask(self, address: str, method: str, request: Any, reply: type[Any], timeout_s: float = WAIT_S) -> Any:
        member = self._group.by_address(address)
        self._group.asked.append((self._agent, member.name, method))
        if self._agent in self._group.down or member.name in self._group.down:
            raise AgentUnreachable(f"{method} of {member.name}: it is down")
        await asyncio.sleep(0)
        answers: dict[str, Callable[[Any], Any]] = {
            "Offer": member.protector.offer,
            "Offers": member.protector.offers,
            "Grant": member.protector.grant,
            "GetManifest": member.protector.manifest,
        }
        answer = answers[method](type(request).FromString(request.SerializeToString()))
        return reply.FromString(answer.SerializeToString())


@dataclass(slots=True)
class Member:
    """One agent: its memory, its part in the group, and what it told its trainers."""

    name: str
    address: str
    arenas: Arenas
    bulk: BulkServer
    folder: Path
    told: list[wire.FromAgent] = field(default_factory=list)
    protector: Protector = field(init=False)

    def record(
        self, rank: int, id: SnapshotId, image: bytes, *, index: int = 0, watermark: int = NONE, sealed: bool = True
    ) -> Slot:
        """Have *image* in a slot of *rank*, recorded, and by its trainer's verdict whole."""
        sizes = {"image_bytes": len(image), "table_bytes": table_bytes_for(len(image), LAYOUT_BYTES)}
        self.arenas.reserve(rank, 2, **sizes)
        slot = self.arenas.slot(rank, index)
        slot.unseal_to_fill()
        slot.image[: len(image)] = np.frombuffer(image, np.uint8)
        flight = Flight(new_nonce(random.Random(f"{rank} {id}")), id, watermark, 1)
        sums = self.arenas.checksum(rank, index, len(image))
        self.arenas.write_record(index, flight, sums, rank=rank, world=64, layout=b"layout of %d" % rank)
        if sealed:
            slot.commit(flight.nonce)
        return slot

    def guarded(self) -> list[SnapshotId]:
        return [id_of(m.guarded.id) for m in self.told if m.WhichOneof("kind") == "guarded"]

    def unguarded(self) -> list[tuple[SnapshotId, str]]:
        told = [m.unguarded for m in self.told if m.WhichOneof("kind") == "unguarded"]
        return [(id_of(m.id), m.reason) for m in told]

    def image(self, rank: int, id: SnapshotId) -> bytes | None:
        """The bytes of an image that is held here and sealed."""
        slot = self.arenas.image(rank, id)
        record = slot.sealed_record() if slot is not None else None
        return slot.image[: record.image_bytes].tobytes() if slot is not None and record is not None else None

    def cells(self, id: SnapshotId) -> list[tuple[int, int, bytes]]:
        """(lane, place in the group, bytes) of all parity of *id* that is held here."""
        found = []
        for (lane, _), its, table in self.arenas.tables():
            held = self.arenas.cell(lane, its, table.key, table.me) if its == id else None
            if held is not None:
                found.append((lane, table.me, held[0].image[: held[1].image_bytes].tobytes()))
        return found


async def no_tiers(
    id: SnapshotId, rank: int, world: int, tiers: Sequence[int], *, apart: bool = False
) -> wire.MaterialiseReply:
    """What there is to load for an agent that was told of no tier."""
    raise SnapshotUnknown(f"no tier has {id} of rank {rank} of {world}: none of {list(tiers)} is known here")


async def no_tiers_to_read(id: SnapshotId, rank: int, world: int, tiers: Sequence[int]) -> Origin:
    """Likewise, of reading in parts."""
    raise SnapshotUnknown(f"no tier has {id} of rank {rank} of {world}: none of {list(tiers)} is known here")


class Group:
    """Members by name. An asynchronous context manager: leaves no thread and no file.

    Attributes:
        down: who neither asks nor answers.
        asked: every call between members: who, whom, what.
    """

    def __init__(self, *names: str, limit_bytes: int | None = None) -> None:
        self.members: dict[str, Member] = {}
        self.down: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        self._limit_bytes = limit_bytes
        self._names = names
        self._clocks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Group:
        for name in self._names:
            self.add(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self.members):
            await self.lose(name)

    def add(self, name: str) -> Member:
        """Another agent, which holds nothing."""
        folder = Path(tempfile.mkdtemp(prefix="holdfast-test-", dir="/dev/shm"))
        arenas = Arenas(NodeSettings(JOB, folder, folder / "agent.sock", True), name, self._limit_bytes, plenty)
        address = f"127.0.0.1:{len(self.members) + 1}"
        member = Member(name, address, arenas, BulkServer("127.0.0.1", 0, None), folder)
        wires, told = Wires(self, name), member.told.append
        member.protector = Protector(name, JOB, arenas, member.bulk, wires, None, told, no_tiers, no_tiers_to_read)
        self.members[name] = member
        self._clocks[name] = asyncio.create_task(member.protector.keep_time())
        return member

    async def lose(self, name: str) -> None:
        """It burns, with its memory."""
        member = self.members.pop(name)
        self._clocks.pop(name).cancel()
        await member.protector.close()
        await asyncio.to_thread(member.bulk.close)
        member.arenas.close()
        shutil.rmtree(member.folder)

    def by_address(self, address: str) -> Member:
        found = next((member for member in self.members.values() if member.address == address), None)
        if found is None:
            raise AgentUnreachable(f"nobody at {address}")
        return found

    # -- the trainers' part ------------------------------------------------------------------------------------------

    def roster(
        self, ranks: Mapping[str, Sequence[int]], protect: str, *, floor: SnapshotId | None = None, run: str = RUN,
        timeout_s: float = WAIT_S, image_bytes: int = 1 << 20,
    ) -> wire.Roster:  # fmt: skip
        peers = [
            wire.Peer(
                agent=name, address=self.members[name].address, domains=[wire.Domain(level="host", name=name)],
                ranks=its, slots=2, image_bytes=image_bytes, table_bytes=table_bytes_for(image_bytes, LAYOUT_BYTES),
            )
            for name, its in ranks.items()
        ]  # fmt: skip
        return wire.Roster(
            run=run, protect=protect, timeout_s=timeout_s, peers=peers, floor=wire_id(floor) if floor else None
        )

    async def assemble(self, ranks: Mapping[str, Sequence[int]], protect: str, **options: Any) -> None:
        """Every member hears of all."""
        roster = self.roster(ranks, protect, **options)
        await asyncio.gather(*(self.members[name].protector.assemble(roster) for name in ranks))

    async def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Return once *condition* holds."""
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while not condition():
            assert asyncio.get_running_loop().time() < deadline_s, f"waited {WAIT_S:g} s for {what}"
            await asyncio.sleep(0.001)

    async def all_guard(self, id: SnapshotId) -> None:
        await self.until(f"{id} guarded", lambda: all(id in member.guarded() for member in self.members.values()))

    def request(self, rank: int, id: SnapshotId, *, without: Collection[str] = ()) -> wire.MaterialiseRequest:
        """What a trainer asks its agent, which is to have that image; nobody tells of what members *without* hold."""
        there = [member for member in self.members.values() if member.name not in without]
        images = [(held, m) for m in there for held in m.arenas.inventory() if held.id == id]
        parities = [
            parity_source(
                HeldParity(id, table.key, table.me, tuple(table.ranks), table.tolerance, m.name, lane), m.address
            )
            for m in there
            for (lane, _), its, table in m.arenas.tables()
            if its == id
        ]
        return wire.MaterialiseRequest(
            id=wire_id(id), rank=rank, world=64, parities=parities,
            images=[
                wire.Source(rank=held.rank, agent=m.name, address=m.address, checks_crc=held.checks_crc)
                for held, m in images
            ],
        )  # fmt: skip


def plenty(folder: Path) -> Memory:
    return Memory(str(folder), 1 << 40, 1 << 40, None)


def noise(nbytes: int, seed: object = 0) -> bytes:
    return random.Random(str(seed)).randbytes(nbytes)


def run(work: Callable[[], Awaitable[Reply]]) -> Reply:
    """Run *work* to its end on a loop of its own."""

    async def limited() -> Reply:
        return await asyncio.wait_for(work(), 2 * WAIT_S)

    return asyncio.run(limited())


async def refusal(work: Awaitable[Any]) -> HoldfastError:
    """The error that *work* ends with."""
    try:
        await work
    except HoldfastError as error:
        return error
    raise AssertionError("it was not refused")
