"""P1 and P6 on one node: whatever is killed, whenever, training goes on from a sealed step, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from faults.conftest import MakeJob

TRAINER_PLACES = [
    "capture.before-open=1",
    "capture.before-open=5",
    "capture.opened=1",
    "capture.opened=4",
    "capture.inside-copy=1",
    "capture.inside-copy=5",
    "capture.copied=1",
    "capture.copied=4",
    "fence.before-commit=1",
    "fence.before-commit=5",
    "fence.committed=1",
    "fence.committed=4",
]
RESTORE_PLACES = ["restore.planned=1", "restore.inside-apply=1", "restore.applied=1"]
AGENT_PLACES = ["seal.before-tables=3", "seal.before-record=3", "seal.after-record=4"]


@pytest.mark.parametrize("place", TRAINER_PLACES)
def test_trainer_dies_at_a_named_place(make_job: MakeJob, place: str) -> None:
    job = make_job(steps=25)
    job.start(crash=place)
    job.wait_death()
    job.start()
    job.finish()
    job.judge()


@pytest.mark.parametrize("place", RESTORE_PLACES)
def test_trainer_dies_while_restoring(make_job: MakeJob, place: str) -> None:
    """A restore that was cut off changes nothing about what can be restored."""
    job = make_job(steps=30)
    job.start()
    job.wait_for("complete snapshot", lambda log: any(e.get("watermark", 0) > 3 for e in log))
    job.kill_ranks(0)
    job.end_ranks()
    for _ in range(2):
        job.start(crash=place)
        job.wait_death()
    job.start()
    job.finish()
    assert job.judge()[-1] > 3


@pytest.mark.parametrize("place", AGENT_PLACES)
def test_agent_dies_at_a_named_place(make_job: MakeJob, place: str) -> None:
    """The trainer trains on, starts another agent, and snapshots are sealed again."""
    job = make_job(steps=5000)
    job.start_agent(crash=place)
    job.start()
    assert job.agent is not None
    assert job.agent.wait(60) == -signal.SIGKILL
    job.kills += 1
    at = max((e.get("step", 0) for e in job.log()), default=0)
    job.wait_for("snapshots after the agent's death", lambda log: any(e.get("watermark", 0) > at + 5 for e in log))
    job.kill_ranks(0)
    job.end_ranks()
    job.start()
    job.wait_progress(1)
    job.finish(enough=True)
    assert job.judge()[-1] > at


def test_agent_dies_while_adopting(make_job: MakeJob) -> None:
    job = make_job(steps=40)
    job.start()
    job.wait_for("complete snapshot", lambda log: any(e.get("watermark", 0) > 5 for e in log))
    job.kill_ranks(0)
    job.end_ranks()
    job.signal_agent()
    job.start_agent(crash="adopt.scanned")
    assert job.agent is not None
    assert job.agent.wait(60) == -signal.SIGKILL
    job.kills += 1
    job.start()
    job.finish()
    assert job.judge()[-1] > 5


def test_agent_dies_while_reserving(make_job: MakeJob) -> None:
    """Half-made slots are swept up by the next agent."""
    job = make_job(steps=10)
    job.start_agent(crash="attach.reserved=2")
    job.start()
    job.ranks[0].join(60)
    assert job.agent is not None
    assert job.agent.wait(60) == -signal.SIGKILL
    job.kills += 1
    assert job.ranks[0].exitcode == 1  # before training starts, trouble is an error
    job.start()
    job.finish()
    job.judge()
    assert not list(job.shm.glob("*.new"))


def test_trainer_dies_while_the_agent_stands_still(make_job: MakeJob) -> None:
    """What was sealed before stays; what the agent never heard of is lost, and nothing else."""
    job = make_job(steps=12, step_s=0.05)
    job.start()
    job.wait_progress(4)
    pid = job.agent_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # nothing is recorded any more
    job.wait_progress(7)
    job.kill_ranks(0)
    job.end_ranks()
    os.kill(pid, signal.SIGCONT)
    job.start()
    job.finish()
    began = job.judge()
    stopped_at = [e["step"] for e in job.log() if e.get("life") == 2 and "step" in e][-1]
    assert began[-1] >= 3, f"restored {began[-1]}, stopped at {stopped_at}"


@pytest.mark.parametrize("batch", range(4))
def test_trainer_killed_at_random_instants(make_job: MakeJob, rng: random.Random, batch: int) -> None:
    job = make_job(steps=110)
    for _ in range(9):
        job.start()
        job.wait_progress(rng.randint(1, 10))
        time.sleep(rng.uniform(0, 2 * job.step_s))  # anywhere within a step
        job.kill_ranks(0)
        job.end_ranks()
    job.start()
    job.finish()
    job.judge()
    assert job.kills == 9


@pytest.mark.parametrize("batch", range(2))
def test_agent_killed_at_random_instants(make_job: MakeJob, rng: random.Random, batch: int) -> None:
    """Training is never interrupted: it is one life."""
    job = make_job(steps=5000)
    job.start()
    for _ in range(6):
        job.wait_newer()
        time.sleep(rng.uniform(0, 2 * job.step_s))
        job.signal_agent()
    job.kill_ranks(0)
    job.end_ranks()
    job.start()
    job.wait_progress(1)
    job.finish(enough=True)
    assert job.kills == 7
    assert job.judge()[-1] > 0


@pytest.mark.parametrize("batch", range(2))
def test_all_killed_at_random_instants(make_job: MakeJob, rng: random.Random, batch: int) -> None:
    job = make_job(steps=80)
    for _ in range(5):
        job.start()
        job.wait_progress(rng.randint(1, 12))
        time.sleep(rng.uniform(0, 2 * job.step_s))
        job.kill_ranks(0)
        job.signal_agent()
        job.end_ranks()
    job.start()
    job.finish()
    job.judge()
    assert job.kills == 10


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_rank_of_two_killed_at_random_instants(make_job: MakeJob, rng: random.Random, strategy: str) -> None:
    job = make_job(world=2, steps=60, strategy=strategy)
    for _ in range(6):
        job.start()
        job.wait_progress(rng.randint(2, 8))
        time.sleep(rng.uniform(0, 2 * job.step_s))
        job.kill_ranks(rng.randrange(2))
        job.end_ranks()
    job.start()
    job.finish()
    assert job.judge()[-1] > 0


@pytest.mark.parametrize(
    "place", ["capture.opened=3", "capture.copied=3", "fence.before-commit=3", "fence.committed=3"]
)
def test_one_rank_of_two_dies_at_a_named_place(make_job: MakeJob, rng: random.Random, place: str) -> None:
    """One rank may have sealed what the other had not: both go back to the same step."""
    job = make_job(world=2, steps=25, strategy="ddp")
    job.start(crash=place, crash_rank=rng.randrange(2))
    for process in job.ranks:
        process.join(60)
    assert -signal.SIGKILL in [process.exitcode for process in job.ranks]
    job.kills += 1
    job.end_ranks()
    job.start()
    job.finish()
    job.judge()


def test_stopped_agent_costs_snapshots_not_training(make_job: MakeJob) -> None:
    """SIGSTOP: training goes on, snapshots are skipped and counted; SIGCONT: they are taken again."""
    job = make_job(steps=5000)
    job.start()
    job.wait_for("complete snapshot", lambda log: any(e.get("watermark", 0) > 2 for e in log))
    job.signal_agent(signal.SIGSTOP)
    seen = len(job.log())
    job.wait_for("40 steps without an agent", lambda log: len(log) > seen + 40)
    before, after = job.log()[seen - 1], job.log()[-1]
    assert sum(after["skipped"].values()) - sum(before["skipped"].values()) >= 30
    job.signal_agent(signal.SIGCONT)
    newest = job.log()[-1]["watermark"]
    job.wait_for("snapshots again", lambda log: log[-1].get("watermark", 0) > newest)
    job.finish(enough=True)
    job.judge()
