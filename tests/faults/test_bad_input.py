"""Damage and nonsense from outside: each is told by an error of ours, and costs nothing that was not damaged itself."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.agent.settings import PROTOCOL
from holdfast.errors import (
    AgentError,
    AgentMismatch,
    AgentUntrusted,
    BudgetExceeded,
    ConfigError,
    RankTaken,
    SnapshotLost,
)
from holdfast.snapshot.arena import Slot
from holdfast.snapshot.record import Record
from holdfast.tests.faults.conftest import MakeJob
from holdfast.tests.hooks.nodes import QUICK, WAIT_S, Node, bits, open_slot, until
from torch import nn

SIZE = 700  # float32[700, 700] is 1.9 MB; with its moments, an image of more than one block


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.remove()


def _job(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(SIZE, SIZE)
    return model, torch.optim.Adam(model.parameters())


def _turn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(2, SIZE)).square().sum().backward()
    optimizer.step()


def _bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return bits(model.state_dict()), bits(optimizer.state_dict())


@pytest.fixture
def two(node: Node) -> tuple[Node, dict[int, Any], dict[int, Path]]:
    """A node that holds the snapshots of steps 1 and 2; their states, and the files where they lie."""
    model, optimizer = _job(1)
    ckpt = node.attach(model, optimizer)
    states = {}
    for step in (1, 2):
        _turn(model, optimizer)
        ckpt.wait(ckpt.snapshot(step))
        states[step] = _bits(model, optimizer)
    ckpt.close(ended=False)
    return node, states, {r.id.step: node.shm / f"rank-00000.slot-{i}" for i, r in node.sealed().items()}


Two = tuple[Node, dict[int, Any], dict[int, Path]]


def _restored(node: Node) -> tuple[int | None, Any]:
    model, optimizer = _job(2)
    with node.attach(model, optimizer) as ckpt:
        return ckpt.restore(), _bits(model, optimizer)


def _flip(path: Path, where: Callable[[Slot, Record], int], bit: int = 3) -> None:
    """Flip one bit of a slot, as cosmic rays do: behind everybody's back."""
    slot = open_slot(path)
    record = slot.sealed_record()
    assert record is not None
    slot._bytes[where(slot, record)] ^= 1 << bit
    slot.close()


def _image(slot: Slot) -> int:
    return 8192 + slot.place.table_bytes


