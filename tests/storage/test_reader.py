"""Reading back: listings, entries, damage and its way around, parts of slices; and the same with nothing but zarr."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from holdfast.errors import BudgetExceeded, Corrupt, SnapshotUnknown, TierUnreachable
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.chunks import Chunk
from holdfast.storage.documents import seal, unseal
from holdfast.storage.entries import Entry, Stored
from holdfast.storage.files import FileStore
from holdfast.storage.names import data_of, entry_key, tombstone_key, whole_key
from holdfast.storage.reader import Damage, ImageReader, list_snapshots, read_entries, read_entry
from holdfast.storage.store import Found
from holdfast.storage.writer import Image, write_image
from holdfast.tests.storage.broken import Broken
from holdfast.tests.storage.memory import ID, Bytes, Memory, as_restored, box, image_of, tensor_bytes
from holdfast.tests.storage.outsider import look

HELD = [
    Slice("w", "float32", (9, 5), (0, 0), (9, 5), chunk=(4, 5)),
    Slice("cols", "int16", (8, 7), (0, 4), (8, 3), chunk=(2, 4)),
    Slice("flat", "bfloat16", (10,), (4,), (6,), chunk=(4,)),
    Slice("s", "float64", (), (), (), chunk=()),
    Slice("own", "int64", (6, 2), (2, 0), (3, 2)),
]
IMAGE = image_of(HELD, 0, 1)


def spilled(url: str = "memory://a") -> tuple[Memory, Entry]:
    store = Memory(url)
    return store, asyncio.run(write_image(store, IMAGE, still=lambda: True))


def read(entry: Entry, *stores: Memory) -> tuple[Bytes, list[Damage]]:
    out = np.full(entry.image_bytes, 0x5A, np.uint8)
    reader = ImageReader(entry, stores)
    asyncio.run(reader.read_image(out))
    return out, reader.damaged


# -- listings ------------------------------------------------------------------------------------------------------------


def test_a_snapshot_exists_once_every_rank_has_its_entry() -> None:
    store = Memory()
    for rank in (2, 0):
        asyncio.run(write_image(store, image_of(HELD, rank, 3), still=lambda: True))
        (listed,) = asyncio.run(list_snapshots(store))
        assert not listed.complete
    asyncio.run(write_image(store, image_of(HELD, 1, 3), still=lambda: True))
    (listed,) = asyncio.run(list_snapshots(store))
    assert (listed.id, listed.world, listed.ranks, listed.complete) == (ID, 3, frozenset(range(3)), True)
    entries = asyncio.run(read_entries(store, listed))
    assert [(rank, entry.rank) for rank, entry in entries.items()] == [(0, 0), (1, 1), (2, 2)]
    store.objects[tombstone_key(ID)] = b""
    (listed,) = asyncio.run(list_snapshots(store))
    assert listed.deleted
    assert not listed.complete


def test_worlds_are_never_mixed_and_foreign_objects_are_not_looked_at() -> None:
    store = Memory()
    names = [entry_key(ID, 0, 2), entry_key(ID, 1, 3), f"entries/{'x' * 40}/000000-of-000001.json", "entries/readme",
             entry_key(ID, 0, 2) + ".bak", "deleted/readme"]  # fmt: skip
    store.objects.update(dict.fromkeys(names, b""))
    found = asyncio.run(list_snapshots(store))
    assert [(listed.world, listed.ranks, listed.complete) for listed in found] == [
        (2, frozenset({0}), False), (3, frozenset({1}), False)
    ]  # fmt: skip


def test_the_newest_complete_ones_are_found_without_listing_all() -> None:
    """And however many newer ones are not complete, or deleted."""
    store = Memory()

    def put(step: int, ranks: int, *more: str) -> None:
        id = SnapshotId(1, step, "a" * 32)
        keys = [*(entry_key(id, rank, 2) for rank in range(ranks)), *more]
        store.objects.update(dict.fromkeys(keys, b""))

    for step in range(100):
        put(step, 2)
    for step in range(100, 150):
        put(step, 1)
    put(105, 1, whole_key(SnapshotId(1, 105, "a" * 32)))
    put(151, 2, tombstone_key(SnapshotId(1, 151, "a" * 32)))
    put(152, 1, "entries/readme/x")
    watched = Broken(store)
    found = asyncio.run(list_snapshots(watched, complete=2, others=3))
    assert [(one.id.step, one.complete, one.whole) for one in found] == [
        (98, True, False), (99, True, False), (105, False, True),
        (148, False, False), (149, False, False), (152, False, False),
    ]  # fmt: skip
    assert sum(operation == "list" for operation, _ in watched.calls) < 70
    assert ("list", "entries/") not in watched.calls
    assert [one.id.step for one in asyncio.run(list_snapshots(store, complete=500, others=0))] == [*range(100), 105]
    assert asyncio.run(list_snapshots(Memory(), complete=1)) == []


def test_what_is_deleted_while_it_is_listed_is_made_up_for() -> None:
    store = Memory()

    class Deletes(Broken):
        async def list(self, prefix: str) -> list[Found]:
            if "0000000000000029" in prefix:
                store.objects[tombstone_key(SnapshotId(1, 29, "a" * 32))] = b""
            return await super().list(prefix)

    for step in range(30):
        store.objects[entry_key(SnapshotId(1, step, "a" * 32), 0, 1)] = b""
    for count in (1, 8, 29):
        store.objects.pop(tombstone_key(SnapshotId(1, 29, "a" * 32)), None)
        found = asyncio.run(list_snapshots(Deletes(store), complete=count))
        assert [one.id.step for one in found] == [*range(29 - count, 29)]


# -- entries -------------------------------------------------------------------------------------------------------------


def test_an_entry_that_is_not_there_or_not_its_own() -> None:
    store, entry = spilled()
    with pytest.raises(SnapshotUnknown, match="no image of rank 1 of 2"):
        asyncio.run(read_entry(store, ID, 1, 2))
    store.objects[entry_key(ID, 1, 2)] = entry.to_bytes()
    with pytest.raises(Corrupt, match="entry of rank 0 of 1"):
        asyncio.run(read_entry(store, ID, 1, 2))


def test_any_damaged_byte_of_an_entry_is_noticed() -> None:
    """Or changes nothing: outside of the document, JSON leaves some freedom to spaces."""
    _, entry = spilled()
    data = entry.to_bytes()
    for at in range(0, len(data), 3):
        for flipped in (data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], data[:at]):
            try:
                assert Entry.from_bytes(flipped, "an entry") == entry
            except Corrupt as error:
                assert "an entry" in str(error)  # noqa: PT017 - either will do


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"rank": 1}, {"rank": -1}, {"world": 0}, {"job": 3}, {"run": "x" * 32}, {"run": ["0"] * 32},
        {"step": -1}, {"generation": "1"}, {"watermark": -2}, {"image_bytes": 5}, {"layout": "{}"}, {"layout": None},
        {"values": None}, {"values": {"key": "../x", "nbytes": 6, "crc": 0}},
        {"values": {"key": "x", "nbytes": 7, "crc": 0}}, {"values": {"key": "x", "nbytes": 6, "crc": 1 << 32}},
        {"chunks": []}, {"chunks": None}, {"chunks": [[]]},
    ],
    ids=str,
)  # fmt: skip
def test_a_sealed_document_that_is_no_entry(change: dict[str, Any]) -> None:
    """A right checksum proves only that nothing was damaged since it was made."""
    document = unseal(spilled()[1].to_bytes(), "")
    assert Entry.from_bytes(seal(document), "")
    with pytest.raises(Corrupt):
        Entry.from_bytes(seal({**document, **change}), "an entry")
    for missing in change:
        with pytest.raises(Corrupt):
            Entry.from_bytes(seal({k: v for k, v in document.items() if k != missing}), "an entry")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 1), (0, 99), (0, -1), (1, "/etc/passwd"), (1, "../../x"), (1, "a//b"), (1, 3), (2, 1), (2, -4), (3, 0), (3, 5),
        (3, 1 << 70), (4, [4]), (4, [4, 4]), (4, [2, 5]), (4, [10, 5]), (4, [4, 1 << 40]), (4, [4, 0]), (4, 4), (5, -1),
        (5, "0"),
    ],
)  # fmt: skip
def test_an_entry_whose_chunks_lie(field: int, value: Any) -> None:
    """Elsewhere than in the snapshot's folder, outside of their slice, larger than their tensor, twice or not at all."""
    document = unseal(spilled()[1].to_bytes(), "")
    document["chunks"][0][field] = value
    with pytest.raises(Corrupt):
        Entry.from_bytes(seal(document), "an entry")


