"""Writing images: what lies in the tier afterwards, in which order it came, and what an interrupted spill leaves."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt, HoldfastError, SnapshotSkipped, SnapshotUnknown, TierFull, TierUnreachable
from holdfast.snapshot.layout import Layout, Slice
from holdfast.storage.disk import Disk
from holdfast.storage.entries import Entry
from holdfast.storage.files import FileStore
from holdfast.storage.names import data_of, entry_key, tombstone_key
from holdfast.storage.reader import ImageReader, list_snapshots, read_entry
from holdfast.storage.store import Buffer
from holdfast.storage.writer import Image, copy_rank, mend, write_image
from holdfast.tests.storage.memory import ID, Memory, as_restored, image_of

HELD = [
    Slice("model.w", "float32", (9, 5), (0, 0), (9, 5), chunk=(4, 5)),
    Slice("model.b", "bfloat16", (), (), (), chunk=()),
    Slice("model.cols", "int16", (4, 7), (0, 4), (4, 3), chunk=(2, 4)),
    Slice("own", "int64", (6,), (2,), (3,)),
    Slice("none", "float64", (0, 3), (0, 0), (0, 3)),
]
ENTRY = entry_key(ID, 0, 1)


def spill(store: Memory, image: Image, still: Callable[[], bool] = lambda: True) -> Entry:
    return asyncio.run(write_image(store, image, still=still))


def read_back(entry: Entry, *stores: Memory) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    out = np.full(entry.image_bytes, 0x5A, np.uint8)
    asyncio.run(ImageReader(entry, stores).read_image(out))
    return out


def test_an_image_comes_back_as_it_was() -> None:
    store, image = Memory(), image_of(HELD, 0, 1)
    entry = spill(store, image)
    assert not store.unsettled
    assert asyncio.run(read_entry(store, ID, 0, 1)) == entry
    assert Entry.from_bytes(store.objects[ENTRY], "entry") == entry
    np.testing.assert_array_equal(read_back(entry, store), as_restored(image))
    assert entry.stored_bytes == sum(len(d) for k, d in store.objects.items() if "/c" in k)


def test_every_chunk_ends_with_its_checksum() -> None:
    store = Memory()
    entry = spill(store, image_of(HELD, 0, 1))
    for key, crc in [(s.chunk.key, s.crc) for s in entry.chunks] + [(entry.values.key, entry.values.crc)]:
        data = store.objects[data_of(ID) + key]
        assert struct.unpack("<I", data[-4:]) == (crc,) == (crc32c(data[:-4]),)


def test_the_entry_comes_last_after_all_is_durable() -> None:
    class Watched(Memory):
        async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
            if key == ENTRY:
                assert durable
                assert not self.unsettled, "something may still be lost"
            await super().put(key, parts, durable=durable)

    store = Watched()
    spill(store, image_of(HELD, 0, 1))
    assert store.puts[-1] == ENTRY
    assert store.puts.count(ENTRY) == 1
    assert len(set(store.puts)) == len(store.puts), "nothing is written twice"


@pytest.mark.parametrize("moment", ["start", "chunk", "settled"])
def test_an_image_that_was_overwritten_does_not_count(moment: str) -> None:
    store, answers = Memory(), {"start": 0, "chunk": 3, "settled": 7}[moment]
    asked = iter(range(1000))
    with pytest.raises(SnapshotSkipped, match="overwritten"):
        spill(store, image_of(HELD, 0, 1), lambda: next(asked) < answers)
    assert ENTRY not in store.objects
    assert asyncio.run(list_snapshots(store)) == []


def test_a_snapshot_that_was_deleted_meanwhile_does_not_come_back() -> None:
    store = Memory()
    store.objects[tombstone_key(ID)] = b"whatever"
    with pytest.raises(SnapshotSkipped, match="deleted"):
        spill(store, image_of(HELD, 0, 1))
    assert ENTRY not in store.objects


def test_a_store_that_fails_leaves_no_entry_and_nothing_running() -> None:
    """At every operation in turn; a later attempt then succeeds over what was left."""
    image, count = image_of(HELD, 0, 1), 0

    class Failing(Memory):
        left = 0
        running = 0

        async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
            self.left -= 1
            fails = self.left == 0
            self.running += 1
            await asyncio.sleep(0)
            self.running -= 1
            if fails:
                raise TierFull(f"no room for {key}")
            await super().put(key, parts, durable=durable)

    spill(counting := Failing(), image)
    for count in range(1, len(counting.puts) + 1):
        store = Failing()
        store.left = count
        with pytest.raises(TierFull):
            spill(store, image)
        assert store.running == 0
        assert not store.unsettled
        assert ENTRY not in store.objects
        np.testing.assert_array_equal(read_back(spill(store, image), store), as_restored(image))
    assert count > 10


def test_a_spill_that_failed_does_not_stand_in_the_way_of_the_next(tmp_path: Path) -> None:
    """Settling fails for a file that could not be synced until that is put again: whoever put it gives it up instead."""

    class Failing(Disk):
        fails = True

        def sync(self, fd: int) -> None:
            if self.fails:
                raise OSError(errno.EIO, "by the test")
            super().sync(fd)

    async def spilled() -> None:
        store, image = FileStore(tmp_path / "tier", disk=(disk := Failing())), image_of(HELD, 0, 1)
        with pytest.raises(TierUnreachable):
            await write_image(store, image, still=lambda: True)
        assert [path for path in (tmp_path / "tier").rglob("*") if path.is_file()] == []
        disk.fails = False
        later = replace(image, id=replace(ID, step=ID.step + 1))
        await write_image(store, later, still=lambda: True)
        assert [listed.id for listed in await list_snapshots(store) if listed.complete] == [later.id]
        await store.close()

    asyncio.run(spilled())


def test_who_gives_up_takes_nothing_from_other_ranks_of_its_node(tmp_path: Path) -> None:
    """Both describe an empty tensor; they share the agent's store."""
    held = [Slice("empty", "float32", (0, 4), (0, 0), (0, 4), chunk=(1, 4)), *HELD]
    one, other = (image_of(held, rank, 2, values=b"v" * 77) for rank in (0, 1))

    async def scene() -> None:
        store, waiting, go_on = FileStore(tmp_path), asyncio.Event(), asyncio.Event()

        async def pace(nbytes: int) -> None:
            if nbytes == 77 + 4:
                waiting.set()
                await go_on.wait()

        later = asyncio.create_task(write_image(store, other, still=lambda: True, pace=pace))
        await waiting.wait()
        with pytest.raises(SnapshotSkipped):
            await write_image(store, one, still=lambda: False)
        go_on.set()
        await later
        assert await store.get(f"{data_of(other.id)}empty/zarr.json")
        await store.close()

    asyncio.run(scene())


