"""P2 and P6 over nodes: any m of a group burn with their memory, at any instant, and training goes on bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from faults.cluster import Cluster
from faults.conftest import MakeCluster
from holdfast.ops import certs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
AGENT_PLACES = [
    "bulk.first-block=1",
    "bulk.first-block=12",
    "bulk.mid-stream=1",
    "bulk.mid-stream=12",
    "combine.mid-stripe=1",
    "combine.mid-stripe=20",
    "parity.before-record=1",
    "parity.before-record=4",
    "parity.sealed=1",
    "parity.sealed=4",
    "seal.before-record=3",
    "seal.after-record=3",
]
REBUILD_PLACES = ["rebuild.begun=1", "combine.mid-stripe=1", "rebuild.verified=1"]
TRAINER_PLACES = [
    "capture.opened=3",
    "capture.copied=3",
    "fence.before-commit=3",
    "fence.committed=3",
    "guarded.heard=1",
    "guarded.heard=4",
    "complete.unmarked=1",
    "complete.unmarked=3",
    "complete.marked=1",
    "complete.marked=3",
    "restore.planned=1",
    "restore.inside-apply=1",
    "restore.applied=1",
]


def _anywhere_in_a_step(cluster: Cluster, rng: random.Random) -> None:
    """Kills are to come anywhere between two snapshots."""
    time.sleep(rng.uniform(0, 3 * cluster.step_s))


def _lose_each(cluster: Cluster, patterns: list[tuple[int, ...]], rng: random.Random) -> None:
    """One cluster loses one set of nodes after the other, each as soon as it has a protected snapshot of its own."""
    cluster.begin()
    for pattern in rng.sample(patterns, len(patterns)):
        moved = rng.sample(range(cluster.nodes), cluster.nodes)
        cluster.start([moved[node] for node in cluster.placement])
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


@pytest.mark.parametrize(("nodes", "strategy"), [(3, "fsdp2"), (3, "ddp"), (6, "fsdp2"), (8, "fsdp2")])
def test_any_two_nodes_are_lost_at_once(
    make_cluster: MakeCluster, rng: random.Random, nodes: int, strategy: str
) -> None:
    """Of 6 and 8 nodes only pairs at every distance in the group: all sets take minutes, and are for HOLDFAST_THOROUGH. (How
    each is rebuilt is tested with agents alone, in tests/agent/test_rebuild.py.)
    """
    cluster = make_cluster(nodes, f"{nodes - 2}+2", strategy)
    patterns = [p for count in (1, 2) for p in itertools.combinations(range(nodes), count)]
    if nodes > 3 and not os.environ.get("HOLDFAST_THOROUGH"):
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


def _partner(cluster: Cluster, victim: int, lost: set[int], rng: random.Random) -> int:
    """A second node to lose with *victim*. While what was lost before is not protected again, it is one of those."""
    others = set(range(cluster.nodes)) if cluster.settled else lost
    return rng.choice(sorted(others - {victim}))


def test_an_agent_dies_at_a_named_place_and_another_node_with_it(make_cluster: MakeCluster, rng: random.Random) -> None:
    cluster = make_cluster(4, "2+2", "fsdp2")
    cluster.begin()
    cluster.start()
    cluster.await_protected()
    lost = set(rng.sample(range(4), 2))
    for place in rng.sample(AGENT_PLACES, len(AGENT_PLACES)):
        victim = rng.choice(sorted(lost))
        print(f"then {lost} are lost; agent of {victim} dies at {place}")
        cluster.lose(*lost)
        cluster.replace(*lost, crash={victim: place})
        cluster.start(rng.sample(range(4), 4))
        cluster.await_agent_death(victim)
        lost = {victim, _partner(cluster, victim, lost, rng)}
    cluster.lose(*lost)
    cluster.replace(*lost)
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_second_node_is_lost_while_the_first_is_rebuilt(
    make_cluster: MakeCluster, rng: random.Random, strategy: str
) -> None:
    """What has replaced the first dies in the middle of it, and so does another."""
    cluster = make_cluster(4, "2+2", strategy)
    cluster.begin()
    for place in REBUILD_PLACES:
        cluster.start()
        cluster.await_protected(2)  # of this life, so that images are where their ranks are, and nowhere else
        first, second = rng.sample(range(4), 2)
        cluster.lose(first)
        cluster.replace(first, crash={first: place})
        cluster.start()
        cluster.await_agent_death(first)
        assert not cluster.settled
        cluster.lose(first, second)
        cluster.replace(first, second)
    cluster.finish()
    assert min(cluster.judge()[2::2]) > 0


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_nodes_are_lost_while_others_are_restored(make_cluster: MakeCluster, rng: random.Random, strategy: str) -> None:
    """A second loss at any instant of a restart: before, during and after the restore, and once training goes on."""
    cluster = make_cluster(6, "4+2", strategy)
    cluster.begin()
    cluster.start()
    cluster.await_protected()
    lost, exposed = {rng.randrange(6)}, set[int]()
    for _ in range(6):
        cluster.lose(*lost)
        cluster.replace(*lost)
        cluster.start(rng.sample(range(6), 6))
        time.sleep(rng.uniform(0, 3.0))
        exposed = set() if cluster.settled else exposed | lost  # two in all may be, before all is protected again
        others = sorted(set(range(6)) - exposed)
        lost = set(rng.sample(others, rng.randint(not exposed, 2 - len(exposed))))
        lost |= set(rng.sample(sorted(exposed), rng.randint(not lost, len(exposed))))
    cluster.lose(*lost)
    cluster.replace(*lost)
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


def test_a_trainer_dies_at_a_named_place_and_two_nodes_with_it(make_cluster: MakeCluster, rng: random.Random) -> None:
    cluster = make_cluster(4, "2+2", "ddp")
    cluster.begin()
    cluster.start()
    cluster.await_protected()
    lost = set(rng.sample(range(4), 2))
    for place in rng.sample(TRAINER_PLACES, len(TRAINER_PLACES)):
        cluster.lose(*lost)
        cluster.replace(*lost)
        placement = rng.sample(range(4), 4)
        victim = rng.choice(sorted(lost))
        rank = placement.index(victim)
        print(f"{lost} were lost; rank {rank} on {victim} dies at {place}")
        cluster.start(placement, crash={rank: place})
        cluster.await_rank_death(rank)
        lost = {victim, _partner(cluster, victim, lost, rng)}
    cluster.lose(*lost)
    cluster.replace(*lost)
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


# -- more than m ---------------------------------------------------------------------------------------------------------


def test_more_than_m_nodes_are_lost(make_cluster: MakeCluster, rng: random.Random) -> None:
    """Nobody starts from scratch by accident: the refusal names the snapshot, the group and what is missing."""
    cluster = make_cluster(4, "2+2")
    cluster.begin()
    cluster.start()
    step = cluster.await_protected(2)
    gone = sorted(rng.sample(range(4), 3))
    cluster.lose(*gone)
    cluster.replace(*gone)
    cluster.start()
    cluster.await_end(1)
    said = cluster.errors()
    found = re.search(r"passed over \w+/(\d+): 3 of 4 images cannot be had: (.*); the group of (.*)", said)
    assert found is not None, said
    assert int(found[1]) >= step
    assert found[2] == ", ".join(f"rank {rank} missing" for rank in gone)
    assert "ranks 0, 1, 2, 3 survives the loss of 2 of its 4 members" in found[3]
    assert f"the images of ranks {', '.join(map(str, gone))} are lost, and the parity of 3 members" in found[3]
    assert f"/{found[1]} was complete and cannot be had" in said


def _two_protected(cluster: Cluster) -> tuple[int, int]:
    """Have two snapshots protected, and none newer begun; returns their steps, the older first."""
    cluster.begin()
    for _ in range(20):  # what was sealed everywhere when a life ended, and by then was not protected, does not count
        cluster.start()
        cluster.await_protected(2)
        cluster.end_ranks()
        cluster.start(crash=dict.fromkeys(range(cluster.world), "capture.before-open=1"))
        for rank in range(cluster.world):
            cluster.await_rank_death(rank)
        steps = set.intersection(*(cluster.complete(index) for index in cluster.there))
        if len(steps) == 2:
            return min(steps), max(steps)
    raise AssertionError(f"there never were two\n{cluster.errors()}")


def test_what_cannot_be_rebuilt_gives_way_to_what_can(make_cluster: MakeCluster, rng: random.Random) -> None:
    """Parity of the newest snapshot is damaged, and a node is lost: the older snapshot comes back, and is said to be older."""
    cluster = make_cluster(3, "2+1")
    older, newest = _two_protected(cluster)
    gone = rng.randrange(3)
    for index in {0, 1, 2} - {gone}:
        assert cluster.flip(index, newest, "first byte", "lane") == 1
    cluster.lose(gone)
    cluster.replace(gone)
    cluster.finish()
    assert cluster.judge()[-1] == older
    assert f"/{newest} was complete and cannot be had: 1 of 3 images cannot be had: rank {gone}" in cluster.errors()


# -- damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "strategy"),
    [
        *((where, "fsdp2") for where in ("first byte", "last byte", "checksums", "layout", "record")),
        ("last byte", "ddp"),
    ],
)
def test_flipped_bits_in_a_slot_are_repaired_from_the_group(
    make_cluster: MakeCluster, rng: random.Random, where: str, strategy: str
) -> None:
    cluster = make_cluster(3, "2+1", strategy)
    _, newest = _two_protected(cluster)
    node = rng.randrange(3)
    assert cluster.flip(node, newest, where) == 1
    cluster.finish()
    assert cluster.judge()[-1] == newest
    if where != "record":  # without it, nobody knows of damage: there is nothing
        assert cluster.status(node).group.damaged == 1


@pytest.mark.parametrize("loss", [False, True])
def test_flipped_bits_in_parity_are_an_erasure(make_cluster: MakeCluster, rng: random.Random, loss: bool) -> None:
    """One node's parity and, of another node, all: two of two that may be."""
    cluster = make_cluster(4, "2+2")
    _, newest = _two_protected(cluster)
    damaged, gone = rng.sample(range(4), 2)
    assert cluster.flip(damaged, newest, "first byte", "lane") == 1
    if loss:
        cluster.lose(gone)
        cluster.replace(gone)
    cluster.finish()
    assert cluster.judge()[-1] == newest
    assert sum(cluster.status(index).group.damaged for index in range(4)) > 0


