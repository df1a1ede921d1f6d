"""From any world to any other: every element comes from where it was, each once; against a slow twin that marks elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from holdfast.agent.client import WINDOW_BYTES
from holdfast.hooks.images import batches
from holdfast.snapshot.assembly import assemble
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.live import Part
from holdfast.snapshot.partition import share
from holdfast.snapshot.regions import Box, box_of, cut, span
from hypothesis import assume, given, settings
from hypothesis import strategies as st

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Of 0 to 3 dimensions, some empty."""
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4))
    dtypes = st.sampled_from(["uint8", "bfloat16", "float32", "complex128"])
    return [Tensor(f"t{n}", draw(dtypes), tuple(shape)) for n, shape in enumerate(shapes)]


@st.composite
def placements(draw: st.DrawFn, tensors: list[Tensor]) -> list[list[Slice]]:
    """A mesh of ranks on which each tensor is sharded or replicated along each mesh dimension, as DTensors are: uneven, too."""
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    held: list[list[Slice]] = [[] for _ in range(math.prod(mesh))]
    coordinates = list(itertools.product(*map(range, mesh)))
    for tensor in tensors:
        sharded = [draw(st.integers(-1, len(tensor.shape) - 1)) for _ in mesh]
        boxes = [_box(tensor.shape, sharded, mesh, place) for place in coordinates]
        for rank, place in enumerate(coordinates):
            fixed = [place[d] if sharded[d] >= 0 else None for d in range(len(mesh))]
            members = tuple(
                other
                for other, there in enumerate(coordinates)
                if all(want is None or want == have for want, have in zip(fixed, there, strict=True))
            )
            start, extent = boxes[rank]
            alike = members if len(members) > 1 else ()
            held[rank].append(Slice(tensor.name, tensor.dtype, tensor.shape, start, extent, "cpu", alike))
    return held


