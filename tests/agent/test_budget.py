"""Memory: what is measured, and each refusal with its figures and the place where to change it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from holdfast.agent import budget
from holdfast.agent.budget import Memory, measure
from holdfast.errors import BudgetExceeded, Remedy

MARGIN = 256 << 20
GB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "needed"),
    [
        (Memory("/shm", 10, 10 * GB, None), 10),
        (Memory("/shm", 10 * GB, MARGIN + 10, None), 10),
        (Memory("/shm", 10 * GB, 10 * GB, 10), 10),
        (Memory("/shm", 0, MARGIN, 0), 0),
    ],
)
def test_as_much_as_there_is_may_be_used(memory: Memory, needed: int) -> None:
    memory.check(needed)
    with pytest.raises(BudgetExceeded):
        memory.check(needed + 1)


@pytest.mark.parametrize(
    ("memory", "facts"),
    [
        (Memory("/dev/shm/x", 99, GB, GB), ["100 more bytes", "99 are free", "/dev/shm/x", "HOLDFAST_SHM", "--shm-size"]),
        (Memory("/shm", GB, MARGIN + 99, 10 * GB), ["100 more bytes", str(MARGIN + 99), str(MARGIN), "fewer ranks"]),
        (Memory("/shm", GB, 10 * GB, 99), ["100 more bytes", "allows 99", "memory.max"]),
    ],
    ids=["shm", "host", "group"],
)  # fmt: skip
def test_a_refusal_says_what_is_needed_what_is_there_and_where_to_change_it(memory: Memory, facts: list[str]) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        memory.check(100)
    assert [fact for fact in facts if fact not in str(caught.value)] == []
    assert caught.value.remedy is Remedy.REPAIR


def test_a_host_with_less_than_the_margin() -> None:
    with pytest.raises(BudgetExceeded):
        Memory("/shm", GB, MARGIN - 1, None).check(0)


def test_measuring_this_machine(tmp_path: Path) -> None:
    memory = measure(tmp_path)
    assert memory.shm_path == str(tmp_path)
    free = os.statvfs(tmp_path)
    assert 0 < memory.shm_bytes <= free.f_blocks * free.f_frsize
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) << 10
    assert 0 < memory.host_bytes <= total
    assert memory.group_bytes is None or memory.group_bytes <= 1 << 62


class Files:
    """Stands for the files that ``budget`` reads; any other does not exist."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: dict[str, str] = {}
        monkeypatch.setattr(Path, "read_text", lambda path: self._read(path))

    def _read(self, path: Path) -> str:
        try:
            return self.texts[str(path)]
        except KeyError:
            raise FileNotFoundError(path) from None


def group(monkeypatch: pytest.MonkeyPatch, cgroup: str, limits: dict[str, tuple[str, str]]) -> int | None:
    """What is available in a control group, given ``memory.max`` and ``memory.current`` of each."""
    files = Files(monkeypatch)
    files.texts["/proc/self/cgroup"] = cgroup
    for folder, (limit, current) in limits.items():
        files.texts[f"/sys/fs/cgroup{folder}/memory.max"] = limit
        files.texts[f"/sys/fs/cgroup{folder}/memory.current"] = current
        files.texts[f"/sys/fs/cgroup{folder}/memory.stat"] = "anon 5\nfile 7\nshmem 7\ninactive_file 0\nactive_file 0\n"
    return budget._group_available()


def test_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group(monkeypatch, "0::/a\n", {"/a": ("max\n", "100\n")}) is None


def test_no_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    Files(monkeypatch)
    assert budget._group_available() is None


def test_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group(monkeypatch, "0::/a\n", {"/a": ("1000\n", "100\n")}) == 900


def test_the_tightest_limit_up_to_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"/a/b/c": ("max", "1"), "/a/b": ("1000", "100"), "/a": ("2000", "1950"), "": ("9000", "2000")}
    assert group(monkeypatch, "0::/a/b/c\n", limits) == 50


def test_the_root_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group(monkeypatch, "0::/\n", {"": ("1000", "400")}) == 600


def test_beside_groups_of_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group(monkeypatch, "12:cpu:/x\n1:name=systemd:/y\n0::/a\n", {"/a": ("1000", "100")}) == 900


def test_a_group_over_its_limit_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    available = group(monkeypatch, "0::/a\n", {"/a": ("1000", "1200")})
    assert available is not None
    assert available <= 0
    with pytest.raises(BudgetExceeded):
        Memory("/shm", GB, GB, available).check(1)


def test_cached_files_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that has read its data set: memory.current is near memory.max, and nearly all of it is cache."""
    files = Files(monkeypatch)
    files.texts |= {
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{10 * GB}\n",
        "/sys/fs/cgroup/memory.current": f"{10 * GB - 4096}\n",
        "/sys/fs/cgroup/memory.stat": f"anon {GB}\nfile {9 * GB}\nshmem 0\ninactive_file {8 * GB}\nactive_file {GB}\n",
    }
    assert budget._group_available() == 4096 + 9 * GB
    files.texts["/sys/fs/cgroup/memory.stat"] = f"anon {GB}\nfile {9 * GB}\nshmem {6 * GB}\n"  # snapshots stay
    assert budget._group_available() == 4096 + 3 * GB
    del files.texts["/sys/fs/cgroup/memory.stat"]
    assert budget._group_available() == 4096


def test_without_meminfo(monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(monkeypatch)
    files.texts["/proc/meminfo"] = "MemTotal:       100 kB\nMemAvailable:    40 kB\n"
    assert budget._host_available() == 40 << 10
    files.texts["/proc/meminfo"] = "MemTotal:       100 kB\n"
    assert budget._host_available() > 0
