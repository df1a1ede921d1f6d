"""Several ranks: who copies what, and that each gets back its own; layouts and verdicts that all must agree on."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import pytest
from holdfast.tests.hooks import worlds
from holdfast.tests.hooks.nodes import Node
from holdfast.tests.hooks.worlds import run_world


def _check(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["restored"] == 3
        assert rank["differed"]
        assert rank["same"], "the restored state differs from what was taken"
        assert rank["goes on"], "training goes on differently"


def _parts(ranks: list[dict[str, Any]]) -> dict[tuple[str, Any], list[tuple[int, Any, Any]]]:
    """Of everything that is shared: who copies which rows."""
    found: dict[tuple[str, Any], list[tuple[int, Any, Any]]] = defaultdict(list)
    for rank, entry in enumerate(ranks):
        for name, start, extent, _, members in entry["layout"]:
            if members:
                assert rank in members
                found[name, (members, start[1:], extent[1:])].append((rank, start, extent))
    return found


def _check_shares(ranks: list[dict[str, Any]], members: int) -> None:
    """The shares of replicas are disjoint, without gaps, and balanced: within a chunk, which is a whole tensor as small as
    these."""
    parts = _parts(ranks)
    assert parts
    for (name, _), shares in parts.items():
        rows = sorted((start[0], start[0] + extent[0]) for _, start, extent in shares if extent)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows)), f"{name}: {rows}"
        assert all(extent for _, _, extent in shares) or len(shares) == 1, (
            f"{name}: a scalar copied {len(shares)} times"
        )
    widest = 2 * max(math.prod(p[2]) * 4 for entry in ranks for p in entry["layout"] if p[4])
    for group in {p[4] for entry in ranks for p in entry["layout"] if p[4]}:
        assert len(group) == members
        shared = [sum(p[3] for p in ranks[rank]["layout"] if p[4] == group) for rank in group]
        assert max(shared) - min(shared) <= widest, shared


@pytest.mark.parametrize("world", [2, 4])
def test_ddp(node: Node, world: int) -> None:
    ranks = run_world(worlds.ddp, world, node)
    _check(ranks)
    _check_shares(ranks, world)
    whole = {p[0] for entry in ranks for p in entry["layout"] if p[4]}
    assert {n for n in whole if n.startswith("model.")} == {
        f"model.{n}" for n in ("up.weight", "up.bias", "down.weight", "down.bias", "odd.weight", "last.weight",
                               "last.bias", "norm.weight", "norm.bias")
    }  # fmt: skip
    shared = [sum(p[3] for p in entry["layout"] if p[4]) for entry in ranks]
    # Parameters and two moments of each, and one step count per parameter: copied once between all.
    parameters = 6 * 8 + 8 + 8 * 7 + 7 + 7 * 5 + 5 * 6 + 6 + 6 + 6
    assert sum(shared) == 3 * 4 * parameters + 4 * 9
    # Buffers are each rank's own, and differ, since the batches do.
    for entry in ranks:
        own = [p[0] for p in entry["layout"] if not p[4]]
        assert own == ["model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"]
    assert len({str(entry["taken"][""]["module.norm.running_mean"]) for entry in ranks}) == world
    assert len({str(entry["rng"]) for entry in ranks}) == world


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp2_with_uneven_shards(node: Node, world: int) -> None:
    ranks = run_world(worlds.fsdp2, world, node)
    _check(ranks)
    rows = [next((p[2][0] for p in entry["layout"] if p[0] == "model.odd.weight"), 0) for entry in ranks]
    assert rows == ([3, 2] if world == 2 else [2, 2, 1, 0])
    assert len({str(entry["rng"]) for entry in ranks}) == world


def test_hsdp(node: Node) -> None:
    """Shards are shared out between their replicas: ranks 0 and 2, 1 and 3."""
    ranks = run_world(worlds.hsdp, 4, node)
    _check(ranks)
    _check_shares(ranks, 2)
    assert {p[4] for entry in ranks for p in entry["layout"] if p[0].startswith("model.")} == {(0, 2), (1, 3)}


def test_tensor_parallel(node: Node) -> None:
    """Sharded weights are each rank's own; the bias of a row-wise layer is replicated."""
    ranks = run_world(worlds.tensor_parallel, 2, node)
    _check(ranks)
    members = {p[0]: p[4] for entry in ranks for p in entry["layout"]}
    assert members["model.up.weight"] == members["model.down.weight"] == ()
    assert members["model.down.bias"] == (0, 1)
    extents = [next(p[2] for p in entry["layout"] if p[0] == "model.down.weight") for entry in ranks]
    assert extents == [(7, 4), (7, 4)]


def test_fsdp2_and_tensor_parallel(node: Node) -> None:
    _check(run_world(worlds.fsdp2_and_tensor_parallel, 4, node))


def test_replicas_that_do_not_agree(node: Node) -> None:
    """Said aloud, and each keeps and gets back its own."""
    ranks = run_world(worlds.disagreeing, 2, node)
    for rank in ranks:
        assert rank["restored"] == 2
        assert rank["same"]
        assert any("[0, 1]" in line and "same bytes" in line for line in rank["logged"])
        assert not any(p[4] for p in rank["layout"])
    assert ranks[0]["taken"][""]["module.odd.weight"] != ranks[1]["taken"][""]["module.odd.weight"]


def test_layouts_that_change(node: Node) -> None:
    ranks = run_world(worlds.changing, 2, node)
    assert ranks[0]["taken"] == ranks[1]["taken"]
    assert ranks[0]["watermarks"] == ranks[1]["watermarks"] == sorted(ranks[0]["watermarks"])
    for rank in ranks:
        taken = rank["taken"]
        assert taken[0] <= 4, f"after the optimizer's state appeared: {rank}"
        assert 8 not in taken
        assert {21, 22, 23} <= set(taken), f"after the slots have grown: {rank}"
        assert rank["restored"] == 23
        assert rank["same"]


def test_a_copy_torn_on_one_rank(node: Node) -> None:
    ranks = run_world(worlds.torn_on_one, 2, node)
    for rank in ranks:
        assert rank["restored"] == 2
        assert rank["same"]
        assert 5 in rank["taken"], rank
    assert 3 not in ranks[1]["taken"]
    assert ranks[1]["skipped"]["torn"] == 1
    assert ranks[0]["skipped"].get("discarded-elsewhere") == 1


def test_a_refusal_on_one_rank_is_heard_on_all(node: Node) -> None:
    told = run_world(worlds.refused_on_one, 2, node)
    assert told[0][0] == "PeerFailed"
    assert "rank 1 failed: StateRefused" in told[0][1]
    assert told[1][0] == "StateRefused"
    assert "extras.odd" in told[1][1]
