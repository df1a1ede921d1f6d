"""Lightning, Hugging Face's Trainer and Accelerate: killed anywhere, they go on bit for bit, as if without Holdfast."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from holdfast.tests.hooks.frameworks import JOBS, Job


@pytest.mark.slow
@pytest.mark.parametrize("framework", JOBS)
def test_it_goes_on_bit_for_bit(framework: str, tmp_path: Path) -> None:
    """All jobs of a framework, and its example: one test, as what takes long is to import it."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "holdfast.tests.hooks.frameworks", framework, tmp_path],
        capture_output=True, text=True, timeout=170, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    for name, job in JOBS[framework].items():
        for rank in range(job.world):
            _judge(tmp_path, name, job, rank)
    first, second = ((tmp_path / f"example.{life}.0.out").read_text() for life in (0, 1))
    assert not re.search(r"goes on from step [1-9]", first)
    assert re.search(r"goes on from step [1-9]", second)


def _judge(folder: Path, name: str, job: Job, rank: int) -> None:
    """Whatever a life saw, of losses, evaluations, rates and its own counts, the undisturbed job saw too."""
    whole = (folder / f"{name}.whole.{rank}").read_text().splitlines()
    for life in range(len(job.ends) + 1):
        lived = (folder / f"{name}.{life}.{rank}").read_text().splitlines()
        assert not [line for line in lived if line not in whole], f"{name}, rank {rank}, life {life}"
        began = json.loads(lived[0])["what"]
        assert (began == json.loads(whole[0])["what"]) == (life == 0), f"{name}, life {life} began at {began}"
    assert lived == whole[-len(lived) :], "the last life left something out, or did something twice"
