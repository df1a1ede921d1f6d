"""Readers and deleters: whoever comes second gives way."""

from __future__ import annotations

import asyncio
import logging
import uuid

import pytest
from holdfast.errors import SnapshotUnknown
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.documents import seal, unseal
from holdfast.storage.leases import LEASE_S, any_fresh, buried, leased, reading
from holdfast.storage.names import readers_of, tombstone_key
from holdfast.storage.store import Found, Store, open_store
from holdfast.tests.storage.broken import Broken, Fault

ID = SnapshotId(3, 700, "0123456789abcdef" * 2)
OTHER = SnapshotId(3, 701, "0123456789abcdef" * 2)


def new_store() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}")


async def leases(store: Store) -> list[Found]:
    return await store.list(readers_of(ID))


def test_a_lease_is_there_as_long_as_somebody_reads() -> None:
    async def play() -> None:
        store = new_store()
        async with reading(store, ID), reading(store, ID):
            both = await leases(store)
            assert len(both) == 2
            assert unseal(await store.get(both[0].key), "lease")["format"] == 1
            assert await leased(store, ID, both[0].modified_s + LEASE_S - 1)
            assert not await leased(store, ID, both[1].modified_s + LEASE_S + 1)
            assert not await leased(store, OTHER, both[0].modified_s)
        assert await leases(store) == []
        with pytest.raises(ZeroDivisionError):
            async with reading(store, ID):
                raise ZeroDivisionError
        assert await leases(store) == []

    asyncio.run(play())


def test_a_cancelled_reader_takes_its_lease_back() -> None:
    async def play() -> None:
        store, inside = new_store(), asyncio.Event()

        async def read() -> None:
            async with reading(store, ID):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.ensure_future(read())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await leases(store) == []

    asyncio.run(play())


def test_what_is_buried_is_not_read() -> None:
    async def play() -> None:
        store = new_store()
        await store.put(tombstone_key(ID), [seal({})])
        assert await buried(store, ID)
        assert not await buried(store, OTHER)
        with pytest.raises(SnapshotUnknown):
            async with reading(store, ID):
                raise AssertionError
        assert await leases(store) == []

    asyncio.run(play())


@pytest.mark.parametrize("order", range(20))
def test_of_a_reader_and_a_deleter_one_sees_the_other(order: int) -> None:
    """Both come at once, in every order in which their steps may fall."""

    async def play() -> None:
        store, read, deleted = new_store(), False, False

        async def reader() -> None:
            nonlocal read
            for _ in range(order % 5):
                await store.free_bytes()
                await asyncio.sleep(0)
            try:
                async with reading(store, ID):
                    read = True
                    await asyncio.wait({deleting})
            except SnapshotUnknown:
                pass

        async def deleter() -> None:
            nonlocal deleted
            for _ in range(order // 5):
                await asyncio.sleep(0)
            await store.put(tombstone_key(ID), [seal({})])
            (tombstone,) = await store.list("deleted/")
            deleted = not await leased(store, ID, tombstone.modified_s)

        deleting = asyncio.ensure_future(deleter())
        await asyncio.gather(reader(), deleting)
        assert not (read and deleted)

    asyncio.run(play())


def test_a_store_that_cannot_be_written_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        store = Broken(new_store(), Fault("put", "fail", times=99))
        with caplog.at_level(logging.WARNING):
            async with reading(store, ID):
                assert await leases(store) == []
        assert "without a lease" in caplog.text
        assert ("delete" not in dict(store.calls)) or store.calls[-1][0] != "delete"

    asyncio.run(play())


def test_leases_are_renewed_through_trouble() -> None:
    async def play() -> None:
        store = Broken(new_store(), Fault("put", "fail", after=1, times=2))
        async with reading(store, ID, renew_s=0.0):
            async with asyncio.timeout(30):
                while sum(call == "put" for call, _ in store.calls) < 6:
                    await asyncio.sleep(0)
            assert len(await leases(store)) == 1
        assert await leases(store) == []

    asyncio.run(play())


def test_which_are_fresh() -> None:
    def at(modified_s: float) -> list[Found]:
        return [Found("readers/x", 1, modified_s)]

    assert any_fresh(at(1000.0), 1000.0 + LEASE_S - 0.1)
    assert not any_fresh(at(1000.0), 1000.0 + LEASE_S)
    assert any_fresh(at(1000.0), 10.0)  # the store's clock went back: rather keep it than delete it
    assert not any_fresh([], 0.0)
