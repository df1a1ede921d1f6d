"""Several simulated nodes on one machine, any of which can be lost with all it held.

A node is an agent of its own (own folder of shared memory, own name, own host as failure domain, own loopback address) and the
trainers that run on it. To lose it is to SIGKILL both and to delete its shared memory. Who replaces it is an empty agent under
another name and address. ``judge`` compares whatever any rank ever did with an undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from faults.job import DEADLINE_S, POLL_S, Log, Spec, train, train_reference
from faults.link import Link
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import AgentClient
from holdfast.agent.settings import NodeSettings
from holdfast.errors import Corrupt
from holdfast.snapshot.record import Record
from holdfast.storage.tiers import Tier
from holdfast.tests.warm import Agent, server

_ENDLESS = 1_000_000  # steps of a life that ends by being killed
EACH = "disk-of-each-node"  # in the URL of a tier: every node has its own


@dataclass(frozen=True, slots=True)
class _Spec(Spec):
    """
    Attributes:
        listen: where other agents find this rank's agent, if not where it says.
        node: on which this rank runs.
    """

    listen: str = ""
    node: int = 0


def _train(spec: _Spec, rank: int) -> None:
    """One life of one rank on one of several nodes; the entry of its process."""
    if spec.listen:
        _announce(spec.listen)
    if spec.tiers:
        _localise(spec.node)
    train(spec, rank)


def _announce(listen: str) -> None:
    """Have this process tell the others another address of its agent."""
    from holdfast.hooks import checkpointer, holding

    gather, inventory = checkpointer.gather_roster, holding.Holding.inventory  # type: ignore[attr-defined]

    def gather_roster(ranks: Any, welcome: wire.Welcome, *args: Any, **options: Any) -> wire.Roster:
        told = wire.Welcome()
        told.CopyFrom(welcome)
        told.listen = listen
        return gather(ranks, told, *args, **options)

    def inventory_of(self: holding.Holding, timeout_s: float) -> wire.ImageList:
        reply = inventory(self, timeout_s)
        reply.address = listen
        return reply

    checkpointer.gather_roster = gather_roster  # type: ignore[attr-defined]
    holding.Holding.inventory = inventory_of  # type: ignore[method-assign]


def _localise(node: int) -> None:
    """Have this process tell its agent of its own node's disk, where the tiers that all ranks name say ``EACH``."""
    from holdfast.hooks import checkpointer, holding

    class Holding(holding.Holding):
        def __init__(self, *args: Any, tiers: Sequence[str], **options: Any) -> None:
            super().__init__(*args, tiers=[tier.replace(EACH, f"disk{node}") for tier in tiers], **options)

    checkpointer.Holding = Holding  # type: ignore[assignment,attr-defined]


@dataclass(slots=True)
class Node:
    """One node: the *generation* counts who has taken its place. *link*: the wire to its agent, if that is to be cut."""

    index: int
    generation: int
    shm: Path
    agent: Agent
    listen: str = ""
    link: Link | None = None

    @property
    def name(self) -> str:
        return f"n{self.index}g{self.generation}"


