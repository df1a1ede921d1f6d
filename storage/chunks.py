"""Which objects an image becomes in a tier: arrays and their chunks, computed from its layout alone. Pure.

A slice on a grid (``Slice.chunk``) gives whole chunks of the one array that all ranks share: no two ranks write the same
chunk, and none has to know of the others. Any other slice becomes an array of its own in its rank's group. Either way a
chunk holds whole rows of one slice, so it is one run of bytes of the image, but for the padding that zarr wants where an
array ends inside a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ..errors import Corrupt
from ..snapshot.layout import ITEM_BYTES, Layout, Placed, Slice
from ..snapshot.partition import LARGEST_CHUNK, chunk_rows
from .names import private_path, rank_path, tensor_path, values_path

CRC_BYTES: Final = 4
"""What zarr's crc32c codec appends to a chunk's payload."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One object of an array.

    Attributes:
        index: number of the slice in the layout.
        key: of the object, relative to the snapshot's folder.
        first_row: the first row of that slice that it holds.
        rows: how many rows of the slice it holds, at least 1. They lie in the chunk's leading corner.
        shape: the chunk's own, padding included. Empty for a 0-d tensor.
    """

    index: int
    key: str
    first_row: int
    rows: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """One array, as its metadata describe it.

    Attributes:
        path: relative to the snapshot's folder.
        chunk: shape of its chunks; sizes are at least 1.
        dtype: torch's name.
        name: of the tensor.
        start: where in the tensor the array's first element lies; None if the array is the whole tensor.
        of: the tensor's shape.
        device: type of the device that the tensor lived on.
    """

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    name: str
    start: tuple[int, ...] | None
    of: tuple[int, ...]
    device: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank writes for its image: metadata of arrays and groups, and chunks; the values come on top.

    ``groups`` are paths, parents first; "" is the snapshot's own.
    """

    groups: tuple[str, ...]
    arrays: tuple[Array, ...]
    chunks: tuple[Chunk, ...]


def plan(layout: Layout, rank: int) -> Plan:
    """What *rank* writes of an image of that layout. All ranks together write every object once.

    Raises:
        Corrupt: two slices would become the same object, as no training state makes them.
    """
    arrays: dict[str, Array] = {}
    chunks: list[Chunk] = []
    for index, placed in enumerate(layout.placed):
        array = _array(placed.slice, rank)
        if placed.slice.chunk is None and array.path in arrays:
            raise Corrupt(f"the layout has two slices of {placed.slice.name} that are stored by themselves")
        if placed.slice.chunk is None or _is_first(placed.slice):
            arrays[array.path] = array
        chunks += _chunks(index, placed.slice, array)
    if len({chunk.key for chunk in chunks}) != len(chunks):
        raise Corrupt("the layout has slices of one tensor that overlap")
    groups = ["", "ranks"] if rank == 0 else []
    groups.append(rank_path(rank))
    if any(array.start is not None for array in arrays.values()):
        groups.append(f"{rank_path(rank)}/tensors")
    return Plan(tuple(groups), tuple(arrays.values()), tuple(chunks))


def values_key(rank: int) -> str:
    """The one chunk of the array of a rank's eager values."""
    return chunk_key(values_path(rank), (0,))


def chunk_key(path: str, place: Sequence[int]) -> str:
    """The chunk of that index of the array at *path*, as zarr's default encoding calls it with dots: an array is one folder."""
    return f"{path}/{'.'.join(['c', *map(str, place)])}"


def row_bytes(piece: Slice) -> int:
    """What one row of *piece* takes in the image."""
    return math.prod(piece.extent[1:]) * ITEM_BYTES[piece.dtype]


def payload_bytes(piece: Slice, chunk: Chunk) -> int:
    """What *chunk* of *piece* takes as an object, padding included, checksum excluded."""
    return math.prod(chunk.shape) * ITEM_BYTES[piece.dtype]


def is_run(piece: Slice, chunk: Chunk) -> bool:
    """Whether the payload is a run of bytes of the image, followed by padding if anything; else every row has padding."""
    return chunk.shape[1:] == piece.extent[1:]


def span(placed: Placed, chunk: Chunk) -> tuple[int, int]:
    """The bytes of the image that *chunk* holds: first, and how many."""
    size = row_bytes(placed.slice)
    return placed.offset + chunk.first_row * size, chunk.rows * size


def corner(payload: npt.NDArray[np.uint8], piece: Slice, chunk: Chunk) -> npt.NDArray[np.uint8]:
    """The view of a chunk's *payload* in which the rows of *piece* lie: its first dimension is rows, its last is bytes."""
    if is_run(piece, chunk):
        return payload.reshape(chunk.shape[0] if chunk.shape else 1, -1)[: chunk.rows]
    item = ITEM_BYTES[piece.dtype]  # there are two dimensions or more
    inner = (*piece.extent[1:-1], piece.extent[-1] * item)
    box = payload.reshape(*chunk.shape[:-1], chunk.shape[-1] * item)
    return box[(slice(0, chunk.rows), *(slice(0, size) for size in inner))]


def _array(piece: Slice, rank: int) -> Array:
    """The array that *piece* belongs to."""
    if piece.chunk is not None:
        return Array(
            tensor_path(piece.name), piece.shape, piece.chunk, piece.dtype, piece.name, None, piece.shape, piece.device
        )
    chunk = tuple(max(size, 1) for size in piece.extent)
    if chunk:
        most = max(LARGEST_CHUNK // (math.prod(chunk[1:]) * ITEM_BYTES[piece.dtype]), 1)
        chunk = (chunk_rows(chunk[0], most, spans=True), *chunk[1:])
    return Array(
        private_path(rank, piece.name), piece.extent, chunk, piece.dtype, piece.name, piece.start, piece.shape, piece.device
    )  # fmt: skip


def _is_first(piece: Slice) -> bool:
    """Whether this slice is where its tensor begins: whose rank writes the metadata of the array that all share.

    All who hold a slice of an empty tensor write them, and all write the same.
    """
    return not any(piece.start) and (piece.nbytes > 0 or math.prod(piece.shape) == 0)


def _chunks(index: int, piece: Slice, array: Array) -> Iterator[Chunk]:
    if piece.nbytes == 0:
        return
    if not array.chunk:
        yield Chunk(index, chunk_key(array.path, ()), 0, 1, ())
        return
    start: Sequence[int] = (0,) * len(piece.start) if array.start is not None else piece.start
    cell = [s // c for s, c in zip(start, array.chunk, strict=True)]
    step = array.chunk[0]
    for first in range(0, piece.rows, step):
        key = chunk_key(array.path, (cell[0] + first // step, *cell[1:]))
        yield Chunk(index, key, first, min(step, piece.rows - first), array.chunk)