def test_what_an_entry_says_of_sizes_is_not_taken_on_trust() -> None:
    """Layouts and shapes that agree with each other, and with nothing that could be there."""
    piece = Slice("t", "uint8", (1 << 60,), (0,), (1,))
    layout = Layout.of(1, [piece])
    good = spilled()[1]
    for exponent in (59, 47, 45):
        chunk = Chunk(0, "t/c.0", 0, 1, (1 << exponent,))
        entry = replace(good, layout=layout, chunks=(Stored(chunk, 0),), values=replace(good.values, nbytes=0),
                        image_bytes=layout.values_offset)  # fmt: skip
        data = entry.to_bytes()
        if exponent > 46:
            with pytest.raises(Corrupt, match="does not fit its slice"):
                Entry.from_bytes(data, "an entry")
        else:
            reader = ImageReader(Entry.from_bytes(data, "an entry"), [Memory()])
            with pytest.raises((BudgetExceeded, Corrupt)):
                asyncio.run(reader.read_image(np.empty(layout.values_offset, np.uint8)))
    values = replace(good.values, nbytes=1 << 50)
    vast = replace(good, values=values, image_bytes=good.layout.values_offset + (1 << 50))
    with pytest.raises(Corrupt, match="an image of"):
        Entry.from_bytes(vast.to_bytes(), "an entry")


