"""The agent's process: its ready line, its lock, its logs, what it leaves and what it finds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from holdfast.agent.daemon import DaemonOptions, run
from holdfast.agent.settings import NodeSettings
from holdfast.errors import AgentError, AgentUntrusted, ConfigError
from holdfast.tests.hooks.nodes import WAIT_S, Node, bits, until
from torch import nn


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.remove()


def _snapshot(node: Node, step: int = 1) -> str:
    """Leave one snapshot behind, as a trainer that died; the state it has."""
    torch.manual_seed(step)
    model = nn.Linear(4, 4)
    ckpt = node.attach(model)
    ckpt.wait(ckpt.snapshot(step))
    ckpt.close(ended=False)
    return str(bits(model.state_dict()))


def _restored(node: Node) -> tuple[int | None, str]:
    model = nn.Linear(4, 4)
    with node.attach(model) as ckpt:
        return ckpt.restore(), str(bits(model.state_dict()))


def test_ready_line_and_clean_end(node: Node) -> None:
    agent = node.start("--name", "left")
    ready: str = agent.ready  # type: ignore[attr-defined]
    assert ready.startswith(f"holdfast agent left ready job={node.job} socket={node.settings.socket} listen=127.0.0.1:")
    assert ready.rstrip().endswith(f"shm={node.shm} pid={agent.pid}")
    wanted = _snapshot(node)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(WAIT_S) == 0
    assert node.sealed(), "snapshots stay in memory for the next agent"
    again = node.start("--log-format", "json")
    assert _restored(node) == (1, wanted)
    again.send_signal(signal.SIGTERM)
    log = node.ended(again)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"time_s", "level", "logger", "message"} <= set(lines[0])
    assert any("adopted" in line["message"] for line in lines)


def test_one_agent_per_folder(node: Node) -> None:
    node.start()
    second = node.start()
    log = node.ended(second)
    assert second.returncode == AgentError.exit_code
    assert "another agent already serves" in log
    assert node.status().job == node.job


def test_a_stale_socket_and_lock_do_not_matter(node: Node) -> None:
    agent = node.start()
    wanted = _snapshot(node)
    agent.kill()
    agent.wait(WAIT_S)
    assert node.settings.socket.exists()
    node.start()
    assert _restored(node) == (1, wanted)


def test_an_idle_agent_without_snapshots_that_matter_ends(node: Node) -> None:
    agent = node.start("--idle-exit", "1s")
    model = nn.Linear(2, 2)
    with node.attach(model) as ckpt:
        ckpt.wait(ckpt.snapshot(1))
    assert agent.wait(WAIT_S) == 0
    until(lambda: not list(node.shm.glob("rank-*")), "the memory to be given back")


def test_an_idle_agent_keeps_what_a_dead_trainer_left(node: Node) -> None:
    agent = node.start("--idle-exit", "1s", "--keep", "3s")
    _snapshot(node)
    until(lambda: node.status().idle_s > 1.5, "idleness")
    assert agent.poll() is None
    assert agent.wait(WAIT_S) == 0, "after --keep, nobody came back"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "8.8.8.8:1", "nowhere", "127.0.0.1:x", ""])
def test_addresses_that_are_not_served(node: Node, listen: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        run(node.settings, DaemonOptions("x", listen), "0")


@pytest.mark.parametrize("listen", ["localhost:0", "[::1]:0"])
def test_loopback_is_served(node: Node, listen: str) -> None:
    agent = node.start("--listen", listen)
    ready: str = agent.ready  # type: ignore[attr-defined]
    if not ready and "::1" in listen:
        pytest.skip("no IPv6 here")
    assert "listen=" in ready


def test_a_folder_that_others_may_enter(node: Node) -> None:
    node.shm.mkdir()
    node.shm.chmod(0o755)
    with pytest.raises(AgentUntrusted, match="mode 755"):
        run(node.settings, DaemonOptions("x"), "0")


def test_a_folder_that_is_a_link(node: Node, tmp_path: Path) -> None:
    node.shm.symlink_to(tmp_path)
    try:
        with pytest.raises(AgentUntrusted, match="symbolic link"):
            run(node.settings, DaemonOptions("x"), "0")
    finally:
        node.shm.unlink()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = NodeSettings("j", tmp_path / "file" / "shm", tmp_path / "s", autostart=True)
    with pytest.raises(ConfigError, match="cannot make"):
        run(settings, DaemonOptions("x"), "0")


def test_what_an_agent_makes_is_private(node: Node) -> None:
    node.start()
    _snapshot(node)
    for path in (node.shm, *node.shm.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.stat().st_uid == os.getuid()