def test_an_image_without_values_and_one_without_tensors() -> None:
    store = Memory()
    bare = image_of(HELD, 0, 1, values=b"")
    entry = spill(store, bare)
    assert data_of(ID) + entry.values.key not in store.objects
    np.testing.assert_array_equal(read_back(entry, store), as_restored(bare))
    alone = image_of([], 0, 1, values=b"v" * 1000)
    np.testing.assert_array_equal(read_back(spill(store, alone), store), alone.bytes)


def test_progress_and_pace_count_what_is_written() -> None:
    store, image = Memory(), image_of(HELD, 0, 1)
    done: list[int] = []
    paced: list[int] = []

    async def pace(nbytes: int) -> None:
        paced.append(nbytes)

    entry = asyncio.run(write_image(store, image, still=lambda: True, pace=pace, progress=done.append))
    assert sum(done) == entry.stored_bytes - 4 * (len(entry.chunks) + 1)
    assert sum(paced) == sum(map(len, store.objects.values())) - len(store.objects[ENTRY])


def test_a_rank_is_copied_from_tier_to_tier() -> None:
    near, far, image = Memory("memory://near"), Memory("memory://far"), image_of(HELD, 0, 1)
    entry = spill(near, image)
    assert asyncio.run(copy_rank(near, far, ID, 0, 1)) == entry
    assert far.objects == near.objects
    assert far.puts[-1] == ENTRY


