"""A journal is readable whatever instant its writer was killed at, and victims are exactly the processes announced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.ops.demo.journal import (
    Event,
    Follower,
    Journal,
    LifeStarted,
    StepDone,
    Stopped,
    announce,
    announced,
    clear,
    clear_tier,
    finish,
    finished,
    read_run,
    started_ticks,
)
from holdfast.ops.demo.nodes import Node
from holdfast.ops.demo.schedule import Planned, Target
from holdfast.ops.demo.victims import Job

EVENTS: list[Event] = [
    LifeStarted(0, 0, 1.5, {"import": 0.5}),
    StepDone(0, 1, (0.1).hex(), 2.0),
    StepDone(0, 2, (0.2).hex(), 3.0, 0.25),
    Stopped(0, 2, 3.5),
]


def write(folder: Path, *events: Event) -> None:
    with Journal(folder, 0) as journal:
        for event in events:
            journal.write(event)


def test_events_come_back_as_written_and_each_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path, 0)
    assert list(follower.news()) == []
    write(tmp_path, *EVENTS[:2])
    assert list(follower.news()) == EVENTS[:2]
    write(tmp_path, *EVENTS[2:])
    assert list(follower.news()) == EVENTS[2:]
    assert list(follower.news()) == []


def test_a_journal_cut_anywhere_loses_its_last_line_only(tmp_path: Path) -> None:
    write(tmp_path, *EVENTS)
    path = tmp_path / "losses-rank0.jsonl"
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        follower = Follower(tmp_path, 0)
        survivors = EVENTS[: sum(end <= cut for end in ends)]
        assert list(follower.news()) == survivors
        write(tmp_path, StepDone(1, 9, (0.9).hex(), 9.0))
        assert list(follower.news()) == [StepDone(1, 9, (0.9).hex(), 9.0)]
        assert list(Follower(tmp_path, 0).news()) == [*survivors, StepDone(1, 9, (0.9).hex(), 9.0)]


def test_a_run_is_read_by_rank_and_life_and_cleared(tmp_path: Path) -> None:
    write(tmp_path, *EVENTS, LifeStarted(1, 1, 4.0, {}), StepDone(1, 2, (0.2).hex(), 5.0))
    finish(tmp_path, 0, {"step": 2})
    keep = tmp_path / "notes.txt"
    keep.write_text("mine")
    first, second = read_run(tmp_path, 2)
    assert [(life.life, life.start, [done.step for done in life.steps], life.stopped) for life in first.lives] == [
        (0, 0, [1, 2], EVENTS[-1]),
        (1, 1, [2], None),
    ]
    assert first.final == {"step": 2}
    assert (second.lives, second.final) == ([], None)
    assert (finished(tmp_path, 1), finished(tmp_path, 2)) == (True, False)
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == [keep]


def test_of_a_tier_that_an_earlier_demo_made_only_that_is_removed(tmp_path: Path) -> None:
    clear_tier(tmp_path)
    for name in ("entries", "snapshots", "deleted", "mine"):
        (tmp_path / "tier" / name / "one").mkdir(parents=True)
    clear_tier(tmp_path)
    assert [path.name for path in (tmp_path / "tier").iterdir()] == ["mine"]
    (tmp_path / "tier" / "mine" / "one").rmdir()
    (tmp_path / "tier" / "mine").rmdir()
    clear_tier(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_announces_who_it_is(tmp_path: Path) -> None:
    assert announced(tmp_path, 3) is None
    announce(tmp_path, 3, life=7)
    entry = announced(tmp_path, 3)
    assert entry == {"pid": os.getpid(), "started_ticks": started_ticks(os.getpid()), "life": 7}
    assert started_ticks(2**22 + 1) is None, "no such pid can be"


@contextlib.contextmanager
def sleeper(*names: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, with *names* on its command line."""
    code = "import signal; print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code, *names], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # from here on its command line is that of the new program
            yield process
        finally:
            process.kill()


def announce_other(folder: Path, rank: int, process: subprocess.Popen[bytes], *, life: int, ticks_off: int = 0) -> None:
    ticks = started_ticks(process.pid)
    assert ticks is not None
    entry = {"pid": process.pid, "started_ticks": ticks + ticks_off, "life": life}
    (folder / f"pid-rank{rank}.json").write_text(json.dumps(entry))


def job_of(shm: Path) -> Job:
    """Two ranks on one node; the journal and the memory share a folder."""
    return Job(shm, [Node("", shm, (0, 1))])


