"""Shares: replicas copy disjoint, balanced rows; what only one rank holds it copies itself."""

from __future__ import annotations

import pytest
from holdfast.snapshot.layout import Slice
from holdfast.snapshot.partition import bytes_of, chunk_rows, gridded, share


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


def grid(
    rows: int, width: int, chunk: int, members: tuple[int, ...] = (), first: int = 0, of: int | None = None
) -> Slice:
    """*rows* rows of *width* KiB, from row *first* of a tensor of *of* rows that is cut into boxes of *chunk* rows."""
    of = rows if of is None else of
    return Slice("t", "uint8", (of, width << 10), (first, 0), (rows, width << 10), "cpu", members, (chunk, width << 10))


@pytest.mark.parametrize(
    ("rows", "most", "spans", "expected"),
    [
        (10, 10, True, 10), (10, 11, False, 10), (10, 4, True, 4), (10, 3, True, 3), (9, 8, True, 5), (100, 99, True, 50),
        (12, 5, False, 4), (12, 6, False, 6), (13, 6, False, 1), (13, 9, False, 13), (22, 10, False, 2), (26, 12, False, 2),
        (34, 16, False, 2), (38, 18, False, 38), (1 << 30, 3 << 20, False, 1 << 21), (2**31 - 1, 1 << 24, False, 2**31 - 1),
    ],
)  # fmt: skip
def test_how_a_box_is_cut(rows: int, most: int, spans: bool, expected: int) -> None:
    """All pieces alike, but for the last of a tensor that is one box; pieces of less than an eighth are not worth it."""
    found = chunk_rows(rows, most, spans=spans)
    assert found == expected
    assert found <= max(most, rows if not spans else 0)
    assert spans or rows % found == 0


def test_what_is_not_shared_is_cut_at_64_mib() -> None:
    assert [s.chunk for s in gridded([grid(200, 1 << 10, 200)])] == [(50, 1 << 20)], (
        "of 200 MiB: four pieces, all alike"
    )
    assert [s.chunk for s in gridded([grid(100, 1 << 10, 100, of=200)])] == [(50, 1 << 20)]
    assert [s.chunk for s in gridded([grid(64, 1 << 10, 64)])] == [(64, 1 << 20)]
    assert [s.chunk for s in gridded([grid(2, 100 << 10, 2)])] == [(1, 100 << 20)], "a row is never cut"


def test_what_is_shared_is_cut_into_32_pieces_for_each_member() -> None:
    pair = (0, 1)
    assert gridded([grid(1 << 14, 1, 1 << 14, pair)])[0].chunk == (256, 1 << 10), "16 MiB"
    assert gridded([grid(1 << 10, 1, 1 << 10, pair)])[0].chunk == (64, 1 << 10), "not below 64 KiB"
    assert gridded([grid(8, 1 << 20, 8, pair)])[0].chunk == (1, 1 << 30), "not above 64 MiB, but for a single row"
    both = gridded([grid(1 << 13, 1, 1 << 13, pair), grid(1 << 13, 1, 1 << 13, pair)])
    assert [s.chunk for s in both] == [(256, 1 << 10)] * 2, "all that is shared counts together"


def test_all_groups_of_a_mesh_conclude_alike() -> None:
    """The last of three shards is shorter, and another empty; they are counted as what they would be at full length."""
    full, short = grid(2048, 1, 2048, (0, 3), 0, 5000), grid(904, 1, 2048, (2, 5), 4096, 5000)
    empty = grid(0, 1, 2048, (7, 9), 5000, 5000)
    assert gridded([full])[0].chunk == gridded([short])[0].chunk == gridded([empty])[0].chunk == (64, 1 << 10)


def test_shares_are_cut_at_chunks_and_stay_on_the_grid() -> None:
    tensor = grid(1000, 1, 1000, (0, 1, 2))
    parts = [share([tensor], rank) for rank in (0, 1, 2)]
    assert [[(s.start[0], s.rows, s.chunk) for s in part] for part in parts] == [
        [(0, 315, (63, 1 << 10))], [(315, 378, (63, 1 << 10))], [(693, 307, (63, 1 << 10))]
    ]  # fmt: skip
    assert all(piece.on_grid for part in parts for piece in part)


def test_a_scalar_and_an_empty_tensor_on_a_grid() -> None:
    scalar = Slice("s", "float32", (), (), (), members=(0, 1), chunk=())
    empty = Slice("e", "float32", (0, 3), (0, 0), (0, 3), members=(0, 1), chunk=(1, 3))
    assert share([scalar, empty], 0) == [scalar, empty]
    assert share([scalar, empty], 1) == []


def test_a_short_last_chunk_is_not_left_out() -> None:
    """Of one row where the others have three: it is less than half of a chunk, and still somebody's."""
    tail = Slice("t", "uint8", (7,), (6,), (1,), "cpu", (4, 5), (3,))
    assert [[p.rows for p in share([tail], rank)] for rank in (4, 5)] == [[], [1]]
    whole = Slice("t", "uint8", (7,), (0,), (7,), "cpu", (0, 1, 2), (3,))
    assert [[(p.start[0], p.rows) for p in share([whole], rank)] for rank in (0, 1, 2)] == [[(0, 3)], [], [(3, 4)]]
