"""Simulated nodes are told apart, replaced by new ones, and ranks are spread over them; with or without agents."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from holdfast.agent.client import AgentClient
from holdfast.agent.settings import NodeSettings
from holdfast.errors import AgentUnreachable
from holdfast.ops.demo.nodes import Simulated
from holdfast.ops.demo.victims import Job


@pytest.fixture
def settings() -> Iterator[NodeSettings]:
    """A job whose folders in shared memory are gone after the test."""
    found = NodeSettings.read({}, job=f"t-nodes-{secrets.token_hex(4)}")
    yield found
    for folder in found.shm.parent.glob(f"{found.shm.name}*"):
        shutil.rmtree(folder)


def simulated(settings: NodeSettings, folder: Path, *, agents: bool = False, permute: int | None = None) -> Simulated:
    return Simulated(settings, folder, count=3, ranks=2, agents=agents, permute=permute)


def test_every_node_has_a_name_a_folder_and_an_address_of_its_own(settings: NodeSettings, tmp_path: Path) -> None:
    nodes = simulated(settings, tmp_path).nodes
    assert [node.ranks for node in nodes] == [(0, 1), (2, 3), (4, 5)]
    assert [node.name for node in nodes] == ["n0", "n1", "n2"]
    assert [node.address for node in nodes] == ["127.0.0.1:0", "127.0.0.2:0", "127.0.0.3:0"]
    assert len({node.shm for node in nodes}) == 3


def test_another_node_takes_the_place_of_a_lost_one(settings: NodeSettings, tmp_path: Path) -> None:
    job = simulated(settings, tmp_path)
    before = list(job.nodes)
    job.nodes[1].lose()
    job.go_on()
    assert (job.nodes[0], job.nodes[2]) == (before[0], before[2])
    new = job.nodes[1]
    assert (new.name, new.address, new.ranks, new.lost) == ("n1.1", "127.0.1.2:0", before[1].ranks, False)
    assert new.shm != before[1].shm
    job.nodes[0].lose()
    job.nodes[1].lose()
    job.go_on()
    assert [node.name for node in job.nodes] == ["n0.2", "n1.3", "n2"]


def test_ranks_move_at_every_start_by_the_seed(settings: NodeSettings, tmp_path: Path) -> None:
    jobs = [simulated(settings, tmp_path, permute=seed) for seed in (1, 1, 2)]
    seen: list[list[tuple[int, ...]]] = []
    for job in jobs:
        for _ in range(3):
            job.go_on()
        seen.append([node.ranks for node in job.nodes])
    assert all(sorted(chain(*ranks)) == list(range(6)) and [len(r) for r in ranks] == [2, 2, 2] for ranks in seen)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.timeout(120)
def test_agents_start_with_their_node_and_again_when_they_die(settings: NodeSettings, tmp_path: Path) -> None:
    job = simulated(settings, tmp_path, agents=True)
    try:
        job.start()
        first = job.nodes[0]
        listens = [node.address for node in job.nodes]
        for node in job.nodes:
            with AgentClient(f"unix:{node.socket}") as client:
                report = client.status(60.0)
            assert (report.agent, report.job, report.listen) == (node.name, settings.job, node.address)
        assert first.agent is not None
        first.agent.kill()
        first.agent.wait()
        job.start()
        assert [node.address for node in job.nodes] == listens, "where its peers look for it"
        with AgentClient(node.address) as client:
            assert client.status(60.0).agent == node.name
        job.nodes[2].lose()
        job.start()
        assert not job.nodes[2].shm.exists(), "a lost node does not come back"
    finally:
        Job(tmp_path, job.nodes).dismiss_agents()
        job.close()
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["agent-n0.log", "agent-n1.log", "agent-n2.log"]


@pytest.mark.timeout(120)
def test_an_agent_that_cannot_start_is_told(settings: NodeSettings, tmp_path: Path) -> None:
    job = simulated(settings, tmp_path, agents=True)
    job.nodes[0].address = "8.8.8.8:0"  # not without certificates
    try:
        with pytest.raises(AgentUnreachable, match=r"agent n0 did not start; see .*agent-n0\.log"):
            job.start()
        assert "only loopback addresses" in (tmp_path / "agent-n0.log").read_text()
    finally:
        Job(tmp_path, job.nodes).dismiss_agents()
        job.close()
