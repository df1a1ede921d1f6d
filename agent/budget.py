"""How much memory there is for snapshots, and the refusal when it does not suffice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import BudgetExceeded

# Left alone for everything else on the node when memory is reserved.
_MARGIN_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """What the node has, in bytes. ``group_bytes`` is what the control group still allows, None if it sets no limit."""

    shm_path: str
    shm_bytes: int
    host_bytes: int
    group_bytes: int | None

    def check(self, needed_bytes: int) -> None:
        """Raise ``BudgetExceeded`` if *needed_bytes* more cannot be had; says which limit, and where to change it."""
        if needed_bytes > self.shm_bytes:
            raise BudgetExceeded(
                f"snapshots need {needed_bytes} more bytes in {self.shm_path}, {self.shm_bytes} are free there; "
                f"enlarge it (mount -o remount,size=…; docker --shm-size; an emptyDir of medium Memory), or set HOLDFAST_SHM"
            )
        if needed_bytes > self.host_bytes - _MARGIN_BYTES:
            raise BudgetExceeded(
                f"snapshots need {needed_bytes} more bytes of host memory, {self.host_bytes} are available "
                f"(of which {_MARGIN_BYTES} are left alone); capture less, or use fewer ranks on this node"
            )
        if self.group_bytes is not None and needed_bytes > self.group_bytes:
            raise BudgetExceeded(
                f"snapshots need {needed_bytes} more bytes, the control group (memory.max) allows {self.group_bytes}; "
                f"raise the limit of this container or service"
            )


def measure(folder: Path) -> Memory:
    """What is free now: in the file system of *folder*, on the host, and in this process's control group (v2)."""
    stat = os.statvfs(folder)
    return Memory(str(folder), stat.f_bavail * stat.f_frsize, _host_available(), _group_available())


def _host_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_available() -> int | None:
    """The tightest ``memory.max - memory.current`` from this process's group up to the root of the hierarchy."""
    try:
        path = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    except OSError:
        return None
    group = Path("/sys/fs/cgroup") / path.lstrip("/")
    room: list[int] = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to("/sys/fs/cgroup"):
            break
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
        except OSError:
            continue
        if limit != "max":
            room.append(int(limit) - used + _reclaimable(folder))
    return min(room, default=None)


def _reclaimable(group: Path) -> int:
    """What counts as used and is given back when asked for: the cache of files on disks."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return max(int(stat.get("file", 0)) - int(stat.get("shmem", 0)), 0)
