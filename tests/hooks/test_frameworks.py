"""Lightning, Hugging Face's Trainer and Accelerate: killed anywhere, they go on bit for bit, as if without Holdfast."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from holdfast.tests.hooks.frameworks import JOBS

PARTS = [(framework, job) for framework, jobs in JOBS.items() for job in jobs]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Where the logs of a framework's jobs are."""

    @cache
    def play(framework: str) -> Path:
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
        folder = tmp_path_factory.mktemp(framework)
        done = subprocess.run(
            [sys.executable, "-m", "holdfast.tests.hooks.frameworks", framework, folder],
            capture_output=True, text=True, timeout=170, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return folder

    return play


def _log(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


@pytest.mark.xdist_group("frameworks")
@pytest.mark.parametrize(("framework", "job"), PARTS)
def test_it_goes_on_bit_for_bit(played, framework: str, job: str) -> None:  # type: ignore[no-untyped-def]
    """Whatever a life saw, of losses, evaluations, rates and its own counts, the undisturbed job saw too."""
    folder = played(framework)
    for rank in range(JOBS[framework][job].world):
        whole = _log(folder, f"{job}.whole.{rank}")
        last = len(JOBS[framework][job].ends)
        for life in range(last + 1):
            lived = _log(folder, f"{job}.{life}.{rank}")
            assert not [line for line in lived if line not in whole], f"rank {rank}, life {life}"
            began = json.loads(lived[0])["what"]
            assert (began == json.loads(whole[0])["what"]) == (life == 0), f"life {life} began at {began}"
        assert lived[-1] == whole[-1]
        assert lived == whole[-len(lived) :]  # nothing twice, and nothing left out


@pytest.mark.xdist_group("frameworks")
@pytest.mark.parametrize("framework", JOBS)
def test_its_example_goes_on(played, framework: str) -> None:  # type: ignore[no-untyped-def]
    folder = played(framework)
    first, second = ((folder / f"example.{life}.0.out").read_text() for life in (0, 1))
    assert not re.search(r"goes on from step [1-9]", first)
    assert re.search(r"goes on from step [1-9]", second)
