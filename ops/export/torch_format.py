"""``tensors.pt``, a dict of all tensors by name; and ``values.pt``: for every rank what is no tensor, and tensors of its own.

Both load with ``torch.load(path, weights_only=True)``. That knows plain values only, so what is more special is made plain: NumPy
arrays become tensors, NumPy scalars Python's, deques and ranges lists, frozensets sets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ...snapshot.codec import decode
from ...snapshot.state import from_leaf
from ..contents import Bytes, alone
from . import Advance, Wanted
from .spool import spool

TENSORS: Final = "tensors.pt"
VALUES: Final = "values.pt"


async def export(wanted: Wanted, folder: Path, advance: Advance) -> list[str]:
    """See ``Exporter``. Needs twice the room on disk while it works."""
    places = await spool(wanted.opened, wanted.tensors, folder, advance)
    found = {t.name: as_tensor(t.dtype, t.shape, place) for t, place in places.items()}
    await asyncio.to_thread(torch.save, found, folder / TENSORS)
    if wanted.values:
        id = wanted.opened.id
        document = {
            "job": wanted.opened.job, "run": id.run, "generation": id.generation, "step": id.step,
            "world": wanted.opened.world,
            "ranks": {rank: await _of_rank(wanted, rank, folder) for rank in sorted(wanted.opened.images)},
        }  # fmt: skip
        await asyncio.to_thread(torch.save, document, folder / VALUES)
    return []


def as_tensor(dtype: str, shape: tuple[int, ...], data: Bytes) -> torch.Tensor:
    """A tensor of these bytes, which it shares. Its storage is as long as it is."""
    kind: torch.dtype = getattr(torch, dtype)
    if not data.nbytes:
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


async def _of_rank(wanted: Wanted, rank: int, folder: Path) -> dict[str, Any]:
    values = await wanted.opened.images[rank].read_values()
    pieces = {alone(piece): piece for tensor in wanted.tensors for piece in tensor.own if piece.rank == rank}
    own: dict[str, torch.Tensor] = {}
    for tensor, place in (await spool(wanted.opened, pieces, folder, lambda nbytes: None)).items():
        name = _own_name(tensor.name, pieces[tensor].slice.start, own)
        own[name] = as_tensor(tensor.dtype, tensor.shape, place)
    return {"values": plain(decode(values, from_leaf)), "tensors": own}


def _own_name(name: str, start: tuple[int, ...], taken: Collection[str]) -> str:
    """The tensor's; with where it starts, should one rank have several boxes of it."""
    return f"{name}@{','.join(map(str, start))}" if name in taken else name


def plain(value: Any) -> Any:
    """*value* in the types that ``torch.load(weights_only=True)`` reads."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(map(plain, value))
    if isinstance(value, set | frozenset):
        return {_key(item) for item in value}
    if isinstance(value, list | deque | range):
        return list(map(plain, value))
    return value


def _key(value: Any) -> Any:
    """*value* as an element of a set, or a key: a frozenset becomes a tuple there."""
    if isinstance(value, frozenset):
        return tuple(sorted(map(_key, value), key=repr))
    return tuple(map(_key, value)) if isinstance(value, tuple) else plain(value)
