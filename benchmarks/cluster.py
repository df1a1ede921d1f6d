"""Agents of simulated nodes, and one process that plays all their trainers: it fills slots, and says so."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from holdfast._version import __version__
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import AgentClient, Attachment, hello, place_of, wire_id
from holdfast.agent.settings import NodeSettings
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import SnapshotId, new_nonce, table_bytes_for

_WAIT_S: Final = 120.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Done:
    """One protection: bytes pulled by all nodes, seconds from the first word to the last answer, and CPU seconds."""

    nbytes: int
    seconds: float
    cpu_s: float


@dataclass(slots=True)
class Node:
    """One agent and its one trainer."""

    rank: int
    settings: NodeSettings
    process: subprocess.Popen[str]
    stream: Attachment
    slots: list[Slot] = field(default_factory=list)
    heard: queue.SimpleQueue[wire.FromAgent] = field(default_factory=queue.SimpleQueue)

    def await_(self, kind: str) -> wire.FromAgent:
        """The next message of that kind; others are dropped."""
        deadline_s = time.monotonic() + _WAIT_S
        while True:
            message = self.heard.get(timeout=deadline_s - time.monotonic())
            if message.WhichOneof("kind") == kind:
                return message

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the agent so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def start_agent(rank: int, job: str, shm: Path) -> subprocess.Popen[str]:
    """The agent of a node of its own, with one rank; ready. It logs beside *shm*."""
    command = [
        sys.executable, "-m", "holdfast", "agent", "--job", job, "--shm", str(shm), "--name", f"n{rank}",
        "--domain", f"host=h{rank}", "--listen", f"127.0.1.{rank + 1}:0", "--idle-exit", "never",
    ]  # fmt: skip
    with Path(f"{shm}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


class Cluster:
    """Simulated nodes that protect each other. A context manager."""

    def __init__(self, nodes: int, protect: str, image_bytes: int) -> None:
        self._image_bytes = image_bytes
        self._layout = Layout.of(1, [Slice("x", "uint8", (image_bytes,), (0,), (image_bytes,))]).to_text()
        self._job = f"bench-{uuid.uuid4().hex[:8]}"
        self._base = Path(f"/dev/shm/{self._job}")
        self._run = uuid.uuid4().hex
        self._step = 0
        self._newest: SnapshotId | None = None
        self._nodes = [self._start(rank, nodes) for rank in range(nodes)]
        self._assemble(protect)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            node.stream.close(goodbye=True)
            node.process.send_signal(signal.SIGKILL)
            node.process.wait()
            for slot in node.slots:
                slot.close()
        shutil.rmtree(self._base, ignore_errors=True)

    def _start(self, rank: int, world: int) -> Node:
        shm = self._base / f"node{rank}"
        shm.mkdir(parents=True, mode=0o700)
        self._base.chmod(0o700)
        process = start_agent(rank, self._job, shm)
        settings = NodeSettings.read({}, job=self._job, shm=str(shm))
        heard: queue.SimpleQueue[wire.FromAgent] = queue.SimpleQueue()
        said = hello(
            settings, __version__, rank=rank, world=world, slots=2, image_bytes=self._image_bytes + 4096,
            table_bytes=table_bytes_for(self._image_bytes, 65_536),
        )  # fmt: skip
        stream = Attachment(settings, said, hear=heard.put, lost=lambda *_: None, timeout_s=_WAIT_S)
        slots = [Slot.open(place_of(place, rank)) for place in stream.welcome.slots]
        random = np.random.default_rng(rank)
        for slot in slots:
            slot.image[:] = random.integers(0, 256, len(slot.image), np.uint8)
        return Node(rank, settings, process, stream, slots, heard)

    def _assemble(self, protect: str) -> None:
        peers = [
            wire.Peer(
                agent=node.stream.welcome.agent,
                address=node.stream.welcome.listen,
                domains=list(node.stream.welcome.domains),
                ranks=[node.rank],
                slots=2,
                image_bytes=node.slots[0].place.image_bytes,
                table_bytes=node.slots[0].place.table_bytes,
            )
            for node in self._nodes
        ]
        roster = wire.Roster(run=self._run, protect=protect, timeout_s=_WAIT_S, peers=peers)
        for node in self._nodes:
            node.stream.send(wire.FromTrainer(roster=roster))
            node.stream.send(wire.FromTrainer(layout=wire.LayoutText(number=1, text=self._layout)))
        for node in self._nodes:
            answer = node.await_("rostered").rostered
            assert not answer.error, answer.error

    def protect(self) -> Done:
        """One snapshot, from the first "copied" until every node holds its parity."""
        self._step += 1
        id = SnapshotId(1, self._step, self._run)
        index, nonces = self._step % 2, [new_nonce() for _ in self._nodes]
        for node in self._nodes:
            node.slots[index].unseal_to_fill()
        cpu_s, began_s = sum(node.cpu_s for node in self._nodes), time.perf_counter()
        for node, nonce in zip(self._nodes, nonces, strict=True):
            node.stream.send(wire.FromTrainer(copied=self._copied(id, index, nonce)))
        for node in self._nodes:
            guarded = node.await_("guarded").guarded
            assert guarded.id.step == self._step
        seconds = time.perf_counter() - began_s
        cpu_s = sum(node.cpu_s for node in self._nodes) - cpu_s
        for node, nonce in zip(self._nodes, nonces, strict=True):
            node.slots[index].commit(nonce)
            node.slots[index].mark_complete()
        self._newest = id
        return Done(sum(self._status(node).group.pulled_bytes for node in self._nodes), seconds, cpu_s)

    def _copied(self, id: SnapshotId, index: int, nonce: int) -> wire.Copied:
        return wire.Copied(
            slot=index, nonce=nonce, run=id.run, generation=1, step=id.step, watermark=-1, layout=1,
            image_bytes=self._image_bytes, keep=wire_id(self._newest) if self._newest else None,
        )  # fmt: skip

    def rebuild(self) -> float:
        """Seconds to compute the newest image of rank 0 on another node, with rank 0's own out of the question."""
        assert self._newest is not None
        images, parities = [], []
        for node in self._nodes[1:]:
            with AgentClient.at(node.settings) as client:
                held = client.inventory()
            for image in held.images:
                if image.step == self._newest.step and image.rank == node.rank:
                    images.append(
                        wire.Source(
                            rank=image.rank, agent=held.agent, address=held.address, checks_crc=image.checks_crc
                        )
                    )
            for parity in held.parities:
                if parity.id.step == self._newest.step:
                    parities.append(wire.ParitySource(parity=parity, agent=held.agent, address=held.address))
        request = wire.MaterialiseRequest(
            id=wire_id(self._newest), rank=0, world=len(self._nodes), images=images, parities=parities
        )
        began_s = time.perf_counter()
        with AgentClient.at(self._nodes[1].settings) as client:
            client.materialise(request, _WAIT_S)
        return time.perf_counter() - began_s

    def calls(self) -> tuple[int, int]:
        """Calls between agents so far, and their bytes; all nodes together."""
        groups = [self._status(node).group for node in self._nodes]
        return sum(group.calls for group in groups), sum(group.call_bytes for group in groups)

    def _status(self, node: Node) -> Any:
        with AgentClient.at(node.settings) as client:
            return client.status()
