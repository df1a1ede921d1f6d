"""A node to attach to, and the means to compare training states bit for bit. Used by tests of several folders.

Imported as ``holdfast.tests.hooks.nodes``: ``hooks`` alone would be the package's own folder where tests start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from holdfast import Checkpointer, Deadlines
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import AgentClient
from holdfast.agent.settings import NodeSettings
from holdfast.snapshot.arena import Place, Slot
from holdfast.snapshot.record import Record
from torch import nn
from torch.distributed.tensor import DTensor

WAIT_S = 120.0
QUICK = Deadlines(attach=WAIT_S, restore=WAIT_S, beat=WAIT_S, fence=WAIT_S, close=WAIT_S)


# -- the node ------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One job on one node: its folder of shared memory and whatever agent serves it. ``remove`` leaves nothing behind."""

    job: str = field(default_factory=lambda: f"t-{uuid.uuid4().hex[:10]}")
    agents: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def shm(self) -> Path:
        return Path("/dev/shm") / self.job

    @property
    def settings(self) -> NodeSettings:
        return NodeSettings.read({}, job=self.job, shm=str(self.shm))

    def start(self, *options: str, job: str | None = None, **environment: str) -> subprocess.Popen[str]:
        """An agent in the foreground, ready; or ended, if it refused to start."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - no pipe: an agent that logs much must not wait for a reader
        agent = subprocess.Popen(
            [sys.executable, "-m", "holdfast", "agent", "--job", job or self.job, "--shm", str(self.shm), *options],
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        agent.log = log  # type: ignore[attr-defined]
        self.agents.append(agent)
        assert agent.stdout is not None
        agent.ready = agent.stdout.readline()  # type: ignore[attr-defined]
        return agent

    @staticmethod
    def ended(agent: subprocess.Popen[str]) -> str:
        """Wait for the end of an agent that was started here; its log."""
        agent.wait(WAIT_S)
        assert agent.stdout is not None
        agent.stdout.close()
        log = agent.log  # type: ignore[attr-defined]
        if log.closed:
            return ""
        with log:
            log.seek(0)
            return str(log.read())

    def attach(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Any = None,
        extras: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Checkpointer:
        """A checkpointer of this job, with deadlines that no busy machine passes."""
        options = {"job": self.job, "shm": str(self.shm), "deadlines": QUICK, **options}
        return Checkpointer(model, optimizer, extras, **options)

    def status(self) -> wire.StatusReport:
        with AgentClient.at(self.settings) as client:
            return client.status(WAIT_S)

    def pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.shm / "agent.pid").read_text())
        return None

    def stop(self) -> None:
        """End the agent, wherever it came from, as an operator would; what it holds stays."""
        pid = self.pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                until(lambda: not _alive(pid), "the agent to end")
        for agent in self.agents:
            agent.kill()
            self.ended(agent)
        self.agents.clear()

    def wipe(self) -> None:
        """Unseal all slots, so that the next test finds nothing. The agent learns it from the slots."""
        for slot in self.slots():
            slot.unseal()
            slot.close()

    def slots(self) -> list[Slot]:
        """All slots, mapped; the caller closes them."""
        return [open_slot(path) for path in sorted(self.shm.glob("rank-*.slot-?"))]

    def sealed(self) -> dict[int, Record]:
        """The sealed records of rank 0, by slot."""
        found = {}
        for slot in self.slots():
            record = slot.sealed_record()
            if record is not None and record.rank == 0:
                found[slot.place.index] = record
            slot.close()
        return found

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.shm, ignore_errors=True)


def open_slot(path: Path) -> Slot:
    """Map a slot by what its record says."""
    _, rank, index = path.name.replace(".", "-").replace("slot-", "").split("-")
    room = path.stat().st_size - 8192
    with contextlib.suppress(Exception):
        record, _ = Record.from_bytes(path.read_bytes()[:255])
        return Slot.open(Place(str(path), int(rank), int(index), record.table_bytes, room - record.table_bytes))
    return Slot.open(Place(str(path), int(rank), int(index), 0, room))


def _alive(pid: int) -> bool:
    """Whether the process runs; a zombie whose parent is slow does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as *condition* holds; fail if that takes too long."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}"
        time.sleep(0.002)


# -- comparing -----------------------------------------------------------------------------------------------------------


def bits(value: Any) -> Any:
    """*value* as something that is equal only to what is the same bit for bit, and prints legibly."""
    if isinstance(value, DTensor):
        return ("DTensor", tuple(value.shape), str(value.placements), bits(value.to_local()))
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)
        return (str(value.dtype), tuple(value.shape), flat.numpy().tobytes().hex())
    if isinstance(value, np.ndarray | np.generic):
        return (str(value.dtype), value.shape, value.tobytes().hex())
    if isinstance(value, Mapping):
        return {key: bits(value[key]) for key in sorted(value, key=repr)}
    if isinstance(value, list | tuple):
        return [bits(entry) for entry in value]
    if isinstance(value, float):
        return value.hex()
    return value


def bits_of_models(models: Mapping[str, nn.Module]) -> Any:
    """Parameters, persistent buffers and extra state."""
    with torch.no_grad():
        return {name: bits(model.state_dict()) for name, model in models.items()}


def bits_of_optimizers(optimizers: Mapping[str, Any]) -> Any:
    """State and groups."""
    with torch.no_grad():
        return {name: bits(optimizer.state_dict()) for name, optimizer in optimizers.items()}
