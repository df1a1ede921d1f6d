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
        # Under a two-dimensional mesh several images hold what tensor parallelism replicates, of which one is enough.
        assert found["restored"]["proved_bytes"] > 0 or before[0] == "fsdp2-tp"
        if before[0] in ("fsdp2", "hsdp", "ddp-alike"):
            assert not any("whole on each" in line for line in found["logged"])
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


@pytest.mark.parametrize("after", [[6], [1, 5], [3, 0, 3]])
def test_stages_of_a_pipeline_are_regrouped(node: Node, after: list[int]) -> None:
    """Names stay the same, and are on other ranks; optimizer state and options follow them."""
    said = {"seed": 1, "train": True, "layers": [2, 4]}
    taken = {n: v for found in run_world(reshards.pipeline, 2, node, said) for n, v in found["state"].items()}
    said = {"seed": 2, "train": False, "layers": after}
    ranks = run_world(reshards.pipeline, len(after), node, said)
    assert [found["step"] for found in ranks] == [1] * len(after)
    assert {n: v for found in ranks for n, v in found["state"].items()} == taken


# -- parts ---------------------------------------------------------------------------------------------------------------


def parts(node: Node, **arguments: Any) -> tuple[dict[str, str], list[Any]]:
    """What an FSDP2 job of two ranks left behind, and what three ranks find that restore with these *arguments*."""
    taken = run_world(reshards.leave, 2, node, {"kind": "fsdp2"})
    return taken[0]["tensors"], run_world(reshards.some_of_it, 3, node, {"kind": "fsdp2", "arguments": arguments})


def untouched(found: dict[str, Any]) -> bool:
    """Nothing of the run but tensors has come back."""
    return bool(found["same streams"]) and found["lr"] == 0.5 and found["loader"] == {"position": 0}


def test_the_model_alone(node: Node) -> None:
    taken, ranks = parts(node, only="model.*")
    for found in ranks:
        assert found["step"] == 3
        assert found["tensors"] == {name: digest for name, digest in taken.items() if name.startswith("model.")}
        assert untouched(found)
        assert found["restored"]["fresh_streams"] == ()
        assert found["watermark"] is None  # a new run: no step of it is complete before its first beat


def test_names_may_be_others(node: Node) -> None:
    rename = {"model.up.": "model.down2.", "model.odd.weight": "model.even.weight"}
    taken, ranks = parts(node, strict=False, rename=rename)
    for found in ranks:
        told = found["restored"]
        assert set(told["missing"]) == {"model.up.weight", "model.up.bias", "model.odd.weight"}
        assert {name for name in told["unexpected"] if name.startswith("model.")} == {
            "model.down2.weight", "model.down2.bias", "model.even.weight",
        }  # fmt: skip
        for name in ("model.down.weight", "model.norm.bias"):
            assert found["tensors"][name] == taken[name]
        for name in told["missing"]:
            assert found["tensors"][name] == found["before"][name]
        assert untouched(found)


@pytest.mark.parametrize("arguments", [{"only": "model.*"}, None])
def test_what_never_was_complete_does_not_stand_in_the_way(node: Node, arguments: Any) -> None:
    """Whether part of the snapshot before it is restored, or nothing."""
    run_world(reshards.leave, 2, node, {"kind": "fsdp2", "torn": [1]})
    for found in run_world(reshards.some_of_it, 2, node, {"kind": "fsdp2", "arguments": arguments}):
        assert found["step"] == (3 if arguments else None)


def test_what_is_asked_for_has_to_be_there(node: Node) -> None:
    """Strictly: nothing is half-applied."""
    _, ranks = parts(node, only=["model.up.*", "model.last.*"], rename={"model.last.": "model.first."})
    for found in ranks:
        kind, message = found["step"]
        assert kind == "LayoutMismatch"
        assert "model.last.weight: in the live state, not in the snapshot" in message
        assert found["tensors"] == found["before"]
        assert untouched(found)


def test_what_each_rank_had_for_itself_is_told_of(node: Node) -> None:
    """It may be one tensor, or another one on each rank: some of it is lost then."""
    run_world(reshards.leave, 2, node, {"kind": "plain"})
    (found,) = run_world(reshards.come_back, 1, node, {"kind": "plain"})
    assert found["restored"]["proved_bytes"] == 0
    assert any("whole on each of several ranks" in line and "model.down.weight" in line for line in found["logged"]), (
        found["logged"]
    )
