"""How the ranks of a run are started, and started again when one of them dies.

On one node that is torchrun. On simulated ones ``Workers`` does what it would do, because one torchrun for each of them would
keep the store by which they meet on one of the nodes, to be lost with it, and import torch once more for every node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from .journal import LOG_NAME
from .nodes import Node, Simulated

EXIT_S: Final = 15.0
_WORKER: Final = "holdfast.ops.demo.worker"


class Launcher(Protocol):
    """Runs all ranks of a run, over several lives."""

    def start(self, first_life: int) -> None:
        """Start every rank; lives are counted from *first_life*."""

    def poll(self) -> int | None:
        """None while the job goes on, else the code of why it was given up; 0 once all ranks exited so, finished or preempted."""

    def end(self) -> None:
        """End every rank that runs, kindly first."""


class Torchrun:
    """The ranks of one node, under torchrun."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str], *, ranks: int, restarts: int
    ) -> None:
        """*arguments* are the worker's; *restarts* are done by torchrun itself."""
        self._folder, self._arguments, self._environment = folder, arguments, environment
        self._options = [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, first_life: int) -> None:
        torchrun = ["torch.distributed.run", "--standalone", "--monitor-interval=0.1", "--shutdown-timeout=5"]
        worker = ["-m", _WORKER, *self._arguments, f"--first-life={first_life}"]
        self._process = _popen([*torchrun, *self._options, *worker], self._folder, self._environment)

    def poll(self) -> int | None:
        return self._process.poll() if self._process else None

    def end(self) -> None:
        if self._process is not None:
            _end([self._process])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Workers:
    """The ranks of simulated nodes. If one fails, all are ended, lost nodes are replaced, and all are started again."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        nodes: Simulated,
        restarts: int,
    ) -> None:
        self._folder, self._arguments, self._environment = folder, arguments, environment
        self._nodes, self._restarts = nodes, restarts
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._life = 0
        self._left = 0

    def start(self, first_life: int) -> None:
        self._life, self._left = first_life, self._restarts
        self._nodes.go_on() if first_life else self._nodes.start()
        self._launch()

    def poll(self) -> int | None:
        self._nodes.start()
        codes = [rank.poll() for rank in self._ranks]
        if all(code == 0 for code in codes):
            return 0
        failed = next((code for code in codes if code), None)
        if failed is None:
            return None
        self.end()
        if not self._left:
            return failed
        self._left -= 1
        self._life += 1
        self._nodes.go_on()
        self._launch()
        return None

    def end(self) -> None:
        _end(self._ranks)

    def _launch(self) -> None:
        world = sum(len(node.ranks) for node in self._nodes.nodes)
        self._ranks = []
        for node in self._nodes.nodes:
            for local, rank in enumerate(
                node.ranks
            ):  # one by one, so that ``end`` finds them whenever we are interrupted
                self._ranks.append(self._launch_rank(node, local, rank, world))

    def _launch_rank(self, node: Node, local: int, rank: int, world: int) -> subprocess.Popen[bytes]:
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(world),
            "HOLDFAST_SHM": str(node.shm),
            "HOLDFAST_AGENT": str(node.socket),
        }
        store = self._folder / f"store-life{self._life}"
        arguments = [_WORKER, *self._arguments, f"--first-life={self._life}", f"--store={store}"]
        return _popen(arguments, self._folder, {**self._environment, **place})


def _popen(
    module_and_arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    with (folder / LOG_NAME).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End them all, kindly first."""
    for process in processes:
        process.terminate()
    deadline_s = time.monotonic() + EXIT_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(EXIT_S)