DAMAGE: dict[str, Callable[[Slot, Record], int]] = {
    "first byte of the image": lambda slot, record: _image(slot),
    "a later block": lambda slot, record: _image(slot) + record.block_bytes + 12345,
    "the values": lambda slot, record: _image(slot) + record.image_bytes - 700,
    "the block checksums": lambda slot, record: 8192 + 1,
    "the layout": lambda slot, record: 8192 + 4 * -(-record.image_bytes // record.block_bytes) + 40,
}


# -- flipped bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", DAMAGE)
def test_one_flipped_bit_costs_one_snapshot(two: Two, caplog: pytest.LogCaptureFixture, where: str) -> None:
    node, states, files = two
    _flip(files[2], DAMAGE[where])
    step, found = _restored(node)
    assert (step, found) == (1, states[1])
    assert "cannot be used" in caplog.text


@pytest.mark.parametrize("where", DAMAGE)
def test_nothing_left_is_said_not_hidden(two: Two, where: str) -> None:
    node, _, files = two
    for path in files.values():
        _flip(path, DAMAGE[where])
    with pytest.raises(SnapshotLost, match="damaged"):
        _restored(node)


def test_a_damaged_older_snapshot_does_not_matter(two: Two) -> None:
    node, states, files = two
    _flip(files[1], DAMAGE["a later block"])
    assert _restored(node) == (2, states[2])


@pytest.mark.parametrize("bits_flipped", [1, 8])
def test_a_commit_word_with_flipped_bits_still_seals(two: Two, bits_flipped: int) -> None:
    node, states, files = two
    for bit in range(bits_flipped):
        _flip(files[2], lambda slot, record, bit=bit: 4096 + bit % 8, bit)  # type: ignore[misc]
    assert _restored(node) == (2, states[2])


# -- the record ----------------------------------------------------------------------------------------------------------


def _damage_record(path: Path, count: int, seed: int = 5) -> None:
    with path.open("r+b") as file:
        page = bytearray(file.read(255))
        for at in random.Random(seed).sample(range(255), count):
            page[at] ^= 0x5A
        file.seek(0)
        file.write(page)


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("restart", [False, True])
def test_a_record_repairs_itself(two: Two, count: int, restart: bool) -> None:
    node, states, files = two
    _damage_record(files[2], count)
    if restart:
        node.stop()
    assert _restored(node) == (2, states[2])
    Record.from_bytes(files[2].read_bytes()[:255])
    assert Record.from_bytes(files[2].read_bytes()[:255])[1] == 0, "written back, not only read"


@pytest.mark.parametrize("count", [33, 200])
@pytest.mark.parametrize("restart", [False, True])
def test_a_record_beyond_repair_costs_one_snapshot(two: Two, count: int, restart: bool) -> None:
    node, states, files = two
    _damage_record(files[2], count)
    if restart:
        node.stop()
    assert _restored(node) == (1, states[1])


@pytest.mark.parametrize("restart", [False, True])
def test_all_records_beyond_repair_are_not_a_fresh_start(two: Two, restart: bool) -> None:
    """Slots that were sealed and cannot be read: snapshots existed, and a job that silently starts over loses them."""
    node, _, files = two
    for path in files.values():
        _damage_record(path, 100)
    if restart:
        node.stop()
    with pytest.raises(SnapshotLost):
        _restored(node)


@pytest.mark.parametrize("size", [0, 100, 8192, 8193, 50_000])
def test_a_slot_that_was_cut_off(two: Two, size: int) -> None:
    node, states, files = two
    node.stop()
    os.truncate(files[2], size)
    assert _restored(node) == (1, states[1])


# -- the folder ----------------------------------------------------------------------------------------------------------


def test_foreign_files_are_left_alone(two: Two) -> None:
    node, states, _ = two
    node.stop()
    strange = ["notes.txt", "rank-0.slot-0", "rank-00000.slot-x", "rank-00000.slot-0.bak"]
    for name in strange:
        (node.shm / name).write_text("mine")
    (node.shm / "folder").mkdir()
    (node.shm / "rank-00007.slot-0").mkdir()
    (node.shm / "rank-00008.slot-0").symlink_to("/etc/hostname")
    os.mkfifo(node.shm / "rank-00009.slot-0")
    assert _restored(node) == (2, states[2])
    assert {*strange, "folder", "rank-00007.slot-0", "rank-00008.slot-0", "rank-00009.slot-0"} == set(
        node.status().foreign
    )
    assert [(node.shm / name).read_text() for name in strange] == ["mine"] * 4
    told = subprocess.run(
        [sys.executable, "-m", "holdfast", "status", "--agent", str(node.settings.socket)],
        capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert "notes.txt" in told.stdout


def test_another_jobs_snapshots_in_the_folder(two: Two) -> None:
    node, states, _ = two
    node.stop()
    intruder = node.start(job="another-job")
    log = node.ended(intruder)
    assert intruder.returncode == ConfigError.exit_code
    assert "of another job" in log
    assert _restored(node) == (2, states[2])


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_folder_that_others_may_enter(node: Node, mode: int) -> None:
    node.shm.mkdir()
    node.shm.chmod(mode)
    with pytest.raises(AgentUntrusted, match=f"mode {mode:o}"):
        node.attach(nn.Linear(1, 1))


def test_a_socket_of_another_user(two: Two) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    node, states, _ = two
    os.chown(node.settings.socket, 12345, 12345)
    with pytest.raises(AgentUntrusted, match="12345"):
        node.attach(nn.Linear(1, 1))
    os.chown(node.settings.socket, 0, 0)
    assert _restored(node) == (2, states[2])


def test_a_socket_path_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="at most 107"):
        Node().attach(nn.Linear(1, 1), shm="/dev/shm/" + "x" * 120)


# -- other agents --------------------------------------------------------------------------------------------------------


def test_an_agent_of_another_job(node: Node) -> None:
    node.start(job="another-job")
    with pytest.raises(AgentMismatch, match="serves job 'another-job'"):
        node.attach(nn.Linear(1, 1))


def test_an_agent_of_another_version(node: Node) -> None:
    node.shm.mkdir(mode=0o700)
    code = (
        "import sys, holdfast.agent.settings as s; s.PROTOCOL = 99\n"
        "from holdfast.ops.cli import main\n"
        "sys.exit(main(['agent', '--job', sys.argv[1], '--shm', sys.argv[2]]))"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, node.job, str(node.shm)], stdout=subprocess.PIPE, text=True)
    agent.log = tempfile.TemporaryFile("w+")  # type: ignore[attr-defined]  # noqa: SIM115
    node.agents.append(agent)
    assert agent.stdout is not None
    agent.stdout.readline()
    with pytest.raises(AgentMismatch, match=rf"protocol {PROTOCOL} .* speaks 99"):
        node.attach(nn.Linear(1, 1))


