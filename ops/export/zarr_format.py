"""A zarr v3 group, as it lies in a tier: an array for each tensor; ``ranks/<rank>/`` for what belongs to one rank alone.

Arrays are cut anew, at the tensors' own grid where there is one, into chunks of up to 64 MiB. ``docs/tiers.md`` has the names,
the dtypes and the attributes. What is no tensor is in ``ranks/<rank>/values``, encoded as in ``snapshot.codec``.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from ...erasure.kernel import crc32c
from ...snapshot.layout import ITEM_BYTES
from ...storage.arrays import array_metadata, group_metadata, values_metadata
from ...storage.chunks import Array, chunk_key, values_key
from ...storage.names import private_path, rank_path, tensor_path, values_path
from ...storage.store import Store, open_store
from ..contents import Bytes, Cell, Piece, Tensor, alone, stream
from . import Advance, Wanted

_META = "zarr.json"


async def export(wanted: Wanted, folder: Path, advance: Advance) -> list[str]:
    """See ``Exporter``."""
    store = open_store(str(folder))
    try:
        await _groups(wanted, store)
        for tensor in wanted.tensors:
            await _array(store, tensor_path(tensor.name), tensor)
        async for cell in stream(wanted.opened, wanted.tensors):
            await _chunk(store, tensor_path(cell.tensor.name), cell)
            advance(cell.bytes.nbytes)
        if wanted.values:
            for rank in sorted(wanted.opened.images):
                await _of_rank(wanted, store, rank)
        await store.settle()
    finally:
        await store.close()
    return []


async def _groups(wanted: Wanted, store: Store) -> None:
    id = wanted.opened.id
    facts = {
        "job": wanted.opened.job, "run": id.run, "generation": id.generation, "step": id.step, "world": wanted.opened.world,
    }  # fmt: skip
    await store.put(_META, [group_metadata(facts)], durable=False)
    if wanted.values:
        own = {piece.rank for tensor in wanted.tensors for piece in tensor.own}
        ranks = sorted(wanted.opened.images)
        paths = ["ranks", *map(rank_path, ranks), *(f"{rank_path(rank)}/tensors" for rank in ranks if rank in own)]
        for path in paths:
            await store.put(f"{path}/{_META}", [group_metadata()], durable=False)


async def _array(store: Store, path: str, tensor: Tensor, piece: Piece | None = None) -> None:
    """The metadata of *tensor*; *piece* says where it lies in another one, of which it is a part."""
    device = tensor.pieces[0].slice.device if tensor.pieces else "cpu"
    start, of = (None, tensor.shape) if piece is None else (piece.slice.start, piece.slice.shape)
    array = Array(path, tensor.shape, tensor.cell(), tensor.dtype, tensor.name, start, of, device)
    await store.put(f"{path}/{_META}", [array_metadata(array)], durable=False)


async def _chunk(store: Store, path: str, cell: Cell) -> None:
    shape = cell.tensor.cell()
    place = [start // step for (start, _), step in zip(cell.box, shape, strict=True)]
    await _put(store, chunk_key(path, place), _padded(cell, shape))


def _padded(cell: Cell, shape: tuple[int, ...]) -> Bytes:
    """The cell in the leading corner of a whole chunk, where it is cut off at the tensor's end."""
    extent = tuple(b - a for a, b in cell.box)
    if extent == shape:
        return cell.bytes
    item = ITEM_BYTES[cell.tensor.dtype]
    out = np.zeros(math.prod(shape) * item, np.uint8)
    corner = tuple(slice(0, n * (item if dim == len(extent) - 1 else 1)) for dim, n in enumerate(extent))
    out.reshape(*shape[:-1], -1)[corner] = cell.bytes.reshape(*extent[:-1], -1)
    return out


async def _put(store: Store, key: str, data: Bytes) -> None:
    await store.put(key, [data, struct.pack("<I", crc32c(data))], durable=False)


async def _of_rank(wanted: Wanted, store: Store, rank: int) -> None:
    """Its values, and tensors of its own."""
    image = wanted.opened.images[rank]
    values = np.frombuffer(await image.read_values(), np.uint8)
    await store.put(f"{values_path(rank)}/{_META}", [values_metadata(values.nbytes)], durable=False)
    if values.nbytes:
        await _put(store, values_key(rank), values)
    for tensor in wanted.tensors:
        for piece in tensor.own:
            if piece.rank == rank:
                await _own(wanted, store, piece)


async def _own(wanted: Wanted, store: Store, piece: Piece) -> None:
    path, tensor = private_path(piece.rank, piece.slice.name), alone(piece)
    await _array(store, path, tensor, piece)
    async for cell in stream(wanted.opened, [tensor]):
        await _chunk(store, path, cell)
