"""Finding the processes of a job, and killing exactly those.

A process is held by a pidfd from the moment it is recognised, so that a signal can never reach another process that was
given the same pid in the meantime.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import DeadlinePassed
from .journal import announced, started_ticks
from .nodes import Node
from .schedule import Planned, Target

EXIT_S: Final = 10.0
DISMISSAL_S: Final = 30.0
_PID_NAME: Final = "agent.pid"


@dataclass(frozen=True, slots=True)
class Victim:
    """A living process. ``pidfd`` belongs to whoever entered the context that gave it."""

    name: str
    pid: int
    pidfd: int

    def send(self, signum: signal.Signals) -> None:
        """Signal the process; one that has died in the meantime is left in peace."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signum)

    def ended(self, within_s: float) -> bool:
        """Wait until the process has ended, *within_s* seconds at most."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(within_s * 1e3))


class Job:
    """One job of the demo: the ranks that announce themselves in *folder*, and the agents of its nodes."""

    def __init__(self, folder: Path, nodes: Sequence[Node]) -> None:
        """*nodes* are looked at anew each time; entries may be exchanged for others meanwhile."""
        self._folder, self._nodes = folder, nodes

    @contextlib.contextmanager
    def victims(self, planned: Planned, life: int) -> Iterator[Sequence[Victim] | None]:
        """All that *planned* has to hit in *life*, or None while not every one of them is alive.

        For a preemption that is every rank, by number: one gets the notice, and all have to end.
        """
        ranks, agents = self._wanted(planned)
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(self._rank(rank, life)) for rank in ranks]
            found += [stack.enter_context(self._agent(node)) for node in agents]
            alive = [victim for victim in found if victim]
            yield alive if len(alive) == len(found) else None

    def _wanted(self, planned: Planned) -> tuple[Sequence[int], Sequence[Node]]:
        """The ranks, and the nodes whose agents, *planned* has to hit."""
        chosen = [self._nodes[index] for index in planned.nodes]
        match planned.target:
            case Target.TRAINER | Target.PREEMPT:
                return self._ranks_of(self._nodes), ()
            case Target.RANK:
                return [planned.rank], ()
            case Target.AGENT:
                return (), chosen
            case Target.ALL:
                return self._ranks_of(self._nodes), self._nodes
            case Target.NODE:
                return self._ranks_of(chosen), chosen

    @staticmethod
    def _ranks_of(nodes: Sequence[Node]) -> list[int]:
        return sorted(rank for node in nodes for rank in node.ranks)

    def kill_ranks(self) -> None:
        """SIGKILL every rank that is alive, of whatever life. For clearing up."""
        for rank in self._ranks_of(self._nodes):
            with self._rank(rank, None) as victim:
                if victim:
                    victim.send(signal.SIGKILL)
                    victim.ended(EXIT_S)

    def dismiss_agents(self) -> None:
        """End the agents, kindly first, and remove the job's shared memory. The ranks must have ended."""
        for node in self._nodes:
            self._dismiss(node, kindly=True)

    def take_machines(self) -> None:
        """SIGKILL every agent and delete the memory of every node, as if the machines were gone. The ranks must have ended."""
        for node in self._nodes:
            self._dismiss(node, kindly=False)
            node.lost = True

    def _dismiss(self, node: Node, *, kindly: bool) -> None:
        # Not by agent.pid alone: a rank may have died while it was starting an agent, which has yet to write it.
        deadline = time.monotonic() + DISMISSAL_S
        while pids := [pid for pid in _every_pid() if _is_agent(pid, node)]:
            for pid in pids:
                with _held("agent", pid) as victim:
                    if victim:
                        _end(victim, kindly=kindly)
            if time.monotonic() > deadline:
                raise DeadlinePassed(f"waited {DISMISSAL_S:g} s for the agent of {node.shm} to end (pids {pids})")
        shutil.rmtree(node.shm, ignore_errors=True)

    @contextlib.contextmanager
    def _rank(self, rank: int, life: int | None) -> Iterator[Victim | None]:
        entry = announced(self._folder, rank)
        if entry is None or life not in (None, entry["life"]):
            yield None
            return
        with _held(f"rank {rank}", entry["pid"]) as victim:
            yield victim if victim and started_ticks(victim.pid) == entry["started_ticks"] else None

    @contextlib.contextmanager
    def _agent(self, node: Node) -> Iterator[Victim | None]:
        try:
            pid = int((node.shm / _PID_NAME).read_text())
        except (FileNotFoundError, ValueError):
            yield None
            return
        with _held(f"agent {node.name}".rstrip(), pid) as victim:
            yield victim if victim and _is_agent(pid, node) else None


def _is_agent(pid: int, node: Node) -> bool:
    """Whether *pid* was started to serve the node's folder, whose name no other process has on its command line."""
    arguments = _command_line(pid).split(b"\0")
    return b"agent" in arguments and os.fsencode(node.shm) in arguments


def _end(victim: Victim, *, kindly: bool) -> None:
    if kindly:
        victim.send(signal.SIGTERM)
        if victim.ended(EXIT_S):
            return
    victim.send(signal.SIGKILL)
    victim.ended(EXIT_S)


def _every_pid() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


@contextlib.contextmanager
def _held(name: str, pid: int) -> Iterator[Victim | None]:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        victim = Victim(name, pid, pidfd)
        yield None if victim.ended(within_s=0) else victim
    finally:
        os.close(pidfd)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
