"""Any job's images, spilled rank by rank, are whole tensors to zarr and exact images to us, however they are cut."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import zarr
from holdfast.snapshot.layout import ITEM_BYTES, Slice
from holdfast.snapshot.partition import LARGEST_CHUNK, chunk_bytes, chunk_rows, gridded, share
from holdfast.storage.arrays import STORED_AS
from holdfast.storage.entries import Entry
from holdfast.storage.names import data_of, encode_name
from holdfast.storage.reader import ImageReader, list_snapshots, read_entry
from holdfast.storage.writer import write_image
from holdfast.tests.storage.memory import ID, Memory, as_restored, box, image_of, tensor_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

DTYPES = ["uint8", "bfloat16", "float32", "complex128", "float8_e5m2", "complex32"]


@dataclass(frozen=True)
class Job:
    """What each rank holds, as a survey finds it: boxes of grids on all ranks, replicas of them, and private slices."""

    held: list[list[Slice]]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Ranks in groups of replicas; each tensor on a grid of as many boxes as there are groups, some of them short or empty."""
    replicas, cuts = draw(st.integers(1, 3)), (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    ranks = replicas * math.prod(cuts)
    held: list[list[Slice]] = [[] for _ in range(ranks)]
    for number in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
        dtype, name = draw(st.sampled_from(DTYPES)), f"t{number}"
        private = draw(st.integers(0, 4)) == 0
        parts = (*cuts[: len(shape)], *(1,) * (len(shape) - 2))
        chunk = tuple(max(-(-n // p), 1) for n, p in zip(shape, parts, strict=True))
        small = 0 < math.prod(shape[1:]) * ITEM_BYTES[dtype] <= 8 and not private and shape
        width = draw(st.sampled_from([1, 40_000])) if small else 1  # some are cut by rows, too
        if width > 1:
            shape, chunk = (shape[0] * width, *shape[1:]), (chunk[0] * (width if shape[0] else 1), *chunk[1:])
        for place, (_, row, column) in enumerate(product(range(replicas), range(cuts[0]), range(cuts[1]))):
            cell = (row, column, 0)[: len(shape)]
            start = tuple(min(i * c, n) for i, c, n in zip(cell, chunk, shape, strict=True))
            extent = tuple(min(c, n - s) for s, c, n in zip(start, chunk, shape, strict=True))
            same = range(replicas)
            members = tuple(r * math.prod(cuts) + row * cuts[1] + column for r in same)
            if len(shape) < 2:  # what is not cut along a dimension of the mesh is replicated along it
                rows = range(cuts[0]) if not shape else [row]
                members = tuple(
                    sorted(r * math.prod(cuts) + i * cuts[1] + j for r in same for i in rows for j in range(cuts[1]))
                )
            piece = Slice(name, dtype, shape, start, extent, "cpu", members if len(members) > 1 else (), chunk)
            held[place].append(replace(piece, members=(), chunk=None) if private else piece)
    return Job(held)


async def there(job: Job) -> tuple[Memory, list[Entry]]:
    """Spill all ranks into one store, and read every image back."""
    store, entries = Memory(), []
    images = [image_of(held, rank, len(job.held)) for rank, held in enumerate(job.held)]
    for image in reversed(images):
        await write_image(store, image, still=lambda: True)
    (listed,) = await list_snapshots(store)
    assert listed.complete
    for image in images:
        entry = await read_entry(store, ID, image.rank, image.world)
        out = np.full(entry.image_bytes, 0x5A, np.uint8)
        await ImageReader(entry, [store]).read_image(out)
        np.testing.assert_array_equal(out, as_restored(image))
        entries.append(entry)
    return store, entries


@settings(derandomize=True, deadline=None, max_examples=80)
@given(jobs())
def test_a_job_is_whole_tensors_in_a_tier(job: Job) -> None:
    store, entries = asyncio.run(there(job))
    keys = [stored.chunk.key for entry in entries for stored in entry.chunks]
    assert len(set(keys)) == len(keys), "an object with two writers"
    data: dict[str, Buffer] = {k: cpu.Buffer.from_bytes(v) for k, v in store.below(data_of(ID)).items()}
    group = zarr.open_group(MemoryStore(data), mode="r")
    for rank, held in enumerate(job.held):
        for piece in held:
            path = encode_name(piece.name)
            if piece.chunk is None:
                path = f"ranks/{rank:06d}/tensors/{path}"
            whole = tensor_bytes(piece.name, piece.shape, ITEM_BYTES[piece.dtype], rank if piece.chunk is None else -1)
            array = group[path]
            assert isinstance(array, zarr.Array)
            expected = box(whole, piece) if piece.chunk is None else whole.reshape(-1)
            assert np.asarray(array[...], order="C").tobytes() == expected.tobytes()
            assert array.dtype == np.dtype(STORED_AS.get(piece.dtype, piece.dtype))
            assert json.loads(json.dumps(array.attrs["holdfast"]))["dtype"] == piece.dtype
    stored = {key for key in data if not key.endswith("zarr.json") and "/values/" not in key}
    assert stored == set(keys), "what is in the tier is what the entries say"


@settings(derandomize=True, deadline=None, max_examples=200)
@given(jobs())
def test_all_ranks_find_the_same_grids_and_shares_keep_to_them(job: Job) -> None:
    grids = [{p.name: p.chunk for p in gridded(held)} for held in job.held]
    assert all(grid == grids[0] for grid in grids)
    for rank, held in enumerate(job.held):
        mine = share(held, rank)
        assert all(piece.on_grid for piece in mine)
        assert all(piece.chunk == grids[0][piece.name] for piece in mine), "no part falls off its grid"


@settings(derandomize=True, deadline=None, max_examples=200)
@given(jobs(), st.integers(1, 40))
def test_shares_are_within_one_chunk_of_fair(job: Job, times: int) -> None:
    held = [[replace(p, name=f"{p.name}.{i}") for p in mine for i in range(times)] for mine in job.held]
    shares = [share(mine, rank) for rank, mine in enumerate(held)]
    for members in {p.members for mine in held for p in mine if p.members}:
        whole = [p for p in gridded(held[members[0]]) if p.members == members]
        total, largest = sum(p.nbytes for p in whole), max(min(chunk_bytes(p), p.nbytes) for p in whole)
        sizes = [sum(p.nbytes for p in shares[rank] if p.members == members) for rank in members]
        assert sum(sizes) == total
        assert all(abs(size * len(members) - total) <= (largest + 1) * len(members) for size in sizes)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.integers(1, 1 << 40), st.integers(1, 1 << 26), st.booleans())
def test_boxes_are_cut_into_pieces_that_fit(rows: int, most: int, spans: bool) -> None:
    found = chunk_rows(rows, most, spans=spans) if rows < 1 << 33 else rows
    assert 1 <= found <= rows
    if spans and rows < 1 << 33:
        assert found <= most
        assert -(-rows // found) <= -(-rows // most), "no more pieces than are needed"
    if not spans:
        assert rows % found == 0
        assert found <= most or found == rows


def test_a_chunk_is_no_larger_than_what_is_wanted() -> None:
    piece = Slice("w", "float32", (1 << 20, 1 << 10), (0, 0), (1 << 20, 1 << 10), chunk=(1 << 20, 1 << 10))
    assert chunk_bytes(gridded([piece])[0]) == LARGEST_CHUNK
