"""Agents that are gone after the test, and the command line that asks them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.ops import answers, cli
from holdfast.tests.ops.agents import Cluster, Holdfast


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Nodes whose folders lie where ``whom`` looks for them, in shared memory."""
    folder = Path(f"/dev/shm/hf-cli-{uuid.uuid4().hex[:8]}")
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(answers, "_jobs_folder", lambda: folder)
    tls = [f"HOLDFAST_TLS_{name}" for name in ("CA", "CERT", "KEY")]
    for name in ("HOLDFAST_AGENT", "HOLDFAST_SHM", "HOLDFAST_JOB", "SLURM_JOB_ID", *tls):
        monkeypatch.delenv(name, raising=False)
    nodes = Cluster(folder)
    yield nodes
    nodes.close()
    shutil.rmtree(folder)


@pytest.fixture
def holdfast(capsys: pytest.CaptureFixture[str]) -> Holdfast:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return call
