"""One agent and its tiers, in this process: what it spills, what it finds there, what it refuses."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from holdfast.agent import spiller as spiller_module
from holdfast.agent import tiers as tiers_module
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.arenas import Arenas
from holdfast.agent.client import id_of, told, wire_id
from holdfast.agent.protocol import Flight
from holdfast.agent.settings import NodeSettings
from holdfast.agent.spiller import Spiller
from holdfast.errors import (
    AgentError,
    AgentUnreachable,
    BudgetExceeded,
    Corrupt,
    HoldfastError,
    SnapshotLost,
    SnapshotSkipped,
    SnapshotUnknown,
    TierFull,
)
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import SnapshotId, new_nonce, table_bytes_for
from holdfast.storage.documents import seal
from holdfast.storage.files import FileStore
from holdfast.storage.names import entry_key, tombstone_key, whole_key
from holdfast.storage.store import Buffer, Found
from holdfast.storage.tiers import Tier, TierSettings
from holdfast.tests.agent.members import JOB, Group, noise, plenty, refusal, run, snapshot
from holdfast.tests.storage.broken import Broken, Fault

NBYTES = 1 << 20
LAYOUT = Layout.of(1, [Slice("x", "uint8", (NBYTES,), (0,), (NBYTES,))])


class Agent:
    """What one agent has of memory and tiers. A trainer's part is played by the test."""

    def __init__(self, *urls: Path, job: str = JOB, **options: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="holdfast-test-", dir="/dev/shm"))
        self.arenas = Arenas(NodeSettings(job, self.folder, self.folder / "agent.sock", True), "a", None, plenty)
        self.spiller = Spiller("a", job, self.arenas)
        self.tiers = self.spiller.tiers
        self.told: asyncio.Queue[wire.Spilled] = asyncio.Queue()
        self.use(*urls, **options)

    async def __aenter__(self) -> Agent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.spiller.close()
        self.arenas.close()
        shutil.rmtree(self.folder)

    def use(self, *urls: Path, **options: Any) -> None:
        self.tiers.use([TierSettings.parse(Tier(str(url), **options)).to_json() for url in urls])

    def sealed(self, id: SnapshotId, rank: int = 0, world: int = 1) -> Slot:
        """An image of *id* in a slot."""
        text, nbytes = LAYOUT.to_text(), LAYOUT.values_offset
        self.arenas.reserve(rank, 2, image_bytes=nbytes, table_bytes=table_bytes_for(nbytes, len(text)))
        slot = self.arenas.slot(rank, id.step % 2)
        slot.unseal_to_fill()
        slot.image[:] = 0
        slot.image[:NBYTES] = np.frombuffer(noise(NBYTES, (id, rank)), np.uint8)
        flight = Flight(new_nonce(random.Random(f"{rank} {id}")), id, -1, 1)
        sums = self.arenas.checksum(rank, id.step % 2, nbytes)
        self.arenas.write_record(id.step % 2, flight, sums, rank=rank, world=world, layout=text)
        slot.commit(flight.nonce)
        return slot

    async def spill(self, id: SnapshotId, rank: int = 0, world: int = 1, tiers: int = 1) -> HoldfastError | None:
        """Spill that image; the error of the first tier, if there is one."""

        async def tell(message: wire.FromAgent) -> None:
            if not message.spilled.trying:
                self.told.put_nowait(message.spilled)

        self.spiller.spill(rank, world, id, tiers, tell)
        answers = [await self.told.get() for _ in range(tiers)]
        return told(answers[0].error) if answers[0].error else None

    async def spilled(self, id: SnapshotId, rank: int = 0, world: int = 1, tiers: int = 1) -> None:
        """An image in a slot, and in the tiers."""
        self.sealed(id, rank, world)
        assert await self.spill(id, rank, world, tiers) is None

    async def listed(self) -> list[tuple[SnapshotId, int]]:
        found = await self.tiers.stored()
        assert not found.errors
        return [(id_of(image.id), image.tier) for image in found.images]

    def put(self, store: Any, index: int = 0) -> None:
        """*store* in place of that of a tier."""
        self.tiers.all[index]._store = store


async def put(folder: Path, key: str, data: bytes = b"") -> None:
    store = FileStore(folder)
    await store.put(key, [data])
    await store.close()


