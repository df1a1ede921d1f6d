"""A world of other ranks comes back while nodes are lost, die in the middle of it, or hold damaged images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from faults.cluster import Cluster
from faults.conftest import MakeCluster
from holdfast import Tier
from holdfast.tests.hooks import reshards
from holdfast.tests.hooks.nodes import Node
from holdfast.tests.hooks.worlds import run_world


def run(cluster: Cluster, scenario: Any, nodes: Sequence[int], kind: str = "fsdp2", **said: Any) -> list[Any]:
    """One rank on each of these nodes."""
    options = {"protect": cluster.protect, "tiers": list(cluster.tiers)}
    places = [str(cluster.there[node].shm) for node in nodes]
    until = "persisted" if cluster.tiers else "protected"
    said = {"kind": kind, "places": places, "options": options, "until": until, **said}
    return run_world(scenario, len(nodes), Node(cluster.job), said)


def check(taken: list[Any], back: list[Any]) -> None:
    for found in back:
        assert found["step"] == 3, found
        assert found["tensors"] == taken[0]["tensors"]
        assert (found["again"], found["same"]) == (5, True)


def test_a_node_is_gone_and_not_replaced(make_cluster: MakeCluster) -> None:
    """Its image is computed from the group, as far as it is needed, by whoever needs it."""
    cluster = make_cluster(4, "3+1")
    cluster.begin()
    taken = run(cluster, reshards.leave, range(4))
    cluster.lose(2)
    back = run(cluster, reshards.come_back, [0, 1, 3])
    check(taken, back)
    assert all(found["restored"]["pulled_bytes"] for found in back)


def test_more_nodes_come_back_than_there_were(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(4, "auto")
    cluster.begin()
    taken = run(cluster, reshards.leave, [0, 1])
    check(taken, run(cluster, reshards.come_back, [3, 2, 1, 0], kind="hsdp"))


@pytest.mark.parametrize("place", ["bulk.first-block=1", "bulk.mid-stream=1"])
def test_a_source_dies_while_it_is_read(make_cluster: MakeCluster, place: str) -> None:
    """What it had is computed from the group."""
    cluster = make_cluster(4, "3+1")
    cluster.begin()
    taken = run(cluster, reshards.leave, range(4))
    node = cluster.there.pop(2)
    cluster._kill_agent(node)
    cluster._start(2, node.generation, node.shm, place)
    cluster._await_ready(cluster.there[2])
    check(taken, run(cluster, reshards.come_back, [0, 1]))
    cluster.await_agent_death(2)


@pytest.mark.parametrize("place", ["restore.planned=1", "restore.inside-apply=1", "restore.applied=1"])
def test_a_rank_dies_while_it_comes_back(make_cluster: MakeCluster, place: str) -> None:
    cluster = make_cluster(3, "2+1")
    cluster.begin()
    taken = run(cluster, reshards.leave, range(3))
    with pytest.raises(AssertionError, match="a rank died"):
        run(cluster, reshards.come_back, [0, 1], crash=place)
    cluster.lose(2)
    check(taken, run(cluster, reshards.come_back, [1, 0], kind="ddp-alike"))


def test_what_is_protected_outlives_what_is_newer(make_cluster: MakeCluster) -> None:
    """The job goes back to a snapshot that all ranks have sealed, and that is not known to be protected; it is not overwritten
    at the cost of the one that is."""
    cluster = make_cluster(3, "2+1")
    cluster.begin()
    taken = run(cluster, reshards.leave, range(3), last="sealed")
    with pytest.raises(AssertionError, match="a rank died"):
        run(cluster, reshards.come_back, [0, 1], crash="capture.opened=1", all=True)
    cluster.lose(2)
    for found in run(cluster, reshards.come_back, [0, 1]):
        assert found["step"] == 2, found
        assert found["tensors"] == taken[0]["before"]


def test_a_part_comes_back_elsewhere(make_cluster: MakeCluster) -> None:
    """Ranks know of the images that were brought into their slots for it."""
    cluster = make_cluster(2, "auto")
    cluster.begin()
    taken = run(cluster, reshards.leave, [0, 1])
    for found in run(cluster, reshards.some_of_it, [1, 0], arguments={"only": "model.*"}):
        assert found["held"] == [3]
        assert {name: found["tensors"][name] for name in taken[0]["tensors"] if name.startswith("model.")} == {
            name: digest for name, digest in taken[0]["tensors"].items() if name.startswith("model.")
        }


@pytest.mark.parametrize("where", ["first byte", "last byte", "record", "checksums", "layout"])
def test_a_damaged_image_elsewhere(make_cluster: MakeCluster, where: str) -> None:
    cluster = make_cluster(3, "2+1")
    cluster.begin()
    taken = run(cluster, reshards.leave, range(3))
    cluster.placement = (0, 1, 2)
    assert cluster.flip(2, 3, where)
    check(taken, run(cluster, reshards.come_back, [0, 1]))


def test_power_is_cut(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Nothing is left but a tier that all nodes share."""
    cluster = make_cluster(3, "off", tiers=(Tier(f"file://{tmp_path}/tier", every=1),))
    cluster.begin()
    taken = run(cluster, reshards.leave, range(3))
    cluster.cut_power()
    cluster.begin()
    back = run(cluster, reshards.come_back, [0, 1], kind="ddp-alike")
    check(taken, back)
    assert all(found["restored"]["pulled_bytes"] for found in back)