def test_a_damaged_chunk_is_not_copied_but_replaced() -> None:
    near, far, image = Memory("memory://near"), Memory("memory://far"), image_of(HELD, 0, 1)
    entry = spill(near, image)
    key = data_of(ID) + entry.chunks[1].chunk.key
    good = near.objects[key]
    near.objects[key] = bytes([good[0] ^ 1]) + good[1:]
    with pytest.raises(Corrupt):
        asyncio.run(copy_rank(near, far, ID, 0, 1))
    assert ENTRY not in far.objects
    other = Memory("memory://other", objects={key: good})
    asyncio.run(copy_rank(near, far, ID, 0, 1, also=[other]))
    assert far.objects[key] == good
    with pytest.raises(SnapshotUnknown):
        asyncio.run(copy_rank(near, far, ID, 1, 2))


def test_mending_writes_what_was_damaged_and_nothing_else() -> None:
    whole, hurt, image = Memory("memory://whole"), Memory("memory://hurt"), image_of(HELD, 0, 1)
    entry = spill(whole, image)
    spill(hurt, image)
    first, values = data_of(ID) + entry.chunks[0].chunk.key, data_of(ID) + entry.values.key
    hurt.objects[first] = b"short"
    del hurt.objects[values]
    damaged = asyncio.run(ImageReader(entry, [hurt]).verify())
    assert {d.key for d in damaged} == {first, values}
    hurt.puts.clear()
    assert asyncio.run(mend(hurt, entry, [whole], [d.key for d in damaged] + ["elsewhere"])) == sorted([first, values])
    assert sorted(hurt.puts) == sorted([first, values])
    assert hurt.objects == whole.objects
    hurt.objects[first] = b""
    with pytest.raises(HoldfastError):
        asyncio.run(mend(hurt, entry, [hurt], [first]))


def test_a_layout_with_names_that_mean_something() -> None:
    held = [
        replace(Slice(name, "uint8", (3,), (0,), (3,)), chunk=chunk)
        for name in ("zarr.json", "c", "ranks", "..", "a/b", "ü\ud800", "x" * 500)
        for chunk in ((2,),)
    ]
    image = image_of([*held, Slice("c", "int8", (), (), ())], 0, 1)
    store = Memory()
    np.testing.assert_array_equal(read_back(spill(store, image), store), as_restored(image))


def test_more_in_flight_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.storage.writer.IN_FLIGHT_BYTES", 100)
    monkeypatch.setattr("holdfast.storage.reader.IN_FLIGHT_BYTES", 100)
    store, image = (
        Memory(),
        image_of([replace(piece, name=f"{piece.name}{i}") for i in range(5) for piece in HELD], 0, 1),
    )
    np.testing.assert_array_equal(read_back(spill(store, image), store), as_restored(image))


def test_a_cancelled_spill_leaves_nothing_running() -> None:
    class Slow(Memory):
        begun = ended = forgotten = 0

        async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
            self.begun += 1
            try:
                await asyncio.sleep(0 if "/c" not in key else 3600)
            finally:
                self.ended += 1

        async def forget(self, keys: Sequence[str]) -> None:
            self.forgotten = len(keys)

    async def cancelled(store: Slow) -> None:
        task = asyncio.create_task(write_image(store, image_of(HELD, 0, 1), still=lambda: True))
        while store.begun - store.ended < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert store.begun == store.ended
        assert store.forgotten > 0, "others that settle need not answer for it"

    asyncio.run(cancelled(Slow()))


def test_layouts_travel_in_entries_whatever_their_names() -> None:
    image = image_of([Slice('ü"\ud800\n', "uint8", (1,), (0,), (1,))], 0, 1)
    entry = spill(Memory(), image)
    assert Layout.from_text(entry.layout.to_text()) == image.layout == Entry.from_bytes(entry.to_bytes(), "e").layout
