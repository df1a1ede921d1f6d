"""Real distributed jobs, spilled rank by rank, and opened by a process that knows zarr and nothing of us."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.entries import Entry
from holdfast.storage.files import FileStore
from holdfast.storage.reader import ImageReader
from holdfast.storage.writer import Image, write_image
from holdfast.tests.hooks import worlds
from holdfast.tests.hooks.nodes import Node
from holdfast.tests.hooks.worlds import run_world
from holdfast.tests.storage.outsider import Outsider, look

WEIGHTS = {"up.weight", "up.bias", "down.weight", "down.bias", "odd.weight", "last.weight", "last.bias", "norm.weight",
           "norm.bias"}  # fmt: skip
BUFFERS = {"model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"}
STEPS = {f"optim.{name}.step" for name in WEIGHTS}


def arrays_of(names: set[str]) -> set[str]:
    """Of parameters: they, and their two moments."""
    return {f"model.{n}" for n in names} | {f"optim.{n}.{key}" for n in names for key in ("exp_avg", "exp_avg_sq")}


# What all ranks cut on one grid: all of it, but for what is not known to be alike, and tensors on part of the ranks. Of the
# last job, "up" and "down" are cut over all four ranks; the rest is on two of them, twice.
SHARED = {
    "ddp": arrays_of(WEIGHTS) | STEPS,
    "fsdp2": arrays_of(WEIGHTS),
    "hsdp": arrays_of(WEIGHTS),
    "tp": arrays_of({"up.weight", "up.bias", "down.weight", "down.bias"}),
    "fsdp2-tp": arrays_of({"up.weight", "up.bias", "down.weight", "down.bias"}),
}


async def spilled(tier: Path, kind: str, ranks: list[dict[str, Any]]) -> list[Entry]:
    """Spill every rank's image; all at the same time, as nodes do. And read it back."""
    store = FileStore(tier)
    id = SnapshotId(1, 1, f"{len(ranks):032x}")

    async def spill(rank: int) -> Entry:
        layout = Layout.from_text(ranks[rank][kind]["layout"])
        raw = np.frombuffer(ranks[rank][kind]["image"], np.uint8)
        entry = await write_image(store, Image(id, rank, len(ranks), 0, kind, layout, raw), still=lambda: True)
        out = np.empty(entry.image_bytes, np.uint8)
        await ImageReader(entry, [store]).read_image(out)
        for placed in layout.placed:
            assert (out[placed.offset : placed.end] == raw[placed.offset : placed.end]).all()
        return entry

    entries = list(await asyncio.gather(*map(spill, range(len(ranks)))))
    await store.close()
    return entries


def check(kind: str, ranks: list[dict[str, Any]], found: Outsider) -> None:
    shared = {path for path in found.arrays if not path.startswith("ranks/")}
    assert shared == SHARED[kind]
    for path in shared:
        assert {rank[kind]["whole"][path] for rank in ranks} == {found.bits(path)}, f"{kind}: {path}"
    private = {name for rank in ranks for name in rank[kind]["whole"]} - shared
    for name in private:
        seen = 0
        for rank in range(len(ranks)):
            path = f"ranks/{rank:06d}/tensors/{name}"
            if path not in found.arrays:  # a replica has copied it
                continue
            seen += 1
            whole = np.frombuffer(ranks[rank][kind]["whole"][name], found.arrays[path].dtype)
            facts = found.facts[path]
            cut = tuple(slice(s, s + e) for s, e in zip(facts["start"], found.arrays[path].shape, strict=True))
            np.testing.assert_array_equal(found.arrays[path], whole.reshape(facts["shape"])[cut], f"{kind}: {path}")
        assert seen > 0


@pytest.mark.parametrize("world", [2, 4])
def test_plain_zarr_sees_the_whole_tensors_of_a_distributed_job(node: Node, world: int, tmp_path: Path) -> None:
    ranks = run_world(worlds.laid_out, world, node)
    for kind in ranks[0]:
        entries = asyncio.run(spilled(tmp_path / kind, kind, ranks))
        keys = [stored.chunk.key for entry in entries for stored in entry.chunks]
        assert len(set(keys)) == len(keys), f"{kind}: an object with two writers"
        check(kind, ranks, look(tmp_path / kind, entries[0].id, tmp_path))
