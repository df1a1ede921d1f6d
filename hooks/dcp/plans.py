"""What a DCP plan becomes in a snapshot, and what a snapshot says to DCP. Pure, but for the tensors that are passed through.

A write item of a tensor is one slice: its box of the global tensor, under the name that DCP's planner gave it. All else is a
value: the object itself, for ``snapshot.codec``, never what DCP would pickle of it. Every image also holds an *overview* of
the whole save, which the coordinator made of all plans: so any one image tells what there is besides tensors, and where.

The values of an image are a tree::

    {"dcp": {"format": 1, "homes": {name: rank}, "paths": {name: (key or index, …)}}, "values": {name: value}}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem, WriteItemType

from ...errors import ConfigError, Corrupt, LayoutMismatch, StateRefused
from ...snapshot.layout import Layout, Slice
from ...snapshot.state import Item, plain_tensor

_FORMAT: Final = 1
Shape = tuple[int, ...]
Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """What one rank must know of the whole save; travels in ``SavePlan.storage_data``.

    Attributes:
        rank: whose plan it is in.
        grids: by name of each tensor in that plan, the grid on which all ranks cut it (``Slice.chunk``), if there is one.
        homes: by name of each value of the save, the rank that writes it.
        paths: where the planner found what it flattened, as it names it.
    """

    rank: int
    grids: Mapping[str, Shape | None]
    homes: Mapping[str, int]
    paths: Mapping[str, Path]

    def to_tree(self) -> dict[str, Any]:
        """For the values of an image: what concerns all ranks."""
        return {"format": _FORMAT, "homes": dict(self.homes), "paths": dict(self.paths)}


# -- writing -------------------------------------------------------------------------------------------------------------


def overviews(plans: Sequence[SavePlan]) -> list[Overview]:
    """For each rank, in order, what it must know. *plans* are those of all ranks, without duplicates, as planners make them."""
    homes = {item.index.fqn: rank for rank, plan in enumerate(plans) for item in plan.items if _is_value(item)}
    paths: dict[str, Path] = {}
    boxes: dict[str, list[tuple[Shape, Shape]]] = {}
    shapes: dict[str, Shape] = {}
    for plan in plans:
        paths |= _paths(plan.planner_data)
        for item in plan.items:
            if item.tensor_data is not None:
                chunk = item.tensor_data.chunk
                boxes.setdefault(item.index.fqn, []).append((tuple(chunk.offsets), tuple(chunk.sizes)))
                shapes[item.index.fqn] = tuple(item.tensor_data.size)
    grids = {name: grid_of(shapes[name], found) for name, found in boxes.items()}
    return [
        Overview(rank, {i.index.fqn: grids[i.index.fqn] for i in plan.items if not _is_value(i)}, homes, paths)
        for rank, plan in enumerate(plans)
    ]


def grid_of(shape: Shape, boxes: Iterable[tuple[Shape, Shape]]) -> Shape | None:
    """The coarsest grid, if any, that all *boxes* (start, extent) of a tensor of *shape* keep to, as ``Slice.chunk`` asks."""
    filled = [(start, extent) for start, extent in boxes if math.prod(extent)]
    starts = [[start[d] for start, _ in filled] for d in range(len(shape))]
    grid = tuple(math.gcd(*column) or max(length, 1) for column, length in zip(starts, shape, strict=True))
    cut = (Slice("", "uint8", shape, start, extent, chunk=grid) for start, extent in filled)
    return grid if all(piece.on_grid for piece in cut) else None


def planned(plan: SavePlan, planner: SavePlanner) -> tuple[list[Item], dict[str, Any]]:
    """This rank's tensors, and its part of the tree of values. *plan* is final, with its ``Overview``.

    Raises:
        StateRefused: something that cannot be stored, by its name.
        ConfigError: a planner that pickles what is no tensor, and does not show it.
    """
    overview: Overview = plan.storage_data
    items: dict[str, Item] = {}
    values: dict[str, Any] = {}
    for item in plan.items:
        name = item.index.fqn
        if _is_value(item):
            values[name] = _object(planner, item)
        elif name in items:
            raise StateRefused(f"{name}: this rank is to write several boxes of it; one is needed")
        else:
            items[name] = _tensor(planner, item, overview.grids[name])
    return list(items.values()), {"dcp": overview.to_tree(), "values": values}


def _is_value(item: WriteItem) -> bool:
    return item.type is WriteItemType.BYTE_IO


def _object(planner: SavePlanner, item: WriteItem) -> Any:
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise ConfigError(
            f"{item.index.fqn} is no tensor, and {type(planner).__name__} gives it as bytes only; what is stored without "
            f"pickle must be seen: a planner with lookup_object is needed, such as one derived from DefaultSavePlanner"
        )
    return lookup(item.index)


def _tensor(planner: SavePlanner, item: WriteItem, grid: Shape | None) -> Item:
    assert item.tensor_data is not None
    name, chunk = item.index.fqn, item.tensor_data.chunk
    found = planner.resolve_data(item)
    if not isinstance(found, torch.Tensor):
        raise StateRefused(f"{name}: the planner calls it a tensor, and gives a {type(found).__name__}")
    local = plain_tensor(name, found.detach().resolve_conj().resolve_neg())
    shape, start, extent = tuple(item.tensor_data.size), tuple(chunk.offsets), tuple(chunk.sizes)
    if tuple(local.shape) != extent:
        if local.numel() != math.prod(extent):
            raise StateRefused(f"{name}: a box of {list(extent)} is planned, and a tensor of {list(local.shape)} given")
        local = local.reshape(extent)  # an empty shard may have lost its other dimensions
    dtype = str(local.dtype).removeprefix("torch.")
    return Item(Slice(name, dtype, shape, start, extent, local.device.type, chunk=grid), local, found, lazy=False)


def _paths(planner_data: object) -> dict[str, Path]:
    """What a planner says of where it found things, as far as it is what DCP's own say."""
    if not isinstance(planner_data, Mapping):
        return {}
    return {
        name: path
        for name, path in planner_data.items()
        if type(name) is str and type(path) is tuple and all(type(step) in (str, int) for step in path)
    }