def _box(
    shape: Sequence[int], sharded: Sequence[int], mesh: Sequence[int], place: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What torch.chunk leaves to that place of the mesh, one mesh dimension after the other."""
    start, extent = [0] * len(shape), list(shape)
    for dimension, size, index in zip(sharded, mesh, place, strict=True):
        if dimension >= 0:
            rows = -(-extent[dimension] // size)
            first = min(index * rows, extent[dimension])
            start[dimension] += first
            extent[dimension] = min(rows, extent[dimension] - first)
    return tuple(start), tuple(extent)


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[list[Slice]], list[list[Slice]]]:
    """The same tensors in two worlds."""
    of = draw(tensors())
    return draw(placements(of)), draw(placements(of))


def numbers(piece: Slice | Tensor) -> Numbers:
    """A number for every element of the global tensor."""
    return np.arange(math.prod(piece.shape), dtype=np.int64).reshape(piece.shape) + 1000 * int(piece.name[1:])


def part(of: Numbers, box: Box) -> Numbers:
    cuts = tuple(slice(s, s + e) for s, e in zip(box.start, box.extent, strict=True))
    return of[cuts] if cuts else of.reshape(())


@settings(derandomize=True, deadline=None, max_examples=300)
@given(changes())
def test_every_element_comes_from_where_it_was(change: tuple[list[list[Slice]], list[list[Slice]]]) -> None:
    before, after = change
    layouts = {rank: Layout.of(1, share(held, rank)) for rank, held in enumerate(before)}
    for rank, wanted in enumerate(after):
        filled = [np.full(piece.extent, -1, np.int64) for piece in wanted]
        for read in assemble(wanted, layouts, rank, alike=True):
            held = layouts[read.rank].placed[read.index].slice
            assert held.name == wanted[read.target].name
            assert box_of(held).meets(read.box) == read.box
            own = wanted[read.target].start
            target = part(
                filled[read.target],
                Box(tuple(b - o for b, o in zip(read.box.start, own, strict=True)), read.box.extent),
            )
            assert (target == -1).all(), "an element is filled twice"
            # The twin: elements of the slice, row-major, by the span's own offset and strides.
            flat, place = part(numbers(held), box_of(held)).reshape(-1), span(read.box, held)
            first = place.offset // ITEM_BYTES[held.dtype]
            steps = [range(0, n * s, s) if s else [0] for n, s in zip(read.box.extent, place.strides, strict=True)]
            target[...] = np.array([flat[first + sum(at)] for at in itertools.product(*steps)]).reshape(read.box.extent)
        for piece, found in zip(wanted, filled, strict=True):
            np.testing.assert_array_equal(found, part(numbers(piece), box_of(piece)))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(tensors(), st.data(), st.integers(1, 64))
def test_pieces_make_up_the_box_and_keep_to_the_limit(of: list[Tensor], data: st.DataObject, most: int) -> None:
    tensor = data.draw(st.sampled_from(of))
    whole = Slice(tensor.name, tensor.dtype, tensor.shape, (0,) * len(tensor.shape), tensor.shape)
    assume(whole.nbytes)
    start = tuple(data.draw(st.integers(0, n - 1)) for n in tensor.shape)
    box = Box(start, tuple(data.draw(st.integers(1, n - s)) for n, s in zip(tensor.shape, start, strict=True)))
    seen = np.zeros(tensor.shape, int)
    for piece in cut(box, whole, most):
        assert span(piece, whole).nbytes <= most or piece.volume == 1
        part(seen, piece)[...] += 1
    assert (part(seen, box) == 1).all()
    assert seen.sum() == box.volume


@settings(derandomize=True, deadline=None, max_examples=200)
@given(tensors(), st.data())
def test_boxes_without_each_other(of: list[Tensor], data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(of)).shape
    boxes = []
    for _ in range(2):
        start = tuple(data.draw(st.integers(0, n)) for n in shape)
        boxes.append(Box(start, tuple(data.draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True))))
    box, other = boxes
    marks = np.zeros(shape, int)
    part(marks, box)[...] += 1
    both = marks.copy()
    part(both, other)[...] += 1
    hole = box.meets(other)
    assert (hole is not None) == bool((both == 2).any())
    if hole is not None:
        for left in box.without(hole):
            assert left.volume
            part(marks, left)[...] += 10
        part(marks, hole)[...] += 10
        assert set(np.unique(marks)) <= {0, 11}


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 40_000_000), st.booleans()), min_size=1, max_size=12), st.data())
def test_windows_hold_what_they_are_filled_from(sizes: list[tuple[int, bool]], data: st.DataObject) -> None:
    """Every part's bytes lie in its batch's window where it says, and no window is too small for its ranges."""
    pieces = [Slice(f"t{n}", "uint8", (size,), (0,), (size,)) for n, (size, _) in enumerate(sizes)]
    layout = Layout.of(1, pieces)
    wanted = [p for p, (size, chosen) in zip(layout.placed, sizes, strict=True) if chosen and size]
    parts = [
        small
        for p in wanted
        for small in Part(
            p,
            box_of(p.slice),
            torch.empty(p.slice.nbytes, dtype=torch.uint8, device="meta"),
            span(box_of(p.slice), p.slice),
        ).cut(8 << 20)
    ]
    data.draw(st.randoms(use_true_random=False)).shuffle(parts)
    seen = 0
    for batch in batches(parts, layout.values_offset):
        assert batch.nbytes == sum(end - start for start, end in batch.ranges) <= WINDOW_BYTES
        assert all(a[1] < b[0] for a, b in itertools.pairwise(batch.ranges))
        ends = [0, *itertools.accumulate(end - start for start, end in batch.ranges)]
        for small, at in batch.parts:
            first = small.placed.offset + small.span.offset
            index = next(i for i, (start, end) in enumerate(batch.ranges) if start <= first < end)
            assert first + small.span.nbytes <= batch.ranges[index][1]
            assert at == ends[index] + first - batch.ranges[index][0]
            seen += small.span.nbytes
    assert seen == sum(p.slice.nbytes for p in wanted)