# -- images --------------------------------------------------------------------------------------------------------------


class Counted(tuple[Stored, ...]):
    """Knows how often somebody went through it."""

    times = 0

    def __iter__(self) -> Iterator[Stored]:
        Counted.times += 1
        return super().__iter__()


def test_reading_slice_by_slice_looks_at_each_chunk_once() -> None:
    store, entry = spilled()
    reader = ImageReader(replace(entry, chunks=Counted(entry.chunks)), [store])
    Counted.times = 0

    async def scene() -> None:
        for index, placed in enumerate(entry.layout.placed):
            await reader.read_slice(index, np.empty(placed.slice.nbytes, np.uint8))

    asyncio.run(scene())
    assert Counted.times == 1


def test_gaps_come_back_as_zeros() -> None:
    store, entry = spilled()
    out, damaged = read(entry, store)
    np.testing.assert_array_equal(out, as_restored(IMAGE))
    assert (IMAGE.bytes != out).any(), "there are gaps"
    assert damaged == []
    with pytest.raises(ValueError, match="does not go into"):
        asyncio.run(ImageReader(entry, [store]).read_image(out[1:]))


def test_every_part_of_every_slice() -> None:
    store, entry = spilled()
    reader = ImageReader(entry, [store])

    async def all_parts() -> None:
        for index, placed in enumerate(entry.layout.placed):
            whole = IMAGE.bytes[placed.offset : placed.end].reshape(placed.slice.rows, -1)
            for first in range(placed.slice.rows + 1):
                for last in range(first, placed.slice.rows + 1):
                    out = np.full((last - first) * whole.shape[1], 0x5A, np.uint8)
                    await reader.read_slice(index, out, first, last - first)
                    np.testing.assert_array_equal(out, whole[first:last].reshape(-1))
            out = np.empty(whole[1:].size, np.uint8)
            await reader.read_slice(index, out, min(1, placed.slice.rows))
            np.testing.assert_array_equal(out, whole[1:].reshape(-1))

    asyncio.run(all_parts())
    assert asyncio.run(reader.read_values()) == b"values"
    for first, rows in ((-1, 2), (8, 2), (0, 10), (10, None)):
        with pytest.raises(ValueError, match="do not go into"):
            asyncio.run(reader.read_slice(0, np.empty(40, np.uint8), first, rows))