@dataclass(slots=True)
class Cluster:
    """A training job on several nodes, over all its lives.

    Attributes:
        nodes: how many; each has one rank unless a life is started otherwise.
        protect: as in ``Checkpointer``.
        protect_s: the deadline for it.
        step_s: how long the device is at work in each step.
        options: further options of agents, by node.
        tiers, grace: as in ``Checkpointer``; see ``EACH``.
        cuts: lives that began after a power cut.
    """

    folder: Path
    nodes: int
    protect: str = "auto"
    strategy: str = "fsdp2"
    world: int = 0
    step_s: float = 0.02
    protect_s: float = DEADLINE_S
    options: dict[int, Sequence[str]] = field(default_factory=dict)
    tiers: tuple[Tier, ...] = ()
    grace: str | None = None
    cuts: set[int] = field(default_factory=set)
    lives: int = 0
    kills: int = 0
    losses: int = 0
    job: str = field(default_factory=lambda: f"nodes-{uuid.uuid4().hex[:8]}")
    there: dict[int, Node] = field(default_factory=dict)
    ranks: list[BaseProcess] = field(default_factory=list)
    placement: tuple[int, ...] = ()
    _generations: int = 0
    _logs: dict[str, Log] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.world = self.world or self.nodes
        self.placement = tuple(rank * self.nodes // self.world for rank in range(self.world))

    @property
    def shm(self) -> Path:
        return Path("/dev/shm") / self.job

    # -- nodes -------------------------------------------------------------------------------------------------------

    def begin(self, crash: Mapping[int, str] | None = None) -> None:
        """Start an agent on every node that has none. *crash*: by node, where it dies."""
        self.shm.mkdir(mode=0o700, exist_ok=True)
        missing = [index for index in range(self.nodes) if index not in self.there]
        for index in missing:
            self._generations += 1
            shm = self.shm / f"{index}-{self._generations}"
            self._start(index, self._generations, shm, (crash or {}).get(index, ""))
        for index in missing:
            self._await_ready(self.there[index])

    def restart_agent(self, index: int, *, with_memory: bool = True) -> None:
        """SIGKILL the agent of a node, and start it again in the same place."""
        node = self.there.pop(index)
        self._kill_agent(node)
        if not with_memory:
            for path in [*node.shm.glob("rank-*"), *node.shm.glob("lane-*")]:
                path.unlink()
        self._start(index, node.generation, node.shm, "")
        self._await_ready(self.there[index])

    def link(self, index: int) -> Link:
        """Put a wire before the agent of a node, from the next life on."""
        node = self.there[index]
        host, _, port = node.listen.rpartition(":")
        found = psutil.Process(node.agent.pid).net_connections("tcp")
        (bulk,) = {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN} - {int(port)}
        node.link = Link(host.replace("127.0.", "127.1."), host, [int(port), bulk], bulk)
        return node.link

    def _start(self, index: int, generation: int, shm: Path, crash: str) -> None:
        host = f"127.0.{generation // 200 + 1}.{generation % 200 + 1}"
        options = [
            "--job", self.job, "--shm", str(shm), "--name", f"n{index}g{generation}", "--domain", f"host=h{index}",
            "--listen", f"{host}:0", "--idle-exit", "never", *self.options.get(index, ()),
        ]  # fmt: skip
        agent = Agent(options, self.folder / f"agent{index}.err", {**os.environ, "HOLDFAST_CRASH": crash})
        self.there[index] = Node(index, generation, shm, agent)

    def _await_ready(self, node: Node) -> None:
        words = dict(word.partition("=")[::2] for word in node.agent.stdout.readline().split())
        assert "listen" in words, f"agent {node.name} did not start\n{self.errors()}"
        node.listen = words["listen"]

    def lose(self, *which: int) -> None:
        """These nodes burn, all at once: trainers, agent and memory."""
        for index in which:
            for rank in self.ranks_on(index):
                self._kill_rank(rank)
            self.there[index].agent.kill()
        for index in which:
            node = self.there.pop(index)
            self._kill_agent(node)
            shutil.rmtree(node.shm)
            self.losses += 1

    def replace(self, *which: int, crash: Mapping[int, str] | None = None) -> None:
        """Empty agents take the places of these nodes, which were lost; other ranks die as under torchrun."""
        self.end_ranks()
        assert not set(which) & self.there.keys()
        self.begin(crash)

    def cut_power(self) -> None:
        """All nodes at once: nothing runs any more, and nothing is left in memory. Disks stay."""
        for node in self.there.values():
            node.agent.kill()
        self.end_ranks()
        for index in list(self.there):
            node = self.there.pop(index)
            self._kill_agent(node)
            shutil.rmtree(node.shm)
        self.cuts.add(self.lives + 1)

    def status(self, index: int) -> wire.StatusReport:
        with AgentClient.at(self._settings(index)) as client:
            return client.status(DEADLINE_S)

    def signal_agent(self, index: int, number: int) -> None:
        self.there[index].agent.send_signal(number)

    def _settings(self, index: int) -> NodeSettings:
        return NodeSettings.read({}, job=self.job, shm=str(self.there[index].shm))

    def _kill_agent(self, node: Node) -> None:
        node.agent.kill()
        node.agent.wait(DEADLINE_S)
        node.agent.stdout.close()
        if node.link is not None:
            node.link.close()
        self.kills += 1

    # -- lives -------------------------------------------------------------------------------------------------------

    def start(
        self, placement: Sequence[int] | None = None, *, steps: int = _ENDLESS, crash: Mapping[int, str] | None = None
    ) -> None:
        """Begin a life. *placement*: the node of each rank; *crash*: by rank, where it dies."""
        self.lives += 1
        self.placement = tuple(placement or self.placement)
        specs = [self._spec(rank, steps, (crash or {}).get(rank, "")) for rank in range(self.world)]
        self.ranks = [server.Process(target=_train, args=(spec, rank), daemon=True) for rank, spec in enumerate(specs)]
        for process in self.ranks:
            process.start()

    def _spec(self, rank: int, steps: int, crash: str = "") -> _Spec:
        node = self.there[self.placement[rank]]
        listen = f"{node.link.host}:{node.listen.rpartition(':')[2]}" if node.link else ""
        return _Spec(
            str(self.folder), str(node.shm), self.job, self.world, steps, self.strategy, self.lives, self.step_s, crash,
            self.protect, self.protect_s, f"{node.shm}/agent.sock", self.tiers, self.grace, listen=listen,
            node=node.index,
        )  # fmt: skip

    def ranks_on(self, index: int) -> list[int]:
        return [rank for rank, node in enumerate(self.placement) if node == index]

    def end_ranks(self) -> None:
        """SIGKILL whatever ranks still run, and wait for all to have ended."""
        for rank, process in enumerate(self.ranks):
            if process.is_alive():
                self._kill_rank(rank)
        for process in self.ranks:
            process.join(DEADLINE_S)
            assert process.exitcode is not None
        self.ranks = []

    def _kill_rank(self, rank: int) -> None:
        if rank < len(self.ranks) and (pid := self.ranks[rank].pid) is not None and self.ranks[rank].is_alive():
            with contextlib.suppress(ProcessLookupError):  # it ended just now, by itself
                os.kill(pid, signal.SIGKILL)
                self.kills += 1

    def finish(self, more: int = 3) -> None:
        """Start a last life, of a few steps more than any before, and see it end well."""
        self.end_ranks()
        newest = max((e.get("step", 0) for rank in range(self.world) for e in self.log(rank)), default=0)
        self.start(steps=newest + more)
        self.await_end()

    def await_end(self, code: int = 0) -> None:
        """Until all ranks have ended by themselves, with this exit code."""
        for process in self.ranks:
            process.join(DEADLINE_S)
        codes = [process.exitcode for process in self.ranks]
        assert codes == [code] * self.world, f"exit codes {codes}\n{self.errors()}"

    def remove(self) -> None:
        """Leave nothing behind."""
        self.end_ranks()
        for node in self.there.values():
            node.agent.send_signal(signal.SIGCONT)
            self._kill_agent(node)
        self.there.clear()
        shutil.rmtree(self.shm, ignore_errors=True)

    # -- watching ----------------------------------------------------------------------------------------------------

    def log(self, rank: int = 0) -> Sequence[dict[str, Any]]:
        return self._log(f"rank{rank}").read()

    def _log(self, name: str) -> Log:
        return self._logs.setdefault(name, Log(self.folder / f"{name}.jsonl"))

    def errors(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.err")))

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Return once *condition* holds; fail after the deadline, or if a rank ended before."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"no {what} within {DEADLINE_S} s\n{self.errors()}"
            ended = wait([process.sentinel for process in self.ranks], POLL_S)
            assert not ended or condition(), f"ended before {what}\n{self.errors()}"

    def await_agent_death(self, index: int) -> None:
        """Until the agent has died of SIGKILL, where it was told to."""
        code = self.there[index].agent.wait(DEADLINE_S)
        assert code == -signal.SIGKILL, f"exit code {code}\n{self.errors()}"

    def await_rank_death(self, rank: int) -> None:
        """Until the rank has died of SIGKILL, where it was told to."""
        self.ranks[rank].join(DEADLINE_S)
        code = self.ranks[rank].exitcode
        assert code == -signal.SIGKILL, f"exit code {code}\n{self.errors()}"

    @property
    def settled(self) -> bool:
        """Whether this life has restored, so that what it restored is protected again."""
        return any(self.this_life(rank) for rank in range(self.world))

    def await_restored(self) -> int:
        """Until every rank of this life has restored; returns the step."""
        self.until("restore", lambda: all(self.this_life(rank) for rank in range(self.world)))
        return int(self.this_life()[0]["restored"])

    def this_life(self, rank: int = 0) -> list[dict[str, Any]]:
        return [entry for entry in self.log(rank) if entry["life"] == self.lives]

    def await_protected(self, snapshots: int = 1) -> int:
        """Until a rank knows so many snapshots of this life to be protected everywhere; returns the newest."""

        def newer() -> set[int]:
            life = self.this_life()
            return {e["watermark"] for e in life if e.get("watermark", 0) > life[0]["restored"]}

        self.until(f"{snapshots} protected snapshots of life {self.lives}", lambda: len(newer()) >= snapshots)
        return max(newer())

    def await_persisted(self, snapshots: int = 1) -> int:
        """Until a rank knows so many snapshots of this life to be persisted everywhere; returns the newest."""

        def found() -> set[int]:
            return {e["persisted"] for e in self.this_life() if e.get("persisted")}

        self.until(f"{snapshots} persisted snapshots of life {self.lives}", lambda: len(found()) >= snapshots)
        return max(found())

    # -- damage ------------------------------------------------------------------------------------------------------

    def held(self, index: int, kind: str = "rank") -> dict[Path, Record]:
        """The records of the node's slots (or, of *kind* "lane", its cells), sealed or not."""
        found = {}
        for path in sorted(self.there[index].shm.glob(f"{kind}-*")):
            with contextlib.suppress(Corrupt):
                found[path] = Record.from_bytes(path.read_bytes()[:255])[0]
        return found

    def complete(self, index: int) -> set[int]:
        """The steps of which the node knows that all ranks had them, and of which it has parity."""
        known = set()
        for path, record in self.held(index).items():
            word, complete = struct.unpack_from("<QQ", path.read_bytes(), 4096)
            known |= {record.id.step} if word == complete == record.nonce else set()
        return known & {record.id.step for record in self.held(index, "lane").values()}

    def flip(self, index: int, step: int, where: str, kind: str = "rank") -> int:
        """Flip a bit of the node's own images (or parity) of *step*, behind everybody's back; returns of how many."""
        mine = self.ranks_on(index) if kind == "rank" else [0]
        held = {path: r for path, r in self.held(index, kind).items() if r.id.step == step and r.rank in mine}
        for path, record in held.items():
            offset = {
                "record": 0,
                "checksums": 8192 + 1,
                "layout": 8192 + 4 * -(-record.image_bytes // record.block_bytes) + 40,
                "first byte": 8192 + record.table_bytes,
                "last byte": 8192 + record.table_bytes + record.image_bytes - 1,
            }[where]
            with path.open("r+b") as file:
                for at in range(offset, offset + (64 if where == "record" else 1)):  # of a record, beyond repair
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 8]))
        return len(held)

    # -- judging -----------------------------------------------------------------------------------------------------

    def judge(self) -> list[int]:
        """Every step of every life is bit for bit the reference's, and what any rank knew to be protected was not lost, nor,
        after a power cut, what any knew to be persisted; returns the steps that lives began from."""
        logs = [self.log(rank) for rank in range(self.world)]
        truths = self.reference(max((e.get("step", 0) for log in logs for e in log), default=0))
        protected, persisted, began = 0, 0, []
        for life in range(1, self.lives + 1):
            entries = [(rank, e) for rank, log in enumerate(logs) for e in log if e["life"] == life]
            restored = {e["restored"] for _, e in entries if "restored" in e}
            assert len(restored) <= 1, f"life {life}: ranks restored different steps: {restored}"
            protected = persisted if life in self.cuts else protected
            for step in restored:
                assert step >= protected, f"life {life} went back to {step}; {protected} was safe\n{self.errors()}"
                began.append(step)
            for rank, entry in entries:
                self._check(rank, entry, truths[rank])
                protected = max(protected, entry.get("watermark", 0))
                persisted = max(persisted, entry.get("persisted", 0))
        return began

    def _check(self, rank: int, entry: dict[str, Any], truth: dict[int, dict[str, Any]]) -> None:
        if entry.get("restored"):
            step = entry["restored"]
            assert entry["digest"] == truth[step]["digest"], f"rank {rank} restored another state of {step}: {entry}"
        elif "step" in entry:
            wanted = truth[entry["step"]]
            for what in ("loss", "digest"):
                assert entry[what] == wanted[what], f"rank {rank}: another {what} at {entry}"

    def reference(self, steps: int) -> list[dict[int, dict[str, Any]]]:
        """Train as far without interruption, and without Holdfast; each rank's log by step."""
        self.lives += 1
        spec = replace(self._spec(0, steps), shm="")
        processes = [server.Process(target=train_reference, args=(spec, r)) for r in range(self.world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE_S)
            assert process.exitcode == 0
        self.lives -= 1
        return [{e["step"]: e for e in self._log(f"reference{r}").read()} for r in range(self.world)]
