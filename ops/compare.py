"""By how much two snapshots differ: tensor by tensor, and where their values do. Pure but for the reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..snapshot.codec import Raw, Tagged, decode
from .contents import Opened, Tensor, read_box, stream
from .numbers import Difference

_SHOWN: Final = 20  # paths of values, for each rank


@dataclass(slots=True)
class Comparison:
    """Of two snapshots, A and B.

    Attributes:
        only_a, only_b: names of tensors that the other one has not.
        unlike: tensors of which dtype or shape differ: as they are in A, and in B.
        differing: tensors whose bytes differ, by name, and by how much.
        equal: how many tensors are the same, bit by bit.
        values: for each rank whose values differ, where; None if they were not compared.
    """

    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    unlike: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    differing: dict[str, Difference] = field(default_factory=dict)
    equal: int = 0
    values: dict[int, list[str]] | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_a or self.only_b or self.unlike or self.differing or self.values)


Pair = tuple[Tensor, Tensor]


def pair_up(a: list[Tensor], b: list[Tensor], into: Comparison) -> list[Pair]:
    """The tensors that can be compared. Others are noted in *into*."""
    ours, theirs = {t.name: t for t in a}, {t.name: t for t in b}
    into.only_a += [name for name in ours if name not in theirs]
    into.only_b += [name for name in theirs if name not in ours]
    pairs = [(tensor, theirs[name]) for name, tensor in ours.items() if name in theirs]
    like: list[Pair] = []
    for pair in pairs:
        alike = (pair[0].dtype, pair[0].shape) == (pair[1].dtype, pair[1].shape)
        (like if alike else into.unlike).append(pair)
    return like


async def compare(a: Opened, b: Opened, pairs: list[Pair], into: Comparison, advance: Callable[[int], None]) -> None:
    """Read and compare these tensors, cell by cell."""
    found = {ours.name: Difference(ours.dtype) for ours, _ in pairs}
    others = {ours.name: theirs for ours, theirs in pairs}
    async for cell in stream(a, [ours for ours, _ in pairs]):
        theirs = await read_box(b, others[cell.tensor.name], cell.box)
        found[cell.tensor.name].add(cell.bytes, theirs)
        advance(2 * theirs.nbytes)
    into.differing |= {name: difference for name, difference in found.items() if difference.elements}
    into.equal += sum(not difference.elements for difference in found.values())


async def compare_values(a: Opened, b: Opened) -> dict[int, list[str]]:
    """For each rank whose values differ, the paths where they do (the first twenty)."""
    found: dict[int, list[str]] = {}
    for rank in sorted(a.images.keys() | b.images.keys()):
        if rank not in a.images or rank not in b.images:
            found[rank] = ["only in " + (a.source if rank in a.images else b.source)]
            continue
        ours, theirs = await a.images[rank].read_values(), await b.images[rank].read_values()
        if ours != theirs:
            paths = list(dict.fromkeys(differences(decode(ours), decode(theirs))))
            more = [f"and {len(paths) - _SHOWN} more"] if len(paths) > _SHOWN else []
            if paths:
                found[rank] = paths[:_SHOWN] + more
    return found


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two decoded values differ, such as ``rng.python[1]``."""
    if type(a) is not type(b):
        yield path or "all"
    elif isinstance(a, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            step = f"{path}.{key}" if path else str(key)
            if key in a and key in b:
                yield from differences(a[key], b[key], step)
            else:
                yield step
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield path or "all"
            return
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from differences(left, right, f"{path}[{index}]")
    elif not _equal(a, b):
        yield path or "all"


def _equal(a: Any, b: Any) -> bool:
    """Whether two values without others in them are the same, bit by bit."""
    if isinstance(a, Raw):
        return bool((a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.data, b.data))
    if isinstance(a, Tagged):
        return a.tag == b.tag and not list(differences(a.value, b.value))
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b) or (a != a and b != b)