def test_an_agent_that_is_no_agent(node: Node) -> None:
    """Something else listens there and answers nothing that makes sense."""
    import socket

    node.shm.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.settings.socket))
        with pytest.raises(AgentError):
            node.attach(nn.Linear(1, 1), agent=str(node.settings.socket), deadlines=_hasty())


def _hasty() -> Any:
    import dataclasses

    return dataclasses.replace(QUICK, attach=1.0)


# -- memory --------------------------------------------------------------------------------------------------------------


def test_a_budget_that_does_not_suffice(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user sets it: the environment reaches the agent that the trainer starts."""
    monkeypatch.setenv("HOLDFAST_MEMORY_LIMIT", "1MiB")
    with pytest.raises(BudgetExceeded, match=r"1048576 are allowed .*HOLDFAST_MEMORY_LIMIT"):
        node.attach(*_job(1))
    assert not list(node.shm.glob("rank-*"))


def test_a_budget_that_a_growing_state_reaches(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on without further snapshots; the one that is held stays."""
    node.start("--memory-limit", "24MiB")
    model, optimizer = _job(1)
    log = {"x": torch.zeros(1)}
    with node.attach(model, optimizer, {"log": log}) as ckpt:
        for step in (1, 2):
            _turn(model, optimizer)
            ckpt.wait(ckpt.snapshot(step))
        wanted = _bits(model, optimizer)
        log["x"] = torch.zeros(5_000_000)
        for step in range(3, 8):
            _turn(model, optimizer)
            assert ckpt.snapshot(step).skipped is not None
        until(lambda: "are allowed" in caplog.text, "the agent's refusal")
        assert ckpt.watermark == 2
        assert sum(ckpt.stats().skipped.values()) == 5
    model, optimizer = _job(2)
    with node.attach(model, optimizer, {"log": {}}) as ckpt:
        assert ckpt.restore() == 2
    assert _bits(model, optimizer) == wanted


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, as a container's /dev/shm may be."""
    folder = Path(f"/tmp/hf-{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_a_shared_memory_that_is_too_small(tiny: Path) -> None:
    """Refused before training starts, with the figures and the way out; and it leaves the file system as it was."""
    free = shutil.disk_usage(tiny).free
    shm = tiny / "job"
    try:
        with pytest.raises(BudgetExceeded, match=rf"bytes in {shm}, \d+ are free there.*HOLDFAST_SHM"):
            Node("tiny").attach(*_job(1), shm=str(shm))
        assert not list(shm.glob("rank-*"))
        small = nn.Linear(3, 3)
        with Node("tiny").attach(small, shm=str(shm)) as ckpt:
            ckpt.wait(ckpt.snapshot(1))
    finally:
        pid = int((shm / "agent.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        until(lambda: not Path(f"/proc/{pid}").exists(), "the agent to end")
    assert shutil.disk_usage(tiny).free > free - (2 << 20)


# -- other trainers ------------------------------------------------------------------------------------------------------


def test_a_second_trainer_of_the_same_rank(make_job: MakeJob) -> None:
    """Somebody starts the job twice: the second is refused by name, the first does not notice."""
    job = make_job(steps=400)
    job.start()
    job.wait_for("complete snapshot", lambda log: any(e.get("watermark", 0) > 2 for e in log))
    pid = job.ranks[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it lives, however long the second one waits
    try:
        with pytest.raises(RankTaken, match=f"held by pid {pid}"):
            Node(job.name).attach(nn.Linear(1, 1))
    finally:
        os.kill(pid, signal.SIGCONT)
    at = job.log()[-1]["watermark"]
    job.wait_for("newer snapshot", lambda log: log[-1].get("watermark", 0) > at)
    job.kill_ranks(0)
    job.end_ranks()
    job.start()
    job.wait_progress(1)
    job.finish(enough=True)
    assert job.judge()[-1] > at
