"""Several ranks behind ``torch.distributed.checkpoint``: FSDP2, meshes, other worlds, and all killed inside a save."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from holdfast.tests.hooks import dcp_worlds
from holdfast.tests.hooks.nodes import Node
from holdfast.tests.hooks.test_tiers import lost
from holdfast.tests.hooks.worlds import run_world


def test_fsdp2(shared: Node) -> None:
    for rank in run_world(dcp_worlds.there_and_back, 2, shared):
        assert rank == {"differed": True, "same": True, "goes on": True}


def test_other_worlds(node: Node, tmp_path: Path) -> None:
    """2-D to FSDP2 on half the ranks, in memory; then, from a tier alone, to one rank with no parallelism at all."""
    tier = str(tmp_path / "tier")
    whole, *_ = run_world(dcp_worlds.save_as, 4, node, ("fsdp2-tp", tier))
    for found in run_world(dcp_worlds.load_as, 2, node, ("fsdp2", tier)):
        assert found == whole
    (snapshot,) = (tmp_path / "tier/snapshots").iterdir()
    group = zarr.open_group(snapshot, mode="r")
    for name in ("model.up.weight", "model.down.weight", "optim.state.up.weight.exp_avg"):  # each is one array
        section, _, key = name.partition(".")
        wanted = whole[section]
        for step in ("state", "up.weight", "exp_avg") if section == "optim" else (key,):
            wanted = wanted[step]
        assert np.asarray(group[name]).tobytes().hex() == wanted[2]
    lost(node)
    assert run_world(dcp_worlds.load_as, 1, node, ("plain", tier)) == [whole]


def test_placements(shared: Node) -> None:
    assert run_world(dcp_worlds.placed, 4, shared) == [[], [], [], []]


def test_refusals_reach_all_ranks(shared: Node) -> None:
    for rank, said in enumerate(run_world(dcp_worlds.refused, 2, shared)):
        *apart, steps, value = said
        assert len(apart) == 3 - rank
        assert all("1 of 2 ranks save; all must" in one for one in apart)
        assert "ranks save one checkpoint as different steps: 5, 6" in steps
        assert "own1" in value
        assert "without pickle" in value


@pytest.mark.parametrize(
    "places",
    [
        ("capture.opened", "capture.opened"),
        ("fence.before-commit", "fence.before-commit"),
        ("fence.committed", "fence.before-commit"),  # one has it sealed: it must not stand in the way of the next
    ],
)
def test_all_ranks_die_inside_a_save(node: Node, places: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="a rank died"):
        run_world(dcp_worlds.killed, 2, node, places)
    for rank in run_world(dcp_worlds.after, 2, node):
        assert rank == [(2, 2, True), (3, 4, True)]
