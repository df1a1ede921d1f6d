"""The embedded default: who finds no agent starts one, once, detached from everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.agent import launch
from holdfast.agent.launch import ensure_agent
from holdfast.agent.settings import NodeSettings
from holdfast.errors import AgentUnreachable, AgentUntrusted, DeadlinePassed
from holdfast.tests.hooks.nodes import WAIT_S, Node, until


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.remove()


def test_one_agent_however_many_ask(node: Node) -> None:
    """Eight ranks arrive at once; one agent is started, and all return when it answers."""
    code = (
        "import sys; from holdfast.agent.launch import ensure_agent; from holdfast.agent.settings import NodeSettings\n"
        "from holdfast.agent.client import AgentClient\n"
        "s = NodeSettings.read({}, job=sys.argv[1], shm=sys.argv[2]); ensure_agent(s, 60)\n"
        "with AgentClient.at(s) as c: print(c.status().pid)"
    )
    askers = [
        subprocess.Popen([sys.executable, "-c", code, node.job, str(node.shm)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = {asker.communicate(timeout=WAIT_S)[0].strip() for asker in askers}
    assert told == {str(node.pid())}


def test_the_agent_is_on_its_own(node: Node) -> None:
    """It outlives who started it, whatever is done to that one's session, and holds none of its files open."""
    ensure_agent(node.settings, WAIT_S)
    pid = node.pid()
    assert pid is not None
    assert os.getsid(pid) == pid
    assert os.getsid(pid) != os.getsid(0)
    outputs = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)]
    assert outputs == ["/dev/null", "/dev/null", str(node.shm / "agent.log")]
    ensure_agent(node.settings, WAIT_S)
    assert node.pid() == pid


def test_a_killed_agent_is_started_again(node: Node) -> None:
    ensure_agent(node.settings, WAIT_S)
    first = node.pid()
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{first}").exists(), "the agent to die")
    ensure_agent(node.settings, WAIT_S)
    assert node.pid() != first


def test_none_is_started_where_one_is_managed(node: Node) -> None:
    settings = NodeSettings.read({"HOLDFAST_AGENT": str(node.shm / "managed.sock")}, job=node.job, shm=str(node.shm))
    assert not settings.autostart
    with pytest.raises(AgentUnreachable, match="HOLDFAST_AGENT"):
        ensure_agent(settings, 0.2)
    assert not node.shm.exists()


def test_an_agent_that_cannot_start_says_why(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_OTHER_S", 0.1)  # for an agent that somebody else starts: nobody does
    node.start(job="another-job")  # it holds the folder's lock, at another socket's place
    node.settings.socket.unlink()
    with pytest.raises(AgentUnreachable, match="another agent already serves"):
        ensure_agent(node.settings, WAIT_S)


def test_somebody_elses_folder_is_not_used(node: Node) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    node.shm.mkdir(mode=0o700)
    os.chown(node.shm, 12345, 12345)
    with pytest.raises(AgentUntrusted, match="belongs to uid 12345"):
        ensure_agent(node.settings, WAIT_S)


def test_a_launch_that_hangs_is_waited_for_no_longer_than_said(node: Node) -> None:
    """Somebody holds the launch lock for ever."""
    import fcntl

    node.shm.mkdir(mode=0o700)
    with (node.shm / "launch.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DeadlinePassed, match=r"launch\.lock"):
            ensure_agent(node.settings, 0.2)