def test_what_comes_while_a_tier_is_tidied_has_it_tidied_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass may have listed the tier before a spill ended; nothing else would begin another."""

    async def work() -> None:
        async with Agent(tmp_path, keep=1) as agent:
            await agent.spilled(snapshot(1))
            tier = agent.tiers.all[0]
            assert tier.tidying is not None
            await tier.tidying
            begun, held = asyncio.Event(), asyncio.Event()
            prune = agent.spiller._prune

            async def late(which: Any) -> None:
                await prune(which)
                begun.set()
                await held.wait()

            monkeypatch.setattr(agent.spiller, "_prune", late)
            await agent.spilled(snapshot(2))
            await begun.wait()
            passes = tier.tidying
            await agent.spilled(snapshot(3))
            held.set()
            await passes
            assert tier.tidying is passes
            assert [id for id, _ in await agent.listed()] == [snapshot(3)]

    run(work)


# -- whose snapshots, and which ------------------------------------------------------------------------------------------


def test_what_another_job_left_is_not_looked_at_unless_that_is_said(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path, job="one") as one:
            await one.spilled(snapshot(1))
        async with Agent(tmp_path, job="other") as other:
            await other.spilled(snapshot(2, run="b" * 32))
            assert await other.listed() == [(snapshot(2, run="b" * 32), 0)]
            error = await refusal(other.tiers.load(snapshot(1), 0, 1, [0]))
            assert isinstance(error, SnapshotUnknown)
            assert "is of job 'one'" in str(error)
            other.use(tmp_path, any_job=True)
            assert [id for id, _ in await other.listed()] == [snapshot(1), snapshot(2, run="b" * 32)]
            await other.tiers.load(snapshot(1), 0, 1, [0])

    run(work)


def test_snapshots_of_other_jobs_hide_none(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as ours, Agent(tmp_path, job="other") as theirs:
            await ours.spilled(snapshot(1))
            await theirs.spilled(snapshot(2, 2, run="b" * 32))
            for step in range(3, 73):
                await put(tmp_path, entry_key(snapshot(step, 2, run="b" * 32), 0, 1), seal({"job": "other"}))
            assert await ours.listed() == [(snapshot(1), 0)]

    run(work)


def test_newer_incomplete_ones_do_not_hide_the_newest_complete_one(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as agent:
            await agent.spilled(snapshot(1))
            for step in range(2, 72):
                await put(tmp_path, entry_key(snapshot(step), 0, 2))
            found = await agent.listed()
            assert found[0] == (snapshot(1), 0)
            assert found[-1] == (snapshot(71), 0)

    run(work)


# -- reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["away", "buried"])
@pytest.mark.parametrize("where", [0, 1])
def test_one_tier_that_has_the_image_is_enough(tmp_path: Path, trouble: str, where: int) -> None:
    async def work() -> None:
        async with Agent(tmp_path / "near", tmp_path / "far") as agent:
            await agent.spilled(snapshot(1), tiers=2)
            if trouble == "away":
                faults = [Fault(name, "fail", times=999) for name in ("put", "get", "list", "read_into")]
                agent.put(Broken(await agent.tiers.all[where].opened(), *faults), where)
            else:
                await put(tmp_path / ("near", "far")[where], tombstone_key(snapshot(1)))
            reply = await agent.tiers.load(snapshot(1), 0, 1, [0, 1])
            image = Path(reply.path)
            assert image.exists()
            slot = agent.arenas.image(0, snapshot(1))
            assert slot is not None
            assert slot.image[:NBYTES].tobytes() == noise(NBYTES, (snapshot(1), 0))

    run(work)


def test_an_agent_that_was_told_of_no_tier_yet_asks_to_be_asked_again() -> None:
    async def work() -> None:
        async with Agent() as agent:
            assert isinstance(await refusal(agent.tiers.load(snapshot(1), 0, 1, [0])), AgentUnreachable)

    run(work)


def test_a_rank_that_trains_keeps_its_slots(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as agent:
            for step in (1, 2, 3):
                await agent.spilled(snapshot(step))
            await agent.tiers.load(snapshot(1), 0, 1, [0], apart=True)
            assert all(agent.arenas.image(0, snapshot(step)) is not None for step in (1, 2, 3))

    run(work)


def test_two_who_fill_slots_of_a_rank_get_two() -> None:
    async def work() -> None:
        async with Agent() as agent:
            filling = partial(agent.arenas.filling, 5, image_bytes=4096, table_bytes=4096)
            async with (
                filling(snapshot(1)) as one,
                filling(snapshot(1)) as other,
            ):
                assert one.place.index != other.place.index
            async with filling(snapshot(2)) as again:
                assert again.place.index == one.place.index

    run(work)


def test_two_agents_never_wait_for_each_others_images() -> None:
    """Each holds what it materialises itself while it asks the other to bring the same."""

    async def work() -> None:
        async with Group("a", "b") as group:
            waiting = asyncio.Barrier(2)

            async def load(
                id: SnapshotId, rank: int, world: int, tiers: Sequence[int], *, apart: bool = False
            ) -> wire.MaterialiseReply:
                raise SnapshotUnknown("it is damaged here")

            for member in group.members.values():
                other = group.members["b" if member.name == "a" else "a"]
                member.protector._load = load

                async def bring(address: str, request: Any, other: Any = other) -> wire.MaterialiseReply:
                    await waiting.wait()
                    request.job = JOB
                    return await other.protector.bring(request, apart=False)  # type: ignore[no-any-return]

                member.protector._peers.bring = bring  # type: ignore[method-assign]
            requests = [
                wire.MaterialiseRequest(
                    id=wire_id(snapshot(1)), rank=0, world=1,
                    tiers=[wire.TierSource(tier=0, agent=other, address=group.members[other].address)],
                )
                for other in ("b", "a")
            ]  # fmt: skip
            asked = [
                refusal(group.members[name].protector.materialise(request))
                for name, request in zip("ab", requests, strict=True)
            ]
            errors = await asyncio.wait_for(asyncio.gather(*asked), 20)
            assert [type(error) for error in errors] == [SnapshotLost, SnapshotLost]

    run(work)


# -- writing -------------------------------------------------------------------------------------------------------------


def test_whatever_goes_wrong_the_trainer_hears_of_it_and_may_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as agent:
            agent.sealed(snapshot(1))
            with monkeypatch.context() as patch:
                patch.setattr(Spiller, "_from_slot", lambda *_: 1 // 0)
                assert isinstance(await agent.spill(snapshot(1)), AgentError)
            assert await agent.spill(snapshot(1)) is None

    run(work)


def test_what_was_deleted_is_not_said_to_be_written(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as agent:
            await agent.spilled(snapshot(1))
            await put(tmp_path, tombstone_key(snapshot(1)))
            agent.spiller._jobs.clear()  # as after a restart of the agent
            assert isinstance(await agent.spill(snapshot(1)), SnapshotSkipped)
            assert not (tmp_path / entry_key(snapshot(1), 0, 1)).exists()

    run(work)


def test_that_it_is_whole_is_not_said_of_what_was_deleted(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as agent:
            await agent.spilled(snapshot(1), world=2)
            await put(tmp_path, tombstone_key(snapshot(1)))
            agent.spiller.persisted(snapshot(1))
            assert agent.spiller._marking is not None
            await agent.spiller._marking
            assert not (tmp_path / whole_key(snapshot(1))).exists()
            await agent.spilled(snapshot(2), world=2)
            agent.spiller.persisted(snapshot(2))
            await agent.spiller._marking
            assert (tmp_path / whole_key(snapshot(2))).exists()

    run(work)


class Flipping(FileStore):
    """Before the first object is put, a bit of the slot flips."""

    slot: Slot | None = None

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        slot, self.slot = self.slot, None
        if slot is not None:
            slot.image[12345] ^= 1
        await super().put(key, parts, durable=durable)


def test_a_bit_that_flips_while_the_image_is_written_is_noticed(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path) as agent:
            store = Flipping(tmp_path)
            store.slot = agent.sealed(snapshot(1))
            agent.put(store)
            assert isinstance(await agent.spill(snapshot(1)), Corrupt)
            assert await agent.listed() == []

    run(work)


# -- room ----------------------------------------------------------------------------------------------------------------


def test_the_limit_is_kept_also_where_nothing_may_be_deleted(tmp_path: Path) -> None:
    """On a disk of its own, before anything is known to be persisted on all."""

    async def work() -> None:
        async with Agent(tmp_path, limit="6MiB") as agent:
            await agent.spilled(snapshot(1), world=2)
            await agent.spilled(snapshot(2), world=2)
            await agent.spilled(snapshot(3), world=2)
            await agent.spilled(snapshot(4), world=2)
            agent.sealed(snapshot(5), world=2)
            error = await agent.spill(snapshot(5), world=2)
            assert isinstance(error, TierFull)
            assert "of 6291456 bytes" in str(error)

    run(work)


def test_images_that_are_written_side_by_side_are_counted_together(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path, limit="3MiB") as agent:
            agent.sealed(snapshot(1), 1, 4)
            agent.sealed(snapshot(2), 2, 4)
            errors = await asyncio.gather(agent.spill(snapshot(1), 1, 4), agent.spill(snapshot(2), 2, 4))
            assert [type(error) for error in errors if error is not None] == [TierFull]

    run(work)


class Deaf(FileStore):
    """Does not say how full it is until it is told to."""

    answer: asyncio.Event | None = None

    async def free_bytes(self) -> int | None:
        assert self.answer is not None
        await self.answer.wait()
        return 0


def test_a_trainer_does_not_wait_for_a_tier_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers_module, "_MEASURE_S", 0.05)

    async def work() -> None:
        async with Agent(tmp_path) as agent:
            store = Deaf(tmp_path)
            store.answer = asyncio.Event()
            agent.put(store)
            await agent.tiers.check_budget(1 << 30, 1 << 30)
            store.answer.set()
            await asyncio.sleep(0)
            monkeypatch.setattr(tiers_module, "_MEASURE_S", 60.0)
            assert isinstance(await refusal(agent.tiers.check_budget(1 << 30, 1 << 30)), BudgetExceeded)

    run(work)


# -- stores --------------------------------------------------------------------------------------------------------------


class Counted(FileStore):
    """Says whether it is closed."""

    closed = False

    async def close(self) -> None:
        self.closed = True
        await super().close()

    async def list(self, prefix: str) -> list[Found]:
        assert not self.closed
        return await super().list(prefix)


def test_tiers_that_the_job_no_longer_has_are_closed_once_nobody_uses_them(tmp_path: Path) -> None:
    async def work() -> None:
        async with Agent(tmp_path / "a", tmp_path / "b") as agent:
            stores = [Counted(tmp_path / "a"), Counted(tmp_path / "b")]
            for index, store in enumerate(stores):
                agent.put(store, index)
            first, second = agent.tiers.all
            with first.held():
                agent.use(tmp_path / "b", tmp_path / "c")
                assert agent.tiers.all[0] is second
                assert not stores[0].closed
            await asyncio.gather(*filter(None, [first.closing]))
            assert [store.closed for store in stores] == [True, False]

    run(work)


def test_trouble_of_a_former_tier_is_said_of_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spiller_module, "_PAUSE_S", (0.01, 0.01))

    async def work() -> None:
        async with Agent(tmp_path / "a", tmp_path / "b") as agent:
            heard: asyncio.Queue[wire.Spilled] = asyncio.Queue()
            agent.sealed(snapshot(1))
            agent.put(Broken(FileStore(tmp_path / "b"), Fault("put", "fail", times=1)), 1)

            async def tell(message: wire.FromAgent) -> None:
                heard.put_nowait(message.spilled)
                if message.spilled.tier == 0:
                    agent.use(tmp_path / "c")

            agent.spiller.spill(0, 1, snapshot(1), 2, tell)
            said = [await heard.get() for _ in range(3)]
            assert [(one.tier, one.trying, bool(one.error)) for one in said] == [
                (0, False, False), (1, True, True), (1, False, False),
            ]  # fmt: skip

    run(work)


def test_the_library_behind_a_store_is_loaded_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def opened(url: str) -> FileStore:
        threads.append(threading.get_ident())
        return FileStore(tmp_path)

    monkeypatch.setattr(tiers_module, "_open", opened)

    async def work() -> None:
        async with Agent(tmp_path) as agent:
            assert await agent.tiers.all[0].opened() is await agent.tiers.all[0].opened()

    run(work)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