def test_bits_flipped_on_the_wire_are_refused_and_sent_again(make_cluster: MakeCluster, rng: random.Random) -> None:
    """Blocks for parity while training goes on, then blocks of a lost image."""
    cluster = make_cluster(3, "2+1")
    cluster.begin()
    links = [cluster.link(index) for index in range(3)]
    cluster.start()
    cluster.await_protected()
    for count in range(1, 7):  # one at a time: what is damaged twice counts as damaged where it comes from
        rng.choice(links).flip()
        cluster.until("refusal", lambda: _damaged(cluster) == count)  # noqa: B023 - called at once
    cluster.await_protected(len(_protected(cluster)) + 1)
    gone = rng.randrange(3)
    cluster.lose(gone)
    cluster.replace(gone)
    del links[gone]
    before, flipped = _damaged(cluster), sum(link.flipped for link in links)
    for link in links:
        link.flip()
    cluster.start()
    cluster.await_protected()
    assert sum(link.flipped for link in links) == flipped + 2
    assert _damaged(cluster) == before + 2
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


def _damaged(cluster: Cluster) -> int:
    return sum(cluster.status(index).group.damaged for index in cluster.there)


def _protected(cluster: Cluster) -> set[int]:
    return {entry["watermark"] for entry in cluster.this_life() if entry.get("watermark")}


