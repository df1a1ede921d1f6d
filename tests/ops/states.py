"""A job's state as global arrays, and the images that its two ranks make of it: on a grid, uneven, irregular, of their own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from holdfast.ops.contents import Opened
from holdfast.snapshot.codec import encode
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.store import open_store
from holdfast.storage.writer import Image, write_image

Bytes = npt.NDArray[np.uint8]
RUN = "c" * 32
JOB = "a-job"
WORLD = 2

# Of each rank, the boxes that it holds. What both hold as a whole, without a grid, each has for itself.
HELD: list[list[Slice]] = [
    [
        Slice("model.weight", "float32", (6, 4), (3 * rank, 0), (3, 4), chunk=(3, 4)),
        Slice("model.cols", "bfloat16", (5, 6), (0, 3 * rank), (5, 3), chunk=(2, 3)),
        Slice("model.tail", "float8_e5m2", (5,), ((0, 3)[rank],), ((3, 2)[rank],), chunk=(3,)),
        Slice("model.uneven", "float16", (7, 2), ((0, 2)[rank], 0), ((2, 5)[rank], 2)),
        Slice("model.mean", "int64", (3,), (0,), (3,)),
        Slice("model.flags", "bool", (2, 2), (rank, 0), (1, 2), chunk=(1, 2)),
        Slice("model.empty", "float64", (0, 4), (0, 0), (0, 4), chunk=(1, 4)),
        Slice("optim.weight.step", "float32", (), (), ()),
    ]
    for rank in range(WORLD)
]
NAMES = [piece.name for piece in HELD[0]]
OWN = ("model.mean", "optim.weight.step")


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """An image in this process's memory."""

    layout: Layout
    content: Bytes

    async def read_slice(self, index: int, out: Bytes, first_row: int = 0, rows: int | None = None) -> None:
        placed = self.layout.placed[index]
        width = placed.slice.nbytes // max(placed.slice.rows, 1)
        count = placed.slice.rows - first_row if rows is None else rows
        start = placed.offset + first_row * width
        assert start + count * width <= placed.end
        out[:] = self.content[start : start + count * width]

    async def read_values(self) -> bytes:
        return self.content[self.layout.values_offset :].tobytes()


@dataclass(frozen=True, slots=True)
class State:
    """What a job has at one step."""

    id: SnapshotId
    arrays: Mapping[str, Bytes]  # by name, of all its bytes; what ranks have of their own, by name and rank

    def of(self, name: str, rank: int = 0) -> Bytes:
        """The bytes of a global tensor; of one that ranks have of their own, as that rank has it."""
        return self.arrays.get(name, self.arrays.get(f"{name}@{rank}", np.empty(0, np.uint8)))

    def image(self, rank: int) -> HeldBytes:
        """What *rank* makes of it."""
        layout = Layout.of(1, HELD[rank])
        values = encode(values_of(self.id.step, rank), "values")
        out = np.full(layout.values_offset + values.nbytes, 0xA5, np.uint8)
        for placed in layout.placed:
            out[placed.offset : placed.end] = self._box(placed.slice, rank)
        values.write_into(out[layout.values_offset :])
        return HeldBytes(layout, out)

    def spill(self, url: str, *ranks: int) -> None:
        """Write the images of these ranks, or of all, into a tier."""
        asyncio.run(self._spill(url, ranks or tuple(range(WORLD))))

    async def _spill(self, url: str, ranks: Sequence[int]) -> None:
        store = open_store(url)
        for rank in ranks:
            image = self.image(rank)
            await write_image(
                store,
                Image(self.id, rank, WORLD, self.id.step - 1, JOB, image.layout, image.content),
                still=lambda: True,
            )
        await store.close()

    def _box(self, piece: Slice, rank: int) -> Bytes:
        item = ITEM_BYTES[piece.dtype]
        whole = self.of(piece.name, rank).reshape(*piece.shape, item)
        cut = tuple(slice(s, s + e) for s, e in zip(piece.start, piece.extent, strict=True))
        return np.ascontiguousarray(whole[cut]).reshape(-1)

    def opened(self, *ranks: int) -> Opened:
        """As a source would open it; without some ranks, if others are named."""
        images = {rank: self.image(rank) for rank in ranks or range(WORLD)}
        values = {rank: len(image.content) - image.layout.values_offset for rank, image in images.items()}
        return Opened("here", JOB, self.id, WORLD, images, values)


def values_of(step: int, rank: int) -> dict[str, object]:
    """What is no tensor."""
    return {
        "groups": {"": [{"params": 1, "options": {"lr": 0.1, "betas": (0.9, 0.95)}}]},
        "extras": {"seen": {rank, 7}, "big": 1 << 70, "keys": {(1, "a"): range(3)}},
        "rng": {"torch": np.arange(16, dtype=np.uint8) + step, "python": [3, np.arange(4, dtype=np.uint32), None]},
    }


def state(step: int, seed: int = 0, changed: tuple[str, ...] = (), generation: int = 1) -> State:
    """Tensors drawn with *seed*: those that are *changed* also depend on the step."""
    arrays: dict[str, Bytes] = {}
    for piece in HELD[0]:
        nbytes = math.prod(piece.shape) * ITEM_BYTES[piece.dtype]
        for key in [f"{piece.name}@{rank}" for rank in range(WORLD)] if piece.name in OWN else [piece.name]:
            rng = np.random.default_rng([seed, step if piece.name in changed else 0, *key.encode()])
            arrays[key] = _numbers(piece.dtype, nbytes, rng)
    return State(SnapshotId(generation, step, RUN), arrays)


def _numbers(dtype: str, nbytes: int, rng: np.random.Generator) -> Bytes:
    """Finite ones, as a rule."""
    count = nbytes // ITEM_BYTES[dtype]
    if dtype.startswith("float") and "8" not in dtype:
        return rng.standard_normal(count).astype(dtype).view(np.uint8)
    if dtype == "bfloat16":
        return (rng.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if dtype == "bool":
        return rng.integers(0, 2, count, np.uint8)
    return rng.integers(0, 100, nbytes, np.uint8)
