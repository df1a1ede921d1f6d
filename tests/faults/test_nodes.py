"""P2 and P6 over nodes: any m of a group burn with their memory, at any instant, and training goes on bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.cluster import Cluster

MakeCluster = Callable[..., Cluster]


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Makes clusters, and removes them with all that they left."""
    made: list[Cluster] = []

    def make(*args: Any, **options: Any) -> Cluster:
        folder = tmp_path / f"cluster{len(made)}"
        folder.mkdir()
        cluster = Cluster(folder, *args, **options)
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.remove()


def _anywhere_in_a_step(cluster: Cluster, rng: random.Random) -> None:
    """Kills are to come anywhere between two snapshots."""
    time.sleep(rng.uniform(0, 3 * cluster.step_s))


def _lose_each(cluster: Cluster, patterns: list[tuple[int, ...]], rng: random.Random) -> None:
    """One cluster loses one set of nodes after the other, each as soon as it has a protected snapshot of its own."""
    cluster.begin()
    for pattern in rng.sample(patterns, len(patterns)):
        cluster.start(rng.sample(range(cluster.nodes), cluster.nodes))
        cluster.await_protected()
        _anywhere_in_a_step(cluster, rng)
        cluster.lose(*pattern)
        cluster.replace(*pattern)
    cluster.finish()
    began = cluster.judge()
    assert len(began) == len(patterns) + 1
    assert all(step > 0 for step in began[1:])


@pytest.mark.parametrize(("nodes", "strategy"), [(2, "fsdp2"), (3, "ddp"), (6, "fsdp2"), (8, "ddp")])
def test_any_node_is_lost(make_cluster: MakeCluster, rng: random.Random, nodes: int, strategy: str) -> None:
    cluster = make_cluster(nodes, f"{nodes - 1}+1", strategy)
    _lose_each(cluster, [(i,) for i in range(nodes)], rng)
    assert cluster.losses == nodes


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("nodes", "strategy"), [(3, "fsdp2"), (3, "ddp"), (6, "fsdp2"), (8, "fsdp2")])
def test_any_two_nodes_are_lost_at_once(
    make_cluster: MakeCluster, rng: random.Random, nodes: int, strategy: str
) -> None:
    """Of 8 nodes, pairs at every distance in the group, as 36 sets take minutes; all with HOLDFAST_THOROUGH."""
    cluster = make_cluster(nodes, f"{nodes - 2}+2", strategy)
    patterns = [p for count in (1, 2) for p in itertools.combinations(range(nodes), count)]
    if nodes == 8 and not os.environ.get("HOLDFAST_THOROUGH"):
        first = rng.randrange(nodes)
        patterns = [(first, (first + distance) % nodes) for distance in range(1, nodes)]
    _lose_each(cluster, patterns, rng)


@pytest.mark.parametrize(("nodes", "protect", "strategy"), [(2, "1+1", "ddp"), (3, "2+1", "fsdp2"), (4, "2+2", "ddp")])
def test_what_was_restored_is_protected_before_training_goes_on(
    make_cluster: MakeCluster, rng: random.Random, nodes: int, protect: str, strategy: str
) -> None:
    """As many nodes as before are lost once more, before there is a newer snapshot, and after ranks have moved."""
    cluster = make_cluster(nodes, protect, strategy)
    count = int(protect[-1])
    cluster.begin()
    cluster.start()
    cluster.await_protected()
    gone = list(range(nodes - count, nodes))
    for turn in range(1, nodes + 1):
        cluster.lose(*gone)
        cluster.replace(*gone)
        cluster.step_s = 1000.0  # training stands after its first step
        cluster.start([(rank + turn) % nodes for rank in range(nodes)])
        cluster.await_restored()
        gone = [(node + 1) % nodes for node in gone]
    cluster.end_ranks()
    cluster.step_s = 0.02
    cluster.finish()
    began = cluster.judge()
    assert min(began[1:]) > 0