# -- links and agents ----------------------------------------------------------------------------------------------------


def _unprotected_then_protected(cluster: Cluster, cause: Callable[[], None], remedy: Callable[[], None]) -> None:
    """Between *cause* and *remedy* training goes on, and snapshots are skipped or given up; then they are protected again."""
    cause()
    began = [len(cluster.log(rank)) for rank in range(cluster.world)]
    cluster.until("60 steps", lambda: all(len(cluster.log(r)) > began[r] + 60 for r in range(cluster.world)))
    before, after = cluster.log()[began[0] - 1], cluster.log()[-1]
    assert after["watermark"] <= before["watermark"] + 4  # what was on its way then, and not a snapshot more
    assert sum(after["skipped"].values()) >= sum(before["skipped"].values()) + 50
    remedy()
    cluster.until("protection", lambda: cluster.log()[-1]["watermark"] > after["step"])


def _skipped(cluster: Cluster, reason: str) -> int:
    newest = [entry for rank in range(cluster.world) for entry in cluster.log(rank)[-1:]]
    return sum(entry.get("skipped", {}).get(reason, 0) for entry in newest)


def test_a_cut_link_costs_protection_not_training(make_cluster: MakeCluster, rng: random.Random) -> None:
    cluster = make_cluster(3, "2+1", protect_s=1.0)
    cluster.begin()
    far = rng.randrange(3)
    link = cluster.link(far)
    cluster.start()
    cluster.await_protected(2)
    _unprotected_then_protected(cluster, link.cut, link.heal)
    gone = rng.randrange(3)
    cluster.lose(gone)
    cluster.replace(gone)
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


def test_what_is_lost_while_a_link_is_cut(make_cluster: MakeCluster, rng: random.Random) -> None:
    """The last snapshot that was protected before comes back, whatever node is lost meanwhile."""
    cluster = make_cluster(3, "2+1", protect_s=1.0)
    cluster.begin()
    link = cluster.link(rng.randrange(3))
    cluster.start()
    cluster.await_protected(2)
    link.cut()
    cluster.until("snapshots given up", lambda: _skipped(cluster, "unprotected") > 0)
    gone = rng.randrange(3)
    cluster.lose(gone)
    link.heal()
    cluster.replace(gone)
    cluster.finish()
    assert cluster.judge()[-1] > 0


