"""Who is a replica of whom: declared, then checked against the bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from holdfast.snapshot.layout import Slice
from holdfast.snapshot.replicas import GROUPS, VECTOR_LENGTH, confirmed, content_sum, disagreeing, sums
from holdfast.snapshot.state import Item


def item(name: str, tensor: torch.Tensor, members: tuple[int, ...]) -> Item:
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Item(Slice(name, dtype, shape, (0,) * len(shape), shape, "cpu", members), tensor, tensor, True)


def test_equal_bytes_are_confirmed() -> None:
    ranks = [[item("a", torch.ones(3, 2), (0, 1)), item("b", torch.zeros(2), ())] for _ in range(2)]
    gathered = [sums(items) for items in ranks]
    for rank, items in enumerate(ranks):
        held, split = confirmed([i.slice for i in items], gathered, rank)
        assert split == []
        assert [piece.members for piece in held] == [(0, 1), ()]


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, 1.0 + 1e-7]),
        torch.tensor([1, 1], dtype=torch.int32),
        torch.ones(2, 1),
        torch.tensor([1.0, float("nan")]),
    ],
    ids=["value", "dtype", "shape", "nan"],
)
def test_any_difference_splits_the_group(other: torch.Tensor) -> None:
    ranks = [[item("a", torch.ones(2), (0, 1))], [item("a", other, (0, 1))]]
    gathered = [sums(items) for items in ranks]
    for rank, items in enumerate(ranks):
        held, split = confirmed([i.slice for i in items], gathered, rank)
        assert split == [(0, 1)]
        assert [piece.members for piece in held] == [()]


def test_names_and_order_count() -> None:
    a, b = item("a", torch.ones(1), (0, 1)), item("b", torch.zeros(1), (0, 1))
    assert sums([a, b]) != sums([b, a])
    assert sums([a]) != sums([item("c", torch.ones(1), (0, 1))])


def test_one_group_may_split_and_another_hold() -> None:
    def rank(value: float) -> list[Item]:
        return [item("a", torch.full((2,), value), (0, 1)), item("b", torch.ones(1), (0, 1, 2))]

    gathered = [sums(rank(1.0)), sums(rank(2.0)), sums([item("b", torch.ones(1), (0, 1, 2))])]
    held, split = confirmed([i.slice for i in rank(1.0)], gathered, 0)
    assert split == [(0, 1)]
    assert [piece.members for piece in held] == [(), (0, 1, 2)]
    assert disagreeing(gathered, [(0, 1, 2)]) == []


def test_a_rank_that_says_nothing_splits_its_groups() -> None:
    items = [item("a", torch.ones(2), (0, 1))]
    held, split = confirmed([i.slice for i in items], [sums(items), sums([])], 0)
    assert split == [(0, 1)]
    assert held[0].members == ()


def test_more_groups_than_fit_are_not_shared() -> None:
    items = [item(f"t{g}", torch.ones(1), (0, g)) for g in range(1, GROUPS + 3)]
    vector = sums(items)
    assert len(vector) == VECTOR_LENGTH
    everyone = [sums([i for i in items if rank in i.slice.members]) for rank in range(GROUPS + 3)]
    held, _ = confirmed([i.slice for i in items], everyone, 0)
    assert sum(bool(piece.members) for piece in held) == GROUPS


def test_vectors_are_int64() -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        assert all(-1 <= number < 1 << 63 for number in sums([item("a", torch.randn(3), (0, 1, seed + 2))]))


def test_content_does_not_depend_on_strides() -> None:
    dense = torch.randn(4, 6, dtype=torch.bfloat16)
    assert content_sum(dense) == content_sum(dense.t().contiguous().t())
    assert content_sum(dense) != content_sum(dense.t())


def gridded(name: str, members: tuple[int, ...], value: float = 1.0, rows: int = 4) -> Item:
    made = item(name, torch.full((rows,), value), members)
    return replace(made, slice=replace(made.slice, chunk=(rows,)))


def grids(ranks: list[list[Item]]) -> list[list[tuple[int, ...] | None]]:
    """The chunks that each rank's slices keep."""
    gathered = [sums(items) for items in ranks]
    return [[s.chunk for s in confirmed([i.slice for i in items], gathered, r)[0]] for r, items in enumerate(ranks)]


def test_grids_stay_where_all_agree() -> None:
    ranks = [[gridded("a", (r % 2, r % 2 + 2)), gridded("b", ())] for r in range(4)]
    assert grids(ranks) == [[(4,), (4,)]] * 4


def test_no_rank_keeps_the_grid_of_what_some_replicas_hold_alone() -> None:
    """Ranks 0 and 2 differ in their shard; 1 and 3 agree on theirs, and must not be the only ones in the array."""
    ranks = [[gridded("a", (r % 2, r % 2 + 2), value=float(r == 2)), gridded("b", ())] for r in range(4)]
    assert grids(ranks) == [[None, (4,)]] * 4


def test_no_rank_uses_grids_that_others_see_otherwise() -> None:
    for other in (gridded("a", (), rows=5), gridded("c", ()), item("a", torch.ones(4), ())):
        assert grids([[gridded("a", ())], [gridded("a", ())], [other]]) == [[None]] * 3
    assert grids([[gridded("a", ())], [gridded("a", (), value=3.0)]]) == [[(4,)]] * 2, "only the grid counts"
    assert grids([[gridded("a", ())], [gridded("a", ()), item("own", torch.ones(2), ())]])[0] == [(4,)]


def test_more_groups_than_can_be_compared_have_no_grid() -> None:
    for count, kept in ((GROUPS - 1, True), (GROUPS, False), (GROUPS + 1, False)):
        ranks = [[gridded(f"t{g}", (0, 1, *range(2, 2 + g))) for g in range(count)]] * (2 + count)
        assert all((chunk is not None) is kept for rank in grids(ranks) for chunk in rank)
