"""One rank, its agent, and tiers: what is spilled, when, and what comes back when all memory is gone."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast import Checkpointer, Tier
from holdfast.errors import ConfigError, SnapshotLost, StateUnreachable, TierUnreachable
from holdfast.tests.hooks.nodes import WAIT_S, Node, until
from holdfast.tests.hooks.test_checkpointer import Loop, sealed, trained


@pytest.fixture
def nvme(tmp_path: Path) -> Tier:
    return Tier(str(tmp_path / "nvme"), every=1000)


@pytest.fixture
def far(tmp_path: Path) -> Tier:
    return Tier(str(tmp_path / "far"), every=2000)


def lost(node: Node) -> None:
    """The power is cut: the agent and all that it held are gone."""
    pid = node.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    node.stop()
    for path in node.shm.iterdir():
        path.unlink()


def names(tier: Tier) -> list[str]:
    """The snapshots that a tier on disk has an entry of, oldest first."""
    return sorted(path.name for path in Path(tier.url).glob("entries/*"))


def chunks(tier: Tier, tensor: str) -> list[Path]:
    return [path for path in Path(tier.url).glob(f"snapshots/*/{tensor}/c.*") if path.is_file()]


def persisted(node: Node, *tiers: Tier, steps: int = 3, depth: int = 1) -> Loop:
    """A job that trained so many steps and persisted the last; what it then had."""
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=tiers, every=1000) as ckpt:
        ckpt.restore()
        trained(ckpt, loop, range(1, steps))
        ckpt._spilling.ask(depth)
        loop.turn()
        ticket = ckpt.snapshot(steps)
        ckpt.wait(ticket, "persisted", WAIT_S)
        if depth > 1:
            until(lambda: node.status().tiers[depth - 1].spills > 0, "the copy in the slower tier")
    return loop


def _spilled(node: Node, step: int) -> bool:
    return node.status().tiers[0].newest.step == step


def came_back(node: Node, *tiers: Tier) -> tuple[int | None, Loop, Checkpointer]:
    loop = Loop.make(seed=99)
    ckpt = node.attach(loop.model, loop.optimizer, tiers=tiers)
    return ckpt.restore(), loop, ckpt


def test_what_is_persisted_comes_back_when_all_memory_is_gone(node: Node, nvme: Tier) -> None:
    before = persisted(node, nvme)
    lost(node)
    step, loop, ckpt = came_back(node, nvme)
    with ckpt:
        assert step == 3
        assert loop.bits() == before.bits()
        random = torch.get_rng_state()
        before.turn()
        torch.set_rng_state(random)
        loop.turn()
        assert loop.bits() == before.bits()
        sealed(ckpt, 4)  # a later run, in the order of ages
        ckpt.wait(ckpt.snapshot(5), "persisted", WAIT_S)
    assert [name[:10] for name in names(nvme)] == ["0000000001", "0000000002"]


def test_memory_comes_before_tiers(node: Node, nvme: Tier) -> None:
    persisted(node, nvme)
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[nvme]) as ckpt:
        assert ckpt.restore() == 3
        trained(ckpt, loop, range(4, 7))
    step, again, ckpt = came_back(node, nvme)
    ckpt.close()
    assert (step, again.bits()) == (6, loop.bits())
    lost(node)
    step, _, ckpt = came_back(node, nvme)
    ckpt.close()
    assert step == 3


def test_a_slower_tier_copies_from_a_faster_one_and_serves_without_it(node: Node, nvme: Tier, far: Tier) -> None:
    before = persisted(node, nvme, far, depth=2)
    lost(node)
    for path in sorted(Path(nvme.url).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    step, loop, ckpt = came_back(node, nvme, far)
    ckpt.close()
    assert (step, loop.bits()) == (3, before.bits())


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_is_damaged_in_one_tier_is_read_from_the_next(node: Node, nvme: Tier, far: Tier, damage: str) -> None:
    before = persisted(node, nvme, far, depth=2)
    (chunk,) = chunks(nvme, "model.0.weight")
    data = chunk.read_bytes()
    if damage == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(data[:-9] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    lost(node)
    step, loop, ckpt = came_back(node, nvme, far)
    ckpt.close()
    assert (step, loop.bits()) == (3, before.bits())


def test_an_older_snapshot_comes_back_where_the_newest_is_damaged(node: Node, nvme: Tier) -> None:
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[nvme], every=1000) as ckpt:
        for step in range(1, 4):
            loop.turn()
            ckpt.wait(ckpt.snapshot(step), "persisted", WAIT_S)
            if step == 2:
                before = loop.bits()
    damaged = max(chunks(nvme, "model.0.weight"), key=lambda path: path.parts)
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    lost(node)
    found, again, ckpt = came_back(node, nvme)
    ckpt.close()
    assert (found, again.bits()) == (2, before)


def test_a_snapshot_that_was_whole_and_is_damaged_is_not_passed_over_in_silence(node: Node, nvme: Tier) -> None:
    persisted(node, nvme)
    for chunk in chunks(nvme, "model.0.weight"):
        chunk.write_bytes(b"\0" * chunk.stat().st_size)
    lost(node)
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[nvme]) as ckpt, pytest.raises(SnapshotLost):
        ckpt.restore()


def test_a_tier_that_cannot_be_read_is_no_reason_to_start_afresh(node: Node, tmp_path: Path) -> None:
    place = tmp_path / "no-folder"
    place.write_text("a file")
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[Tier(str(place))]) as ckpt, pytest.raises(TierUnreachable):
        ckpt.restore()


def test_spills_come_when_they_are_due_and_old_ones_go(node: Node, tmp_path: Path) -> None:
    tier = Tier(str(tmp_path / "nvme"), every=2, keep=2, milestone_steps=4)
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[tier]) as ckpt:
        for step in range(1, 12):
            trained(ckpt, loop, range(step, step + 1))
            if step % 2 == 1 and step > 1:  # the beat of this step told that the one before is complete
                until(partial(_spilled, node, step - 1), f"step {step - 1} in the tier")
        until(lambda: [int(name[11:27]) for name in names(tier)] == [4, 8, 10], "old snapshots to go")


def test_trouble_in_a_tier_does_not_stop_training(node: Node, tmp_path: Path) -> None:
    place = tmp_path / "no-folder"
    place.write_text("a file")
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[Tier(str(place), every=1)]) as ckpt:
        steps = itertools.count(1)

        def goes_on() -> bool:
            loop.turn()
            ckpt.step(next(steps))
            return (ckpt.watermark or 0) > 4

        until(goes_on, "snapshots to go on")  # while a spill is tried for the first time, some are skipped
        until(lambda: node.status().tiers[0].trouble != "", "the agent to tell of its trouble")


def test_without_tiers_nothing_can_be_persisted(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        loop.turn()
        with pytest.raises(StateUnreachable, match="no tier"):
            ckpt.wait(ckpt.snapshot(1), "persisted")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiers": ["/somewhere"]}, "holdfast.Tier is needed"),
        ({"tiers": [Tier("ftp://host/x")]}, "ftp://"),
        ({"grace": "soon"}, "grace"),
        ({"grace": -1}, "grace"),
        ({"config": "/nowhere.toml"}, "nowhere.toml"),
    ],
)
def test_what_cannot_be_is_refused_at_once(shared: Node, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shared.attach(Loop.make().model, **options)


def test_a_config_file_says_what_arguments_do_not(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text('every = 3\nprotect = "off"\n[[tier]]\nurl = "nvme"\nevery = 3\n')
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, config=file) as ckpt:
        ckpt.restore()
        taken = []
        for step in range(1, 7):
            loop.turn()
            taken.append(ckpt.step(step) is not None)
        assert taken == [False, False, True, False, False, True]
        steps = itertools.count(7)

        def spilled() -> bool:
            loop.turn()
            ckpt.step(next(steps))
            return node.status().tiers[0].spills > 0

        until(spilled, "a spill")
    assert (tmp_path / "nvme" / "entries").is_dir()


# -- preemption ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preemption_notice_ends_the_loop_with_all_persisted(node: Node, nvme: Tier, number: signal.Signals) -> None:
    loop = Loop.make()
    former = signal.getsignal(number)
    steps = 0
    with node.attach(loop.model, loop.optimizer, tiers=[nvme], every=1000, grace="60s") as ckpt:
        ckpt.restore()
        while not ckpt.should_stop:
            steps += 1
            assert steps < 10
            loop.turn()
            if steps == 3:
                os.kill(os.getpid(), number)
            ckpt.step(steps)
    assert steps in (3, 4)
    assert signal.getsignal(number) is former
    before = loop.bits()
    lost(node)
    step, again, ckpt = came_back(node, nvme)
    ckpt.close()
    assert (step, again.bits()) == (steps, before)


def test_without_a_grace_signals_are_left_alone(shared: Node) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with shared.attach(Loop.make().model):
        assert signal.getsignal(signal.SIGTERM) is former


def test_a_preemption_notice_comes_before_what_is_being_spilled(node: Node, tmp_path: Path) -> None:
    """Both slots are taken, one by the job's watermark and one by a spill that takes its time."""
    slow = Tier(str(tmp_path / "slow"), every=1000, bandwidth="40KB")
    loop = Loop.make()
    with node.attach(loop.model, loop.optimizer, tiers=[slow], grace="60s") as ckpt:
        ckpt.restore()
        ckpt._spilling.ask(1)
        steps = itertools.count(1)

        def held_up() -> bool:
            loop.turn()
            return ckpt.snapshot(next(steps)).skipped == "spilling"

        until(held_up, "a spill that holds a slot")
        os.kill(os.getpid(), signal.SIGTERM)
        last = 0

        def stopped() -> bool:
            nonlocal last
            last = next(steps)
            loop.turn()
            ckpt.step(last)
            return ckpt.should_stop

        until(stopped, "the last step")
    before = loop.bits()
    lost(node)
    step, again, ckpt = came_back(node, slow)
    ckpt.close()
    assert (step, again.bits()) == (last, before)