def every_damage(data: bytes) -> dict[str, bytes | None]:
    """Ways in which an object may be wrong; None: missing. One flip in the payload, one in its checksum."""
    wrong = bytes([data[0] ^ 0x80])
    foreign = tensor_bytes("foreign", (len(data),), 1).tobytes()
    return {
        "flipped": wrong + data[1:], "checksum": data[:-1] + bytes([data[-1] ^ 1]), "short": data[:-1], "empty": b"",
        "long": data + b"\0", "foreign": foreign, "missing": None, "zeros": bytes(len(data)),
    }  # fmt: skip


def test_whatever_is_damaged_is_noticed_named_and_taken_from_the_next_tier() -> None:
    far, entry = spilled("memory://far")
    for key in [s.chunk.key for s in entry.chunks] + [entry.values.key]:
        for what, data in every_damage(far.objects[data_of(ID) + key]).items():
            near, _ = spilled("memory://near")
            if data is None:
                del near.objects[data_of(ID) + key]
            else:
                near.objects[data_of(ID) + key] = data
            out, damaged = read(entry, near, far)
            np.testing.assert_array_equal(out, as_restored(IMAGE), what)
            assert [(d.url, d.key) for d in damaged] == [("memory://near", data_of(ID) + key)]
            (found,) = asyncio.run(ImageReader(entry, [near, far]).verify())
            assert (found.url, found.key) == ("memory://near", data_of(ID) + key)
            with pytest.raises(Corrupt, match="no tier has an undamaged copy"):
                read(entry, near)


def test_a_chunk_of_another_snapshot_does_not_pass() -> None:
    """Its own checksum is right; the entry's is not."""
    store, entry = spilled()
    first, second = (data_of(ID) + s.chunk.key for s in entry.chunks[:2])
    store.objects[first] = store.objects[second]
    with pytest.raises(Corrupt, match="its entry says"):
        read(entry, store)


def test_a_tier_that_does_not_answer_is_asked_last_and_is_not_damaged() -> None:
    class Away(Memory):
        asked = 0

        async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
            self.asked += 1
            raise TierUnreachable(f"{self.url} does not answer")

    far, entry = spilled()
    away = Away("memory://away")
    reader = ImageReader(entry, [away, far])

    async def one_by_one() -> None:
        for index, placed in enumerate(entry.layout.placed):
            await reader.read_slice(
                index, np.empty(placed.slice.nbytes, np.uint8), 0, 1 if placed.slice.rows == 0 else None
            )

    asyncio.run(one_by_one())
    assert away.asked <= 3, "not once for each chunk"
    assert reader.damaged == []
    with pytest.raises(TierUnreachable):
        read(entry, away)
    far.objects.clear()
    with pytest.raises(TierUnreachable):
        read(entry, far, away)


# -- nothing but zarr ----------------------------------------------------------------------------------------------------

ML: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip


async def there_and_back(tier: Path, images: Sequence[Image]) -> tuple[list[Entry], list[Bytes]]:
    """Write *images* to a folder, all at the same time; the entries, and what is read back."""
    store = FileStore(tier)
    entries = list(await asyncio.gather(*(write_image(store, image, still=lambda: True) for image in images)))
    out = [np.full(entry.image_bytes, 0x5A, np.uint8) for entry in entries]
    for entry, into in zip(entries, out, strict=True):
        await ImageReader(await read_entry(store, entry.id, entry.rank, entry.world), [store]).read_image(into)
    await store.close()
    return entries, out


