"""Which bytes fill which rows: own image first, every row once, and a refusal that names what is missing."""

from __future__ import annotations

import pytest
from holdfast.errors import LayoutMismatch
from holdfast.snapshot.assembly import Read, assemble
from holdfast.snapshot.layout import Layout, Slice


def box(name: str, start: int, count: int, *, of: int = 8, width: int = 4) -> Slice:
    return Slice(name, "uint8", (of, width), (start, 0), (count, width))


def test_one_image_with_everything() -> None:
    layout = Layout.of(1, [box("a", 0, 8), box("b", 0, 8)])
    assert assemble([box("b", 0, 8), box("a", 0, 8)], {0: layout}, 0) == [
        Read(0, 0, 32, 1, 0, 8),
        Read(0, 64, 32, 0, 0, 8),
    ]


def test_own_image_first() -> None:
    """Both images hold such rows; what a rank holds alone (no members) is right in its own image only."""
    layouts = {0: Layout.of(1, [box("a", 0, 8)]), 1: Layout.of(1, [box("other", 0, 8), box("a", 0, 8)])}
    assert assemble([box("a", 0, 8)], layouts, 0) == [Read(0, 0, 32, 0, 0, 8)]
    assert assemble([box("a", 0, 8)], layouts, 1) == [Read(1, 64, 32, 0, 0, 8)]


def test_rows_from_several_images() -> None:
    layouts = {rank: Layout.of(1, [box("a", 2 * rank, 2)]) for rank in range(4)}
    assert assemble([box("a", 1, 6)], layouts, 3) == [
        Read(0, 4, 4, 0, 0, 1), Read(1, 0, 8, 0, 1, 2), Read(2, 0, 8, 0, 3, 2), Read(3, 0, 4, 0, 5, 1),
    ]  # fmt: skip


def test_what_lies_in_the_middle_leaves_two_gaps() -> None:
    layouts = {0: Layout.of(1, [box("a", 0, 8)]), 1: Layout.of(1, [box("a", 3, 2)])}
    assert assemble([box("a", 0, 8)], layouts, 1) == [
        Read(0, 0, 12, 0, 0, 3), Read(0, 20, 12, 0, 5, 3), Read(1, 0, 8, 0, 3, 2),
    ]  # fmt: skip


def test_scalars() -> None:
    scalar = Slice("s", "float64", (), (), ())
    assert assemble([scalar], {0: Layout.of(1, []), 1: Layout.of(1, [scalar])}, 0) == [Read(1, 0, 8, 0, 0, 1)]


def test_other_columns_do_not_fit() -> None:
    left = Slice("a", "uint8", (8, 4), (0, 0), (8, 2))
    right = Slice("a", "uint8", (8, 4), (0, 2), (8, 2))
    assert assemble([right], {0: Layout.of(1, [left]), 1: Layout.of(1, [right])}, 0) == [Read(1, 0, 16, 0, 0, 8)]
    with pytest.raises(LayoutMismatch, match=r"a: rows 0 to 8 of box \[0, 2\]\+\[8, 2\]"):
        assemble([right], {0: Layout.of(1, [left])}, 0)


def test_missing_rows_are_named() -> None:
    layouts = {0: Layout.of(1, [box("a", 2, 2)]), 1: Layout.of(1, [box("a", 6, 1)])}
    with pytest.raises(LayoutMismatch) as caught:
        assemble([box("a", 0, 8), box("gone", 0, 1)], layouts, 0)
    lines = str(caught.value).split("\n  ")
    assert lines[0] == "no image holds 4 parts of the state as this rank needs them:"
    assert [line.partition(" of box")[0] for line in lines[1:]] == [
        "a: rows 0 to 2", "a: rows 4 to 6", "a: rows 7 to 8", "gone: rows 0 to 1",
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
