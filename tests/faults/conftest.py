"""Jobs that clean up after themselves."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.cluster import Cluster
from faults.job import Job

MakeJob = Callable[..., Job]
MakeCluster = Callable[..., Cluster]


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[MakeJob]:
    """Makes jobs, and removes them with all that they left."""
    jobs: list[Job] = []

    def make(**options: Any) -> Job:
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        job = Job(folder, **options)
        jobs.append(job)
        return job

    yield make
    for job in jobs:
        job.remove()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Makes clusters, and removes them with all that they left."""
    made: list[Cluster] = []

    def make(*args: Any, **options: Any) -> Cluster:
        folder = tmp_path / f"cluster{len(made)}"
        folder.mkdir()
        cluster = Cluster(folder, *args, **options)
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.remove()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Seeded by HOLDFAST_SEED or freshly; the seed is shown with every failure."""
    seed = int(os.environ.get("HOLDFAST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"HOLDFAST_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")
