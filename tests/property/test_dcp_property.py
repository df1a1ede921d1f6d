"""Grids of what DCP's planners cut: every box keeps to the grid that is found, and regular cuts find theirs."""

from __future__ import annotations

import itertools

from holdfast.hooks.dcp.plans import grid_of
from holdfast.snapshot.layout import Slice
from hypothesis import given
from hypothesis import strategies as st

lengths = st.lists(st.integers(1, 12), max_size=3)


def _boxes(cuts: list[list[int]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every box of the product of the ranges between *cuts*, along each dimension."""
    ranges = [list(itertools.pairwise(points)) for points in cuts]
    return [(tuple(a for a, _ in corner), tuple(b - a for a, b in corner)) for corner in itertools.product(*ranges)]


@given(lengths, st.data())
def test_every_box_keeps_to_the_grid(shape: list[int], data: st.DataObject) -> None:
    cuts = [sorted({0, n, *data.draw(st.sets(st.integers(0, n), max_size=3))}) for n in shape]
    boxes = _boxes(cuts)
    grid = grid_of(tuple(shape), boxes)
    if grid is not None:
        assert all(Slice("", "uint8", tuple(shape), start, extent, chunk=grid).on_grid for start, extent in boxes)
    if len(boxes) == 1:
        assert grid == tuple(shape)


@given(lengths, st.data())
def test_regular_cuts_are_found(shape: list[int], data: st.DataObject) -> None:
    steps = tuple(data.draw(st.integers(1, n)) for n in shape)
    boxes = _boxes([[*range(0, n, step), n] for n, step in zip(shape, steps, strict=True)])
    assert grid_of(tuple(shape), data.draw(st.permutations(boxes))) == steps
