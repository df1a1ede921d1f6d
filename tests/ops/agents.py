"""Agents of simulated nodes, and trainers that speak the agent's protocol themselves: no torch, and hardly any time.

Imported as ``holdfast.tests.ops.agents``: ``ops`` alone would be the package's own folder where tests start.
"""

from __future__ import annotations

import json
import queue
import select
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import Attachment, hello, id_of, place_of, wire_id
from holdfast.agent.settings import NodeSettings
from holdfast.agent.trust import Trust
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import SnapshotId, new_nonce
from holdfast.tests.warm import Agent

DEADLINE_S = 120.0
RUN, OTHER_RUN = "a" * 32, "b" * 32
VALUES = b"not tensors"

Holdfast = Callable[..., tuple[int, str, str]]
"""The command line in this process: exit code, standard output, standard error."""


class Node:
    """One agent in a folder of its own."""

    def __init__(
        self, folder: Path, job: str, name: str, listen: str = "127.0.0.1:0", trust: Trust | None = None
    ) -> None:
        self.settings = NodeSettings(job, folder, folder / "agent.sock", autostart=False)
        self.address = str(self.settings.socket)
        self.name = name
        tls = [f"--tls-ca={trust.ca}", f"--tls-cert={trust.cert}", f"--tls-key={trust.key}"] if trust else []
        self._process = Agent(
            [
                "--job", job, "--shm", str(self.settings.shm), "--socket", self.address, "--name", name,
                "--domain", f"host={name}", "--listen", listen, *tls,
            ]
        )  # fmt: skip
        self.pid = self._process.pid
        self.ready = ""

    def await_ready(self) -> None:
        assert select.select([self._process.stdout], [], [], DEADLINE_S)[0], "the agent did not become ready in time"
        self.ready = self._process.stdout.readline()
        assert f"holdfast agent {self.name} ready" in self.ready

    @property
    def listen(self) -> str:
        return self.ready.partition("listen=")[2].split()[0]

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop the agent and wait for that."""
        self._process.send_signal(number)
        assert self._process.wait(DEADLINE_S) is not None, "the agent does not end"
        self._process.stdout.close()


class Trainer:
    """One rank of a job: takes snapshots of what it is given."""

    def __init__(
        self, node: Node, rank: int = 0, world: int = 1, image_bytes: int = 1 << 16, tiers: Sequence[str] = ()
    ) -> None:
        self.node, self.rank = node, rank
        self._heard: queue.SimpleQueue[wire.FromAgent] = queue.SimpleQueue()
        self._guarded: set[SnapshotId] = set()
        asked = hello(
            node.settings, "0", rank=rank, world=world, slots=2, image_bytes=image_bytes, table_bytes=1 << 16, tiers=tiers
        )  # fmt: skip
        self._attachment = Attachment(
            node.settings, asked, hear=self._heard.put, lost=lambda attachment, error: None, timeout_s=DEADLINE_S
        )
        self.slots = [Slot.open(place_of(slot, rank)) for slot in self._attachment.welcome.slots]

    def report(self, **figures: Any) -> None:
        self._attachment.send(wire.FromTrainer(report=wire.Report(**figures)))

    def join(self, roster: wire.Roster) -> None:
        """Tell the agent who is there."""
        self._attachment.send(wire.FromTrainer(roster=roster))
        answer = self._next("rostered").rostered
        assert not answer.error, answer

    def open(self, index: int, id: SnapshotId) -> None:
        self.slots[index].unseal_to_fill()

    def seal(self, index: int, id: SnapshotId, layout: Layout, image: bytes) -> str:
        """Take one snapshot; returns the path of its slot. All that was sent before has been heard by then."""
        self.open(index, id)
        slot = self.slots[index]
        slot.image[: len(image)] = np.frombuffer(image, np.uint8)
        text = wire.LayoutText(number=layout.number, text=layout.to_text())
        nonce = new_nonce()
        copied = wire.Copied(
            slot=index, nonce=nonce, run=id.run, generation=id.generation, step=id.step, watermark=-1,
            layout=layout.number, image_bytes=len(image),
        )  # fmt: skip
        self._attachment.send(wire.FromTrainer(layout=text))
        self._attachment.send(wire.FromTrainer(copied=copied))
        self._next("prepared")
        slot.commit(nonce)
        return slot.place.path

    def await_guarded(self, id: SnapshotId) -> None:
        """Return once the agent holds all its parity of the snapshot."""
        while id not in self._guarded:
            self._guarded.add(id_of(self._next("guarded").guarded.id))

    def spill(self, id: SnapshotId, tiers: int = 1) -> None:
        """Have the image written to so many tiers, and wait for that."""
        self._attachment.send(wire.FromTrainer(spill=wire.Spill(id=wire_id(id), tiers=tiers)))
        for _ in range(tiers):
            assert not (done := self._next("spilled").spilled).error, done

    def heard(self, kind: str) -> wire.FromAgent:
        """The next message of that kind."""
        return self._next(kind)

    def _next(self, kind: str) -> wire.FromAgent:
        while True:
            heard = self._heard.get(timeout=DEADLINE_S)
            if heard.WhichOneof("kind") == kind:
                return heard
            assert heard.WhichOneof("kind") == "guarded", heard
            self._guarded.add(id_of(heard.guarded.id))

    def leave(self, *, goodbye: bool = False) -> None:
        self._attachment.close(goodbye=goodbye)
        for slot in self.slots:
            slot.close()
        self.slots = []


class Cluster:
    """Nodes and trainers of one test; all of them are gone after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._nodes: list[Node] = []
        self.trainers: list[Trainer] = []

    def node(self, job: str = "job", name: str = "n0", folder: str = "", **options: Any) -> Node:
        """A node, ready."""
        node = self._start(folder or job, job, name, **options)
        node.await_ready()
        return node

    def nodes(self, count: int, job: str = "job", trust: Trust | None = None) -> list[Node]:
        """Nodes of one job, on loopback addresses of their own."""
        nodes = [
            self._start(f"{job}-n{index}", job, f"n{index}", listen=f"127.0.0.{index + 1}:0", trust=trust)
            for index in range(count)
        ]
        for node in nodes:
            node.await_ready()
        return nodes

    def _start(self, folder: str, job: str, name: str, **options: Any) -> Node:
        self._nodes.append(Node(self.folder / folder, job, name, **options))
        return self._nodes[-1]

    def trainer(self, node: Node, **options: Any) -> Trainer:
        self.trainers.append(Trainer(node, **options))
        return self.trainers[-1]

    def group(self, nodes: Sequence[Node], protect: str) -> list[Trainer]:
        """One rank on each node, all of which know of each other."""
        trainers = [self.trainer(node, rank=rank, world=len(nodes)) for rank, node in enumerate(nodes)]
        roster = wire.Roster(
            run=RUN, protect=protect, timeout_s=DEADLINE_S,
            peers=[
                wire.Peer(
                    agent=node.name, address=node.listen, domains=[wire.Domain(level="host", name=node.name)],
                    ranks=[rank], slots=2, image_bytes=1 << 16, table_bytes=1 << 16,
                )
                for rank, node in enumerate(nodes)
            ],
        )  # fmt: skip
        for trainer in trainers:
            trainer.join(roster)
        return trainers

    def lose(self, *nodes: Node) -> None:
        """Kill agent and trainer of these nodes, and delete what they held."""
        for node in nodes:
            self._nodes.remove(node)
            node.end(signal.SIGKILL)
            for trainer in [trainer for trainer in self.trainers if trainer.node is node]:
                self.trainers.remove(trainer)
                trainer.leave()
            shutil.rmtree(node.settings.shm)

    def snapshot(self, trainers: Sequence[Trainer], index: int, id: SnapshotId) -> None:
        """Have every rank take a snapshot, and wait until all of it is protected, and known to be."""
        for trainer in trainers:
            trainer.seal(index, id, *small(rank=trainer.rank, world=len(trainers)))
        for trainer in trainers:
            trainer.await_guarded(id)
            trainer.slots[index].mark_complete()

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.leave()
        for node in self._nodes:
            node.end(signal.SIGKILL)


def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds; fail if that takes too long."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def document(holdfast: Holdfast, *arguments: str) -> dict[str, Any]:
    code, out, err = holdfast(*arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def small(number: int = 1, *, rank: int = 0, world: int = 1) -> tuple[Layout, bytes]:
    """A layout and an image: rows of a weight that the ranks share, and a scalar."""
    layout = Layout.of(
        number,
        [
            Slice("net.weight", "float32", (2 * world, 3), (2 * rank, 0), (2, 3)),
            Slice("optimizer.step", "int64", (), (), ()),
        ],
    )
    tensors = np.random.default_rng(rank).bytes(layout.values_offset)
    return layout, tensors + VALUES