def test_a_stopped_agent_costs_protection_not_training(make_cluster: MakeCluster, rng: random.Random) -> None:
    cluster = make_cluster(3, "2+1", protect_s=1.0)
    cluster.begin()
    cluster.start()
    cluster.await_protected(2)
    stopped = rng.randrange(3)
    _unprotected_then_protected(
        cluster,
        lambda: cluster.signal_agent(stopped, signal.SIGSTOP),
        lambda: cluster.signal_agent(stopped, signal.SIGCONT),
    )
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


@pytest.mark.parametrize(("strategy", "with_memory"), [("fsdp2", True), ("fsdp2", False), ("ddp", False)])
def test_an_agent_is_started_again_while_training_goes_on(
    make_cluster: MakeCluster, rng: random.Random, strategy: str, with_memory: bool
) -> None:
    """One life: later snapshots are protected, also by what came back empty."""
    cluster = make_cluster(3, "2+1", strategy, protect_s=5.0)
    cluster.begin()
    cluster.start()
    for index in rng.sample(range(3), 3):
        cluster.await_protected(len(_protected(cluster)) + 2)
        _anywhere_in_a_step(cluster, rng)
        cluster.restart_agent(index, with_memory=with_memory)
    cluster.await_protected(len(_protected(cluster)) + 3)
    gone = rng.randrange(3)
    cluster.lose(gone)
    cluster.replace(gone)
    cluster.finish()
    assert cluster.judge()[-1] > 0


# -- ranks and nodes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_ranks_are_doubled_up_on_fewer_nodes(make_cluster: MakeCluster, rng: random.Random, strategy: str) -> None:
    """Nobody replaces the lost: their ranks run beside others, and are protected there; then nodes come back."""
    cluster = make_cluster(4, "2+2", strategy)
    cluster.begin()
    cluster.start()
    cluster.await_protected()
    first, second = rng.sample(range(4), 2)
    cluster.lose(first)
    cluster.end_ranks()
    left = sorted({0, 1, 2, 3} - {first})
    cluster.start([node if node != first else rng.choice(left) for node in range(4)])
    cluster.await_protected()
    cluster.lose(second)
    cluster.end_ranks()
    left = sorted({0, 1, 2, 3} - {first, second})
    cluster.start([left[0], left[1], left[1], left[0]] if second != first else None)
    cluster.await_protected()
    cluster.lose(left[0])
    cluster.replace()
    cluster.start(range(4))
    cluster.await_protected()
    cluster.finish()
    assert min(cluster.judge()[1:]) > 0


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_several_ranks_per_node(make_cluster: MakeCluster, rng: random.Random, strategy: str) -> None:
    """Unevenly, too: lanes in which some nodes have no rank."""
    cluster = make_cluster(3, "2+1", strategy, world=5)
    _lose_each(cluster, [(0,), (1,), (2,)], rng)


# -- certificates --------------------------------------------------------------------------------------------------------


def _certified(folder: Path, nodes: int) -> dict[int, Sequence[str]]:
    """Options of agents with certificates of one new CA."""
    made = certs.make(folder, [certs.Node(f"n{index}") for index in range(nodes)], datetime.now(UTC))
    return {index: one.options for index, one in enumerate(made[1:])}


def test_nodes_protect_each_other_over_tls(make_cluster: MakeCluster, rng: random.Random, tmp_path: Path) -> None:
    cluster = make_cluster(3, "2+1", options=_certified(tmp_path / "ca", 3))
    _lose_each(cluster, [(0,), (1,), (2,)], rng)


@pytest.mark.parametrize("strange", ["of another CA", "without a certificate"])
def test_a_node_that_is_not_trusted_protects_nothing(
    make_cluster: MakeCluster, rng: random.Random, tmp_path: Path, strange: str
) -> None:
    """It is refused, and that is said; training goes on unprotected. With the right certificate, all is well."""
    good, other = _certified(tmp_path / "ca", 3), _certified(tmp_path / "other", 3)
    node = rng.randrange(3)
    options = {**good, node: other[node] if strange == "of another CA" else ()}
    cluster = make_cluster(3, "2+1", options=options, protect_s=1.0)
    cluster.begin()
    cluster.start()
    cluster.until("snapshots given up", lambda: _skipped(cluster, "unprotected") > 0)
    assert cluster.log()[-1]["watermark"] == 0
    members = [m.reachable for m in cluster.status((node + 1) % 3).group.members]
    assert members == [index != node for index in range(3)]
    cluster.options[node] = good[node]
    cluster.restart_agent(node)
    cluster.await_protected(2)
    cluster.lose((node + 1) % 3)
    cluster.replace((node + 1) % 3)
    cluster.finish()
    assert cluster.judge()[-1] > 0
