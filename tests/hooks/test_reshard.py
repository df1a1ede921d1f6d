"""A job comes back with other ranks, meshes or parallel layouts, straight from memory."""

from __future__ import annotations

from typing import Any

import pytest
from holdfast.tests.hooks import reshards
from holdfast.tests.hooks.nodes import Node
from holdfast.tests.hooks.worlds import run_world


def change(node: Node, before: tuple[str, int], after: tuple[str, int]) -> tuple[list[Any], list[Any]]:
    (kind, world), (its, there) = before, after
    return (
        run_world(reshards.leave, world, node, {"kind": kind}),
        run_world(reshards.come_back, there, node, {"kind": its}),
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 4), ("fsdp2", 2)),
        (("fsdp2", 2), ("fsdp2", 3)),
        (("fsdp2", 3), ("ddp-alike", 2)),
        (("ddp-alike", 2), ("fsdp2", 3)),
        (("ddp-alike", 3), ("plain", 1)),
        (("hsdp", 4), ("fsdp2", 3)),
        (("fsdp2", 2), ("hsdp", 4)),
        (("tp", 2), ("tp", 4)),
        (("fsdp2-tp", 4), ("fsdp2", 2)),
        (("fsdp2", 2), ("fsdp2-tp", 4)),
        (("fsdp2-tp", 4), ("tp", 4)),
        (("fsdp2", 4), ("hsdp", 4)),
    ],
)
def test_every_tensor_comes_back(node: Node, before: tuple[str, int], after: tuple[str, int]) -> None:
    taken, back = change(node, before, after)
    for rank, found in enumerate(back):
        assert found["step"] == 3, found
        assert found["tensors"] == taken[0]["tensors"]
        assert found["lr"] == taken[0]["lr"]
        assert found["loader"] == {"rank": rank % before[1], "position": 7}
        assert (found["again"], found["same"]) == (5, True)
        assert found["restored"]["world"] == before[1]
        if rank < before[1]:
            assert found["draws"] == taken[rank]["draws"]


def test_new_ranks_draw_from_streams_of_their_own(node: Node) -> None:
    taken, back = change(node, ("fsdp2", 2), ("fsdp2", 4))
    assert all(found["restored"]["fresh_streams"] == (2, 3) for found in back)
    drawn = [tuple(found["draws"]) for found in back]
    assert drawn[:2] == [tuple(found["draws"]) for found in taken]
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == 4
    again = run_world(reshards.come_back, 4, node, {"kind": "fsdp2"})
    assert [found["step"] for found in again] == [5] * 4
    assert [found["restored"]["fresh_streams"] for found in again] == [()] * 4


def test_ranks_that_draw_alike_go_on_so(node: Node) -> None:
    """As those of tensor parallelism do: their dropout masks are one mask."""
    taken, back = change(node, ("tp", 2), ("tp", 4))
    assert all(found["draws"] == taken[0]["draws"] for found in back)
    assert all(found["restored"]["fresh_streams"] == () for found in back)
