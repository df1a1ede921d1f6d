"""A node is lost, and not replaced: what ``torch.distributed.checkpoint`` saved is loaded by those that are left."""

from __future__ import annotations

from faults.conftest import MakeCluster
from holdfast.tests.hooks import dcp_worlds
from holdfast.tests.hooks.nodes import Node
from holdfast.tests.hooks.worlds import run_world


def test_a_node_is_gone_and_not_replaced(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(3, "2+1")
    cluster.begin()
    places = [str(cluster.there[node].shm) for node in range(3)]
    whole, *_ = run_world(dcp_worlds.save_protected, 3, Node(cluster.job), places)
    cluster.lose(1)
    for found, again in run_world(dcp_worlds.load_from_others, 2, Node(cluster.job), [places[2], places[0]]):
        assert found == whole
        assert again == whole
