"""Which ranks hold what of a tensor, and on which grid it is cut: what a device mesh and its placements say of that."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def plain_chunk(shape: tuple[int, ...], replicas: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of a plain tensor: one box, if all ranks of the job hold the same one."""
    alike = len(replicas) == _world() or _world() == 1
    return tuple(max(size, 1) for size in shape) if alike else None


def mesh_chunk(tensor: DTensor) -> tuple[int, ...] | None:
    """The grid on which all ranks of the job cut *tensor*; None if some hold no part of it, or it is no regular grid.

    Every rank must come to the same answer: it follows from the mesh, the placements and the tensor's shape alone.
    """
    mesh = tensor.device_mesh
    if sorted(_ranks(mesh).ravel().tolist()) != list(range(_world())):
        return None
    parts: list[list[int]] = [[] for _ in tensor.shape]
    strided = set[int]()
    for placement, size in reversed(list(zip(tensor.placements, mesh.shape, strict=True))):
        if placement.is_replicate() or size == 1:
            continue
        dimension = getattr(placement, "dim", None)
        if dimension is None:
            return None
        if type(placement) is not Shard:  # FSDP on top of tensor parallelism: what comes after it is cut before it
            if getattr(placement, "split_factor", None) != math.prod(parts[dimension]):
                return None
            strided.add(dimension)
        parts[dimension].append(size)
    grid: list[int] = []
    for dimension, (length, counts) in enumerate(zip(tensor.shape, parts, strict=True)):
        # One cut is that of torch.chunk, whose last parts may be shorter or empty; several make a grid if they are even.
        if (len(counts) > 1 or dimension in strided) and length % math.prod(counts):
            return None
        grid.append(max(-(-length // math.prod(counts)), 1))
    return tuple(grid)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mesh_replicas(tensor: DTensor) -> tuple[int, ...]:
    """The ranks that hold the very same part of *tensor*: those that differ only along replicated mesh dimensions."""
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None  # a rank outside the mesh holds no part of it, and would not get here
    index = tuple(slice(None) if p.is_replicate() else c for p, c in zip(tensor.placements, place, strict=True))
    ranks = tuple(sorted(_ranks(mesh)[index].ravel().tolist()))
    return ranks if len(ranks) > 1 else ()


@lru_cache(maxsize=64)
def _ranks(mesh: DeviceMesh) -> npt.NDArray[np.int64]:
    """The ranks of a mesh, in its shape. Kept: torch works them out anew every time, which takes longer than all else here."""
    return np.array(mesh.mesh.tolist(), np.int64)
