"""From shares to images and back: what replicas split between them gives every rank every byte, exactly once."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from holdfast.errors import LayoutMismatch
from holdfast.snapshot.assembly import assemble
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.partition import share
from holdfast.snapshot.regions import box_of, span
from hypothesis import given, settings
from hypothesis import strategies as st

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class World:
    """What each rank holds, whole: boxes of global tensors, alike on their members, or private to one rank."""

    held: list[list[Slice]]

    @property
    def ranks(self) -> range:
        return range(len(self.held))


@st.composite
def worlds(draw: st.DrawFn, *, empty: bool = False) -> World:
    """Tensors of 0 to 3 dimensions, cut into boxes along one of them, each box held by one rank, several or none."""
    ranks = draw(st.integers(1, 5))
    held: list[list[Slice]] = [[] for _ in range(ranks)]
    for number in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0 if empty else 1, 7), max_size=3)))
        dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]))
        axis = draw(st.integers(0, len(shape) - 1)) if shape else 0
        boxes = draw(st.integers(1, 3)) if shape else 1
        length = shape[axis] if shape else 1
        cuts = sorted(draw(st.lists(st.integers(0, length), min_size=boxes - 1, max_size=boxes - 1)))
        holder_of = draw(
            st.lists(st.integers(-1, boxes - 1), min_size=ranks, max_size=ranks)
        )  # -1: holds nothing of it
        private = draw(st.integers(0, 4)) == 0
        for box, (first, last) in enumerate(zip([0, *cuts], [*cuts, length], strict=True)):
            start = tuple(first if d == axis else 0 for d in range(len(shape)))
            extent = tuple(last - first if d == axis else n for d, n in enumerate(shape))
            if not empty and math.prod(extent) == 0:
                continue
            members = tuple(rank for rank in range(ranks) if holder_of[rank] == box)
            alike = members if len(members) > 1 and not private else ()
            for rank in members:
                held[rank].append(Slice(f"t{number}", dtype, shape, start, extent, "cpu", alike))
    return World(held)


def contents(piece: Slice, rank: int) -> Bytes:
    """The bytes of a box, row-major: a function of the tensor's name, and of the rank if the box is private to it."""
    item = ITEM_BYTES[piece.dtype]
    seed = hash((int(piece.name[1:]), -1 if piece.members else rank)) % 2**32
    tensor = np.random.default_rng(seed).integers(0, 256, (*piece.shape, item), np.uint8)
    box = tuple(slice(s, s + e) for s, e in zip(piece.start, piece.extent, strict=True))
    return np.ascontiguousarray(tensor[box]).reshape(-1)


def image(world: World, rank: int) -> tuple[Layout, Bytes]:
    """What *rank* writes into its slot."""
    layout = Layout.of(1, share(world.held[rank], rank))
    out = np.zeros(layout.values_offset, np.uint8)
    for placed in layout.placed:
        out[placed.offset : placed.end] = contents(placed.slice, rank)
    return layout, out


@settings(derandomize=True, deadline=None, max_examples=200)
@given(worlds(empty=True))
def test_shares_are_disjoint_and_cover_everything(world: World) -> None:
    held = Counter[tuple[Slice, int]]()  # (box, row within it), by the ranks that hold it
    copied = Counter[tuple[Slice, int]]()
    for rank in world.ranks:
        for piece in world.held[rank]:
            if piece.members:
                held.update((piece, row) for row in range(piece.rows) if piece.nbytes)
        for part in share(world.held[rank], rank):
            if not part.members:
                assert part in world.held[rank]
                continue
            for row in range(part.rows if part.nbytes else 0):
                (box,) = [b for b in world.held[rank] if b.members == part.members and contains(b, part, row)]
                copied[box, row + (part.start[0] - box.start[0] if box.start else 0)] += 1
    assert set(copied) == set(held)
    assert set(copied.values()) <= {1}
    assert all(count == len(box.members) for (box, _), count in held.items())


def contains(box: Slice, part: Slice, row: int) -> bool:
    if (box.name, box.start[1:], box.extent[1:]) != (part.name, part.start[1:], part.extent[1:]):
        return False
    return not box.start or box.start[0] <= part.start[0] + row < box.start[0] + box.rows


@settings(derandomize=True, deadline=None, max_examples=200)
@given(worlds(), st.integers(1, 50))
def test_shares_are_balanced(world: World, times: int) -> None:
    """A member's share is within one row, the largest of its group, of the group's bytes divided by its members.

    Each of its two cuts is off by half a row at most; and, since cuts are aimed at whole bytes, by less than one more byte
    together. So two shares differ by less than two rows and two bytes.
    """
    held = [[piece for piece in mine for _ in range(times if piece.members else 1)] for mine in world.held]
    groups = {piece.members for mine in held for piece in mine if piece.members}
    for members in groups:
        slices = [piece for piece in held[members[0]] if piece.members == members]
        total, largest = sum(s.nbytes for s in slices), max(s.nbytes // s.rows for s in slices)
        sizes = [sum(s.nbytes for s in share(held[rank], rank) if s.members == members) for rank in members]
        assert sum(sizes) == total
        for size in sizes:
            assert abs(size * len(members) - total) < (largest + 1) * len(members)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(worlds(empty=True))
def test_every_rank_gets_back_what_it_held(world: World) -> None:
    images = [image(world, rank) for rank in world.ranks]
    layouts = {rank: layout for rank, (layout, _) in enumerate(images)}
    for rank in world.ranks:
        wanted = world.held[rank]
        filled = [np.zeros(box.nbytes, np.int64) - 1 for box in wanted]
        for read in assemble(wanted, layouts, rank):
            into, held = span(read.box, wanted[read.target]), layouts[read.rank].placed[read.index]
            out = span(read.box, held.slice)
            assert into.dense  # shares are cut by rows
            assert out.dense
            assert into.nbytes == out.nbytes > 0
            assert held.offset + out.offset + out.nbytes <= layouts[read.rank].values_offset
            target = filled[read.target][into.offset : into.offset + into.nbytes]
            assert (target == -1).all(), "a row is filled twice"
            target[:] = images[read.rank][1][held.offset + out.offset :][: out.nbytes]
        for box, found in zip(wanted, filled, strict=True):
            np.testing.assert_array_equal(found, contents(box, rank))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(worlds(empty=True), st.data())
def test_without_an_image_that_is_needed_nothing_is_made_up(world: World, data: st.DataObject) -> None:
    """If one rank's image is gone, assembling either does without it, or names what is missing."""
    gone = data.draw(st.sampled_from(world.ranks))
    layouts = {rank: image(world, rank)[0] for rank in world.ranks if rank != gone}
    for rank in world.ranks:
        try:
            reads = assemble(world.held[rank], layouts, rank)
        except LayoutMismatch as error:
            assert any(f"{box.name}: [" in str(error) for box in world.held[rank])  # noqa: PT017 - or it succeeds
            continue
        volumes = Counter[int]()
        for read in reads:
            volumes[read.target] += read.box.volume
        assert [volumes[i] for i in range(len(world.held[rank]))] == [box_of(b).volume for b in world.held[rank]]


def test_two_shares_may_differ_by_more_than_one_row() -> None:
    """Here by 3 bytes, where no row has more than 2: each is within one row of an equal part, and no better is promised."""
    members = tuple(range(6))
    slices = [
        Slice(f"t{i}", "uint8", (r, w), (0, 0), (r, w), members=members)
        for i, (r, w) in enumerate([(5, 2), (1, 1), (5, 2)])
    ]
    assert [sum(piece.nbytes for piece in share(slices, rank)) for rank in members] == [4, 4, 2, 5, 2, 4]
