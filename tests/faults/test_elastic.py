"""``holdfast run -- torchrun --nnodes 2:3``: a node burns and is not replaced, later another one joins; nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import elastic
from faults.cluster import Cluster
from faults.conftest import MakeCluster
from faults.job import DEADLINE_S

WORKER = Path(elastic.__file__)


class Elastic:
    """One torchrun on each node, each under ``holdfast run``."""

    def __init__(self, cluster: Cluster, folder: Path, port: int) -> None:
        self.cluster, self.folder, self.port = cluster, folder, port
        self.runs: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, node: int) -> None:
        shm = self.cluster.there[node].shm
        command = [
            sys.executable, "-m", "holdfast", "run", "--job", self.cluster.job, "--shm", str(shm), "--",
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2:3", "--nproc-per-node", "1",
            "--max-restarts", "5", "--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-id", "elastic",
            "--rdzv-endpoint", f"127.0.0.1:{self.port}", "--rdzv-conf", "last_call_timeout=1,is_host=" + str(node == 0),
            "--local-addr", "127.0.0.1", str(WORKER), str(self.folder),
        ]  # fmt: skip
        with (self.folder / f"run{node}.err").open("ab") as log:
            self.runs[node] = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def lose(self, node: int) -> None:
        """The node burns: torchrun, its worker, the agent, and the memory."""
        run = self.runs.pop(node)
        tree = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
        for process in reversed(tree):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        run.wait(DEADLINE_S)
        self.cluster.lose(node)

    def lines(self) -> list[dict[str, Any]]:
        """What all workers wrote; a line that is being written is left out."""
        texts = [line for path in self.folder.glob("*.jsonl") for line in path.read_text().split("\n")[:-1]]
        return [json.loads(text) for text in texts]

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"no {what}\n{self.errors()}"
            assert all(run.poll() is None for run in self.runs.values()), f"ended before {what}\n{self.errors()}"
            time.sleep(0.02)

    def errors(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.err"))

    def end(self) -> None:
        for run in self.runs.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            run.wait(DEADLINE_S)


@pytest.fixture
def job(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[Elastic]:
    cluster = make_cluster(3, "auto")
    cluster.begin()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = Elastic(cluster, tmp_path, port)
    yield job
    job.end()


def _protected(job: Elastic, world: int) -> int:
    """The newest step that so many ranks know to be protected, and came to in this world."""
    steps = [
        e["watermark"] or 0
        for e in job.lines()
        if e["world"] == world and "step" in e and e["step"] > (e["watermark"] or 0)
    ]
    return max(steps, default=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_shrinks_and_grows(job: Elastic) -> None:
    for node in range(3):
        job.start(node)
    job.until("protected step of three", lambda: _protected(job, 3) > 3)
    job.lose(2)
    known = _protected(job, 3)
    job.until("protected step of two", lambda: _protected(job, 2) > known + 3)
    before = _protected(job, 2)
    job.cluster.begin()
    job.start(2)
    job.until("protected step of three again", lambda: _protected(job, 3) > before + 3)
    (job.folder / "stop").touch()
    for run in job.runs.values():
        assert run.wait(DEADLINE_S) == 0, job.errors()
    lines = job.lines()
    lives = [entry for entry in lines if "restored" in entry]
    assert {(entry["world"], entry["restored"] > 0) for entry in lives} == {(3, False), (2, True), (3, True)}
    assert all(entry["restored"] >= known for entry in lives if entry["world"] == 2)
    assert all(entry["restored"] >= before for entry in lives if entry["world"] == 3 and entry["restored"])
    for entry in lives:
        # Whoever came to that step before, as a rank of whatever world, had the very same tensors.
        same = [e["tensors"] for e in lines if e.get("step") == entry["restored"]]
        assert not entry["restored"] or entry["tensors"] in same