def test_a_lost_node_takes_its_ranks_and_its_agent_along(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("n0", "n1", "n2")}
    nodes = [
        Node(name, shm, ranks) for (name, shm), ranks in zip(places.items(), [(3, 5), (1, 2), (0, 4)], strict=True)
    ]
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(sleeper()) for _ in range(6)]
        agents = [stack.enter_context(sleeper("agent", "--shm", str(shm))) for shm in places.values()]
        for rank, process in enumerate(ranks):
            announce_other(tmp_path, rank, process, life=0)
        for shm, agent in zip(places.values(), agents, strict=True):
            shm.mkdir()
            (shm / "agent.pid").write_text(str(agent.pid))
        job = Job(tmp_path, nodes)
        with job.victims(Planned(Target.NODE, 1, 0.0, rank=0, nodes=(0, 2)), life=0) as victims:
            assert victims is not None
            assert [victim.name for victim in victims] == [
                "rank 0",
                "rank 3",
                "rank 4",
                "rank 5",
                "agent n0",
                "agent n2",
            ]
        with job.victims(Planned(Target.AGENT, 1, 0.0, rank=0, nodes=(1,)), life=0) as victims:
            assert victims is not None
            assert [victim.pid for victim in victims] == [agents[1].pid]
        job.dismiss_agents()
        assert [agent.wait(timeout=60) for agent in agents] == [-signal.SIGTERM] * 3
    assert not any(shm.exists() for shm in places.values())


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (Target.RANK, ["rank 1"]),
        (Target.TRAINER, ["rank 0", "rank 1"]),
        (Target.AGENT, ["agent"]),
        (Target.ALL, ["rank 0", "rank 1", "agent"]),
        (Target.PREEMPT, ["rank 0", "rank 1"]),
    ],
)
def test_a_kill_hits_all_its_victims_and_nobody_else(tmp_path: Path, target: Target, names: list[str]) -> None:
    with sleeper() as first, sleeper() as second, sleeper("agent", "--shm", str(tmp_path)) as agent:
        everybody = {"rank 0": first, "rank 1": second, "agent": agent}
        announce_other(tmp_path, 0, first, life=2)
        announce_other(tmp_path, 1, second, life=2)
        (tmp_path / "agent.pid").write_text(str(agent.pid))
        job = job_of(tmp_path)
        with job.victims(Planned(target, 1, 0.0, rank=1), life=2) as victims:
            assert victims is not None
            assert [victim.name for victim in victims] == names
            for victim in victims:
                victim.send(signal.SIGKILL)
                assert victim.ended(within_s=10)
        assert [name for name, process in everybody.items() if process.poll() is not None] == names


def test_no_kill_lands_while_one_of_its_victims_is_missing(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    kill = Planned(Target.TRAINER, 1, 0.0, rank=0)
    with sleeper() as first, sleeper() as second:
        announce_other(tmp_path, 0, first, life=2)
        with job.victims(kill, life=2) as victims:
            assert victims is None, "rank 1 has not announced itself"
        announce_other(tmp_path, 1, second, life=1)
        with job.victims(kill, life=2) as victims:
            assert victims is None, "rank 1 is still of an older life"
        announce_other(tmp_path, 1, second, life=2, ticks_off=1)
        with job.victims(kill, life=2) as victims:
            assert victims is None, "another process has been given the pid of rank 1"
        announce_other(tmp_path, 1, second, life=2)
        second.kill()
        second.wait()
        with job.victims(kill, life=2) as victims:
            assert victims is None, "rank 1 is dead"


def test_an_agent_file_that_points_at_a_stranger_hits_nobody(tmp_path: Path) -> None:
    job = job_of(tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    with sleeper("agent", "--shm", "elsewhere") as stranger:
        (tmp_path / "shm" / "agent.pid").write_text(str(stranger.pid))
        job.dismiss_agents()
        assert stranger.poll() is None
    assert not (tmp_path / "shm").exists()


def test_machines_that_are_taken_away_leave_no_agent_and_no_memory(tmp_path: Path) -> None:
    nodes = [Node(name, tmp_path / name, (rank,)) for rank, name in enumerate(("n0", "n1"))]
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(sleeper("agent", "--shm", str(node.shm))) for node in nodes]
        stranger = stack.enter_context(sleeper("agent", "--shm", str(tmp_path / "n2")))
        for node in nodes:
            node.shm.mkdir()
        Job(tmp_path, nodes).take_machines()
        assert [agent.wait(timeout=60) for agent in agents] == [-signal.SIGKILL] * 2, (
            "without a chance to save anything"
        )
        assert stranger.poll() is None
    assert [(node.lost, node.shm.exists()) for node in nodes] == [(True, False)] * 2


def test_an_agent_is_dismissed_even_if_it_has_yet_to_write_its_pid(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    shm.mkdir()
    with sleeper("agent", "--shm", str(shm)) as agent:
        job_of(shm).dismiss_agents()
        assert agent.wait(timeout=60) == -signal.SIGTERM
    assert not shm.exists()
