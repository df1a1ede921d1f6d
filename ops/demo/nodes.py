"""Where the ranks of a demo run: on this machine as it is, or on several simulated nodes of it.

A simulated node is an agent with a name, a failure domain, a loopback address and a folder of shared memory of its own, and
the trainers that use it. To lose it is to kill them all and to delete the folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from ...agent.settings import NodeSettings
from ...errors import AgentUnreachable, DeadlinePassed

READY_S: Final = 60.0
EXIT_S: Final = 10.0
NODES_LIMIT: Final = 64
_LISTEN: Final = re.compile(r" listen=(\S+)")


@dataclass(slots=True)
class Node:
    """One node: its name, its folder of shared memory, and the ranks that run on it in the present life.

    ``lost``: its processes have been killed and its memory deleted; another one takes its place when the job starts again.
    """

    name: str
    shm: Path
    ranks: tuple[int, ...]
    address: str = ""
    lost: bool = False
    agent: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def socket(self) -> Path:
        """That of its agent."""
        return self.shm / "agent.sock"

    def lose(self) -> None:
        """Delete its memory; its processes must have ended."""
        self.lost = True
        shutil.rmtree(self.shm, ignore_errors=True)


class Simulated:
    """Several nodes on this machine.

    Attributes:
        nodes: as they are now; an entry is replaced when its node was lost.
    """

    def __init__(
        self, settings: NodeSettings, folder: Path, *, count: int, ranks: int, agents: bool, permute: int | None
    ) -> None:
        """*folder* is for logs; *ranks* of each node. *agents*: whether there are any. *permute*: a seed by which ranks are
        spread over the nodes anew whenever the job starts again."""
        self._settings, self._folder, self._ranks, self._agents = settings, folder, ranks, agents
        self._dice = None if permute is None else random.Random(permute)  # noqa: S311
        self._generation = 0
        self.nodes = [self._node(index) for index in range(count)]
        self._place(range(count * ranks))

    def start(self) -> None:
        """Start what agents do not run: those of new nodes, and those that died on nodes that live.

        Raises ``AgentUnreachable`` or ``DeadlinePassed`` if one does not become ready.
        """
        if not self._agents:
            return
        idle = [node for node in self.nodes if not node.lost and (node.agent is None or node.agent.poll() is not None)]
        for node in idle:
            self._launch(node)
        for node in idle:  # they start side by side
            self._await(node)

    def go_on(self) -> None:
        """Before the job starts again: put a new, empty node in the place of each lost one, and permute the ranks."""
        for index, node in enumerate(self.nodes):
            if node.lost:
                self._generation += 1
                _let_go(node)
                self.nodes[index] = self._node(index)
                self.nodes[index].ranks = node.ranks
        if self._dice is not None:
            ranks = [rank for node in self.nodes for rank in node.ranks]
            self._dice.shuffle(ranks)
            self._place(ranks)
        self.start()

    def close(self) -> None:
        """Forget the agents, which must have ended."""
        for node in self.nodes:
            _let_go(node)

    def _node(self, index: int) -> Node:
        again = f".{self._generation}" if self._generation else ""
        # All of 127/8 is this machine; a node in the place of a lost one gets another address, as on a real cluster.
        address = f"127.0.{self._generation % 256}.{index + 1}:0"
        return Node(f"n{index}{again}", Path(f"{self._settings.shm}-n{index}{again}"), (), address)

    def _place(self, ranks: Iterable[int]) -> None:
        remaining = list(ranks)
        for index, node in enumerate(self.nodes):
            node.ranks = tuple(sorted(remaining[index * self._ranks : (index + 1) * self._ranks]))

    def _launch(self, node: Node) -> None:
        command = [
            sys.executable, "-P", "-m", __package__.partition(".")[0], "agent", "--job", self._settings.job,
            "--shm", str(node.shm), "--name", node.name, "--domain", f"host={node.name}", "--listen", node.address,
            "--idle-exit", "never",
        ]  # fmt: skip
        _let_go(node)
        with (self._folder / f"agent-{node.name}.log").open("ab") as log:
            node.agent = subprocess.Popen(
                command, env=without_ours(os.environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            )  # fmt: skip

    def _await(self, node: Node) -> None:
        assert node.agent is not None
        assert node.agent.stdout is not None
        line = _first_line(node.agent.stdout, READY_S)
        found = _LISTEN.search(line)
        if found is None:
            raise AgentUnreachable(f"agent {node.name} did not start; see {self._folder / f'agent-{node.name}.log'}")
        node.address = found[1]  # should it die, the next one of this node is found where the others look for it


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """*environment* without what the user has set for other agents and jobs."""
    return {name: value for name, value in environment.items() if not name.startswith("HOLDFAST_")}


def _first_line(stream: IO[str], within_s: float) -> str:
    deadline_s = time.monotonic() + within_s
    if not select.select([stream], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        raise DeadlinePassed(f"waited {within_s:g} s for an agent to become ready")
    return stream.readline()


def _let_go(node: Node) -> None:
    """Reap the agent's process, which has ended."""
    agent, node.agent = node.agent, None
    if agent is None:
        return
    if agent.stdout is not None:
        agent.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        agent.wait(EXIT_S)
