"""Shares: replicas copy disjoint, balanced rows; what only one rank holds it copies itself."""

from __future__ import annotations

import pytest
from holdfast.snapshot.layout import Slice
from holdfast.snapshot.partition import bytes_of, share


def rows(name: str, count: int, width: int = 1, members: tuple[int, ...] = (), dtype: str = "uint8") -> Slice:
    return Slice(name, dtype, (count, width), (0, 0), (count, width), members=members)


def cuts(slices: list[Slice], members: tuple[int, ...]) -> list[list[tuple[str, int, int]]]:
    """What each member copies: name, first row, number of rows."""
    return [[(s.name, s.start[0] if s.start else 0, s.rows) for s in share(slices, rank)] for rank in members]


def test_what_nobody_shares_is_kept_whole() -> None:
    mine = [rows("a", 3), Slice("b", "float32", (), (), ()), rows("c", 0)]
    assert share(mine, 5) == mine


def test_replicas_cut_at_rows() -> None:
    assert cuts([rows("a", 10, 4, (0, 1))], (0, 1)) == [[("a", 0, 5)], [("a", 5, 5)]]
    assert cuts([rows("a", 3, 4, (0, 1))], (0, 1)) == [[("a", 0, 2)], [("a", 2, 1)]]


def test_slices_of_a_group_are_laid_end_to_end() -> None:
    """Not each cut by itself: one rank may copy all of one tensor, and the other all of another."""
    slices = [rows("a", 4, 10, (1, 4)), rows("b", 4, 10, (1, 4))]
    assert cuts(slices, (1, 4)) == [[("a", 0, 4)], [("b", 0, 4)]]


def test_a_single_row_goes_to_one_member() -> None:
    scalar = Slice("step", "float32", (), (), (), members=(0, 1, 2))
    shares = [share([scalar], rank) for rank in range(3)]
    assert sorted(map(len, shares)) == [0, 0, 1]
    assert [s for part in shares for s in part] == [scalar]


def test_many_scalars_are_spread() -> None:
    scalars = [Slice(f"step{i}", "float32", (), (), (), members=(0, 1)) for i in range(10)]
    assert [[s.name for s in share(scalars, rank)] for rank in (0, 1)] == [
        [f"step{i}" for i in range(5)], [f"step{i}" for i in range(5, 10)],
    ]  # fmt: skip


def test_an_empty_slice_is_named_by_the_first_member_only() -> None:
    empty = rows("empty", 0, 4, (2, 3))
    assert share([empty], 2) == [empty]
    assert share([empty], 3) == []
    flat = rows("flat", 4, 0, (2, 3))  # rows, yet no bytes
    assert [s.nbytes for s in share([flat], 2)] == [0]
    assert share([flat], 3) == []


def test_groups_are_cut_independently() -> None:
    slices = [rows("a", 2, 8, (0, 1)), rows("mine", 3), rows("b", 2, 8, (0, 2)), rows("c", 2, 8, (0, 1))]
    assert cuts(slices, (0,)) == [[("a", 0, 2), ("mine", 0, 3), ("b", 0, 1)]]
    assert cuts([slices[0], slices[3]], (1,)) == [[("c", 0, 2)]]
    assert cuts([slices[2]], (2,)) == [[("b", 1, 1)]]


def test_a_rank_that_is_no_member_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        share([rows("a", 2, 1, (0, 1))], 7)


def test_bytes() -> None:
    assert bytes_of([rows("a", 3, 5, dtype="float64"), Slice("b", "int16", (), (), ())]) == 122
    assert bytes_of([]) == 0
