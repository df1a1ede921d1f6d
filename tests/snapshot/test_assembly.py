"""Which parts of which images fill which boxes: own image first, every element once, and a refusal that names what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from holdfast.errors import LayoutMismatch
from holdfast.snapshot.assembly import Read, assemble
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.regions import Box


def box(name: str, start: int, count: int, *, of: int = 8, width: int = 4) -> Slice:
    return Slice(name, "uint8", (of, width), (start, 0), (count, width))


def rows(rank: int, index: int, target: int, start: int, count: int) -> Read:
    return Read(rank, index, target, Box((start, 0), (count, 4)))


def test_one_image_with_everything() -> None:
    layout = Layout.of(1, [box("a", 0, 8), box("b", 0, 8)])
    assert assemble([box("b", 0, 8), box("a", 0, 8)], {0: layout}, 0) == [rows(0, 0, 1, 0, 8), rows(0, 1, 0, 0, 8)]


def test_own_image_first_then_near_ones() -> None:
    """All images hold such rows; what a rank holds alone (no members) is right in its own image only."""
    layouts = {rank: Layout.of(1, [box("a", 0, 8)]) for rank in range(4)}
    assert assemble([box("a", 0, 8)], layouts, 1) == [rows(1, 0, 0, 0, 8)]
    assert assemble([box("a", 0, 8)], layouts, 7) == [rows(0, 0, 0, 0, 8)]
    assert assemble([box("a", 0, 8)], layouts, 7, near={2, 3}) == [rows(2, 0, 0, 0, 8)]


def test_replicas_take_the_same_image() -> None:
    layouts = {rank: Layout.of(1, [box("a", 0, 8)]) for rank in range(3)}
    wanted = [replace(box("a", 0, 8), members=(1, 2))]
    for rank in (1, 2):
        assert assemble(wanted, layouts, rank, near={2}, alike=True) == [rows(0, 0, 0, 0, 8)]
        assert assemble(wanted, layouts, rank) == [rows(rank, 0, 0, 0, 8)]


def test_rows_from_several_images() -> None:
    layouts = {rank: Layout.of(1, [box("a", 2 * rank, 2)]) for rank in range(4)}
    assert assemble([box("a", 1, 6)], layouts, 3) == [
        rows(0, 0, 0, 1, 1), rows(1, 0, 0, 2, 2), rows(2, 0, 0, 4, 2), rows(3, 0, 0, 6, 1),
    ]  # fmt: skip


def test_what_lies_in_the_middle_leaves_two_gaps() -> None:
    layouts = {0: Layout.of(1, [box("a", 0, 8)]), 1: Layout.of(1, [box("a", 3, 2)])}
    assert assemble([box("a", 0, 8)], layouts, 1) == [rows(0, 0, 0, 0, 3), rows(0, 0, 0, 5, 3), rows(1, 0, 0, 3, 2)]


def test_scalars() -> None:
    scalar = Slice("s", "float64", (), (), ())
    assert assemble([scalar], {0: Layout.of(1, []), 1: Layout.of(1, [scalar])}, 0) == [Read(1, 0, 0, Box((), ()))]


def test_a_name_alone_is_no_tensor() -> None:
    """Each rank may have had one of its own, as stages of a pipeline that number their layers alike."""
    theirs = [replace(box("a", 0, 8), dtype="int16"), box("a", 0, 8, width=5), box("a", 0, 8, of=9)]
    layouts = {rank: Layout.of(1, [piece]) for rank, piece in enumerate([*theirs, box("a", 0, 8)])}
    assert assemble([box("a", 0, 8)], layouts, 0) == [rows(3, 0, 0, 0, 8)]
    del layouts[3]
    with pytest.raises(LayoutMismatch, match=r"a: \[0, 0\]\+\[8, 4\]"):
        assemble([box("a", 0, 8)], layouts, 0)


def test_columns_from_several_images() -> None:
    left = Slice("a", "uint8", (8, 4), (0, 0), (8, 2))
    right = Slice("a", "uint8", (8, 4), (0, 2), (8, 2))
    layouts = {0: Layout.of(1, [left]), 1: Layout.of(1, [right])}
    assert assemble([right], layouts, 0) == [Read(1, 0, 0, Box((0, 2), (8, 2)))]
    assert assemble([box("a", 2, 3)], layouts, 0) == [
        Read(0, 0, 0, Box((2, 0), (3, 2))), Read(1, 0, 0, Box((2, 2), (3, 2))),
    ]  # fmt: skip
    with pytest.raises(LayoutMismatch, match=r"a: \[0, 2\]\+\[8, 2\] of \[8, 4\]"):
        assemble([right], {0: Layout.of(1, [left])}, 0)


def test_missing_parts_are_named() -> None:
    layouts = {0: Layout.of(1, [box("a", 2, 2)]), 1: Layout.of(1, [box("a", 6, 1)])}
    with pytest.raises(LayoutMismatch) as caught:
        assemble([box("a", 0, 8), box("gone", 0, 1)], layouts, 0)
    assert str(caught.value).split("\n  ") == [
        "no image holds 4 parts of the state as this rank needs them:",
        "a: [0, 0]+[2, 4] of [8, 4]", "a: [4, 0]+[2, 4] of [8, 4]", "a: [7, 0]+[1, 4] of [8, 4]",
        "gone: [0, 0]+[1, 4] of [8, 4]",
    ]  # fmt: skip


def test_only_so_many_are_shown() -> None:
    with pytest.raises(LayoutMismatch) as caught:
        assemble([box(f"gone{i}", 0, 1) for i in range(50)], {0: Layout.of(1, [])}, 0)
    assert str(caught.value).startswith("no image holds 50 parts")
    assert str(caught.value).count("\n") == 20


def test_an_empty_box_that_nobody_holds_needs_nothing() -> None:
    assert assemble([box("a", 0, 0, of=0)], {0: Layout.of(1, [])}, 0) == []


@pytest.mark.parametrize(
    ("wanted", "held"),
    [
        (box("a", 0, 0, of=0), box("a", 0, 0, of=0)),  # an empty tensor, as it was
        (box("a", 3, 0, of=3), box("a", 0, 3, of=3)),  # FSDP2: fewer rows than ranks leave some with an empty shard
    ],
)
def test_an_empty_box_that_somebody_holds_needs_nothing(wanted: Slice, held: Slice) -> None:
    assert assemble([wanted], {0: Layout.of(1, [held])}, 0) == []