def test_another_jobs_tier_is_no_reason_to_start_afresh(node: Node, nvme: Tier) -> None:
    """A scheduler may give every life of a job another name; and two jobs may have been given one tier."""
    before = persisted(node, nvme)
    lost(node)
    other = Node()
    try:
        loop = Loop.make()
        with other.attach(loop.model, loop.optimizer, tiers=[nvme]) as ckpt, pytest.raises(ConfigError, match=node.job):
            ckpt.restore()
        step, loop, ckpt = came_back(other, replace(nvme, any_job=True))
        ckpt.close()
        assert (step, loop.bits()) == (3, before.bits())
    finally:
        other.remove()


_WITH_A_WORKER = """
import os, signal, sys, time
from torch import nn
from holdfast import Checkpointer

with Checkpointer(nn.Linear(1, 1), job=sys.argv[1], shm=sys.argv[2], grace="60s") as ckpt:
    ready, say = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(say, b".")  # Python drops signals that come while it forks
        while True:
            time.sleep(0.01)
    os.read(ready, 1)
    os.kill(worker, signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    print(os.WTERMSIG(status) == signal.SIGTERM, ckpt._notice.given)
"""


def test_a_forked_worker_dies_of_the_signal_that_gives_notice(shared: Node) -> None:
    """In a process of its own: nobody can fork out of a test runner and be sure of its signals."""
    done = subprocess.run(
        [sys.executable, "-c", _WITH_A_WORKER, shared.job, str(shared.shm)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False"]