def test_every_dtype_and_shape_opens_with_plain_zarr(tmp_path: Path) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((), ()), ((7,), (3,)), ((5, 3), (2, 3)), ((0, 4), (1, 4)), ((4, 0), (4, 1)), ((3, 2, 2), (1, 2, 2))
    ]  # fmt: skip
    held = [
        Slice(f"{dtype}.{len(shape)}{'e' * (0 in shape)}{i}", dtype, shape, (0,) * len(shape), shape, chunk=chunk)
        for dtype in sorted(ITEM_BYTES)
        for i, (shape, chunk) in enumerate(shapes)
    ]
    image = image_of([*held, Slice("own", "float32", (8, 3), (2, 0), (4, 3))], 0, 1)
    for placed in image.layout.placed:
        if placed.slice.dtype == "bool":
            image.bytes[placed.offset : placed.end] &= 1
    _, (out,) = asyncio.run(there_and_back(tmp_path / "tier", [image]))
    np.testing.assert_array_equal(out, as_restored(image))
    found = look(tmp_path / "tier", ID, tmp_path)
    assert {"job": "a job", "run": ID.run, "step": ID.step, "world": 1}.items() <= found.facts[""].items()
    for placed in image.layout.placed:
        piece = placed.slice
        path = "ranks/000000/tensors/own" if piece.name == "own" else piece.name
        array = found.arrays[path]
        assert array.shape == piece.extent
        assert found.bits(path) == image.bytes[placed.offset : placed.end].tobytes(), piece.name
        assert found.facts[path]["dtype"] == piece.dtype
        if piece.dtype not in ("complex32", "bfloat16") and not piece.dtype.startswith("float8"):
            assert array.dtype == np.dtype(piece.dtype)
        if piece.dtype in ML:
            np.testing.assert_array_equal(
                array.view(ML[piece.dtype]).reshape(-1).view(np.uint8), image.bytes[placed.offset : placed.end]
            )
    assert found.facts["ranks/000000/tensors/own"]["start"] == [2, 0]
    assert found.bits("ranks/000000/values") == b"values"
    assert len(found.arrays) == len(image.layout.placed) + 1


def test_what_many_ranks_write_is_one_array(tmp_path: Path) -> None:
    """Uneven rows over four ranks, a grid of two dimensions, replicas that share, and what each keeps by itself."""
    world, everyone = 4, (0, 1, 2, 3)
    held: list[list[Slice]] = [[] for _ in everyone]
    for rank in everyone:
        rows = [(0, 3), (3, 3), (6, 3), (9, 1)][rank]
        held[rank] = [
            Slice("fsdp", "float32", (10, 3), (rows[0], 0), (rows[1], 3), chunk=(3, 3)),
            Slice("few", "int16", (2,), (min(rank, 2),), (1 if rank < 2 else 0,), chunk=(1,)),
            Slice("both", "bfloat16", (5, 7), (3 * (rank // 2), 4 * (rank % 2)), (3 - rank // 2, 4 - rank % 2), chunk=(3, 4)),
            Slice("ddp", "float64", (40_000, 3), (0, 0), (40_000, 3), "cpu", everyone, (40_000, 3)),
            Slice("hsdp", "int32", (60_000,), (30_000 * (rank % 2),), (30_000,), "cpu", (rank % 2, rank % 2 + 2), (30_000,)),
            Slice("step", "int64", (), (), (), "cpu", everyone, ()),
            Slice("own", "int32", (3,), (0,), (3,)),
        ]  # fmt: skip
    images = [image_of(held[rank], rank, world) for rank in everyone]
    written, read_back = asyncio.run(there_and_back(tmp_path / "tier", images))
    keys = [s.chunk.key for entry in written for s in entry.chunks]
    assert len(set(keys)) == len(keys), "no object has two writers"
    assert all(any("ddp" in s.chunk.key for s in entry.chunks) for entry in written), "each copies a share"
    found = look(tmp_path / "tier", ID, tmp_path)
    for piece in held[0][:-1]:
        whole = tensor_bytes(piece.name, piece.shape, ITEM_BYTES[piece.dtype])
        assert found.bits(piece.name) == whole.tobytes(), piece.name
        assert found.arrays[piece.name].shape == piece.shape
    for rank in everyone:
        own = box(tensor_bytes("own", (3,), 4, rank), held[rank][-1])
        assert found.bits(f"ranks/{rank:06d}/tensors/own") == own.tobytes()
    for image, out in zip(images, read_back, strict=True):
        np.testing.assert_array_equal(out, as_restored(image))


def test_zarr_itself_notices_a_flipped_bit(tmp_path: Path) -> None:
    (entry,), _ = asyncio.run(there_and_back(tmp_path / "tier", [IMAGE]))
    file = tmp_path / "tier" / data_of(ID) / entry.chunks[0].chunk.key
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    import zarr

    with pytest.raises(ValueError, match=r"(?i)checksum"):
        zarr.open_group(tmp_path / "tier" / data_of(ID), mode="r")["w"][...]  # type: ignore[index]
    assert json.loads((file.parent / "zarr.json").read_text())["node_type"] == "array"