@dataclass(slots=True)
class Delta:
    """The plans of all ranks, where a planner that caches them (``enable_plan_caching``) tells what has changed only."""

    last: list[SavePlan]

    def whole(self, plans: Sequence[SavePlan]) -> list[SavePlan]:
        """*plans*, with those of the last save for what has not changed. Raises ``ConfigError`` if they are not known."""
        usable = [getattr(plan, "usable", True) for plan in plans]  # older planners cache nothing
        if len(self.last) != len(plans) and not all(usable):
            raise ConfigError("the planner has cached plans that this Writer has never seen; use the Writer that has")
        self.last = [
            plan if good else self.last[rank] for rank, (plan, good) in enumerate(zip(plans, usable, strict=True))
        ]
        return self.last


# -- reading -------------------------------------------------------------------------------------------------------------


def read_overview(values: object) -> tuple[dict[str, int], dict[str, Path]]:
    """The homes and the paths in an image's tree of values; empty where no ``Writer`` wrote it. Raises ``Corrupt``."""
    tree = values.get("dcp") if isinstance(values, dict) else None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise Corrupt(f"the values were written by another version of the DCP Writer; this one reads format {_FORMAT}")
    homes, paths = tree.get("homes"), tree.get("paths")
    if not isinstance(homes, dict) or not all(type(n) is str and type(r) is int for n, r in homes.items()):
        raise Corrupt("the values do not say where each of them is")
    return homes, _paths(paths)


def value_of(values: object, name: str) -> Any:
    """The value of that name in the tree of the image that is its home. Raises ``Corrupt`` if it is not there."""
    found = values.get("values") if isinstance(values, dict) else None
    if not isinstance(found, dict) or name not in found:
        raise Corrupt(f"{name} is not in the image that should have it")
    return found[name]


def metadata(layouts: Mapping[int, Layout], homes: Iterable[str], paths: Mapping[str, Path]) -> Metadata:
    """What DCP's planners need to know of a snapshot: its tensors in boxes, its values, and how to unflatten them.

    Raises ``LayoutMismatch`` if images disagree on a tensor.
    """
    shapes: dict[str, tuple[str, Shape]] = {}
    boxes: dict[str, dict[tuple[Shape, Shape], None]] = {}
    for rank in sorted(layouts):
        for placed in layouts[rank].placed:
            piece = placed.slice
            if shapes.setdefault(piece.name, (piece.dtype, piece.shape)) != (piece.dtype, piece.shape):
                raise LayoutMismatch(f"{piece.name}: the images of several ranks hold other tensors under this name")
            found = boxes.setdefault(piece.name, {})
            if piece.nbytes:
                found[piece.start, piece.extent] = None
    tensors = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, dtype)),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(start), torch.Size(extent)) for start, extent in boxes[name]],
        )
        for name, (dtype, shape) in shapes.items()
    }
    return Metadata({**tensors, **{name: BytesStorageMetadata() for name in homes}}, planner_data=dict(paths))


def wanted(item: ReadItem, found: Metadata) -> Slice:
    """The box of the global tensor that *item* asks for."""
    name = item.storage_index.fqn
    stored = found.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    base = item.storage_index.offset or (0,) * len(stored.size)
    start = tuple(a + b for a, b in zip(base, item.storage_offsets, strict=True))
    return Slice(
        name, str(stored.properties.dtype).removeprefix("torch."), tuple(stored.size), start, tuple(item.lengths)
    )


def with_overviews(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """*plans*, each with what its rank must know."""
    return [replace(plan, storage_data=found) for plan, found in zip(plans, overviews(plans), strict=True)]
