"""A disk that can be asked what it would hold if the power had been cut earlier.

Fault model: what was synced is there. Of what was not, anything may be: a file's bytes all, in part or not at all; of the
changes to each name in a folder any number, from none to all, whatever happened to the other names.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.storage.disk import Disk, as_bytes
from holdfast.storage.store import Buffer
from holdfast.storage.work import Work


@dataclass
class _File:
    data: bytes = b""
    synced: bool = False


@dataclass
class _Folder:
    synced: dict[str, _File | _Folder] = field(default_factory=dict)
    changes: dict[str, list[_File | _Folder | None]] = field(default_factory=dict)

    def now(self, name: str) -> _File | _Folder | None:
        return self.changes[name][-1] if name in self.changes else self.synced.get(name)

    def change(self, name: str, to: _File | _Folder | None) -> None:
        self.changes.setdefault(name, []).append(to)

    def sync(self) -> None:
        for name, changes in self.changes.items():
            if changes[-1] is None:
                self.synced.pop(name, None)
            else:
                self.synced[name] = changes[-1]
        self.changes.clear()


class RecordingDisk(Disk):
    """Does everything, and remembers in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, object, object]] = []
        self._files: dict[int, int] = {}  # descriptor to number
        self._count = 0
        self._record_lock = threading.Lock()

    def _note(self, what: str, one: object, other: object = None) -> None:
        with self._record_lock:
            self.log.append((what, one, other))

    def make_folder(self, path: Path) -> bool:
        made = super().make_folder(path)
        if made:
            self._note("make_folder", path)
        return made

    def create(self, path: Path) -> int:
        fd = super().create(path)
        with self._record_lock:
            self._count += 1
            self._files[fd] = self._count
        self._note("create", path, self._files[fd])
        return fd

    def write(self, fd: int, parts: Sequence[Buffer], work: Work) -> None:
        super().write(fd, parts, work)
        self._note("write", self._files[fd], b"".join(as_bytes(part).tobytes() for part in parts))

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._note("sync", self._files[fd])

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._note("rename", source, target)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._note("unlink", path)

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self._note("unlink", path)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._note("sync_folder", path)


def after_power_cut(log: Sequence[tuple[str, object, object]], above: Path, target: Path, rng: random.Random) -> None:
    """Make the folder *target* what *above* might look like if the power had been cut after *log*."""
    root = _Folder()
    files: dict[object, _File] = {}
    for what, one, other in log:
        if what == "sync":
            files[one].synced = True
        elif what == "write":
            assert isinstance(other, bytes)
            files[one].data = other
        elif isinstance(one, Path) and (one == above or above in one.parents):
            _change(_folder(root, one.relative_to(above) if what == "sync_folder" else one.relative_to(above).parent),
                    files, what, one, other)  # fmt: skip
    _build(root, target, rng)


def _folder(root: _Folder, path: Path) -> _Folder:
    found: _File | _Folder | None = root
    for name in path.parts:
        assert isinstance(found, _Folder)
        found = found.now(name)
    assert isinstance(found, _Folder)
    return found


def _change(folder: _Folder, files: dict[object, _File], what: str, one: Path, other: object) -> None:
    match what:
        case "make_folder":
            folder.change(one.name, _Folder())
        case "create":
            files[other] = _File()
            folder.change(one.name, files[other])
        case "unlink":
            folder.change(one.name, None)
        case "sync_folder":
            folder.sync()
        case "rename":
            _rename(folder, one.name, other)


def _rename(folder: _Folder, name: str, target: object) -> None:
    assert isinstance(target, Path)  # in the same folder
    folder.change(target.name, folder.now(name))
    folder.change(name, None)


def _build(folder: _Folder, at: Path, rng: random.Random) -> None:
    at.mkdir()
    for name in folder.synced.keys() | folder.changes.keys():
        there = rng.choice([folder.synced.get(name), *folder.changes.get(name, [])])
        if isinstance(there, _Folder):
            _build(there, at / name, rng)
        elif there is not None:
            data = there.data
            if not there.synced:
                data = rng.choice([data, b"", data[: len(data) // 2], bytes(len(data)), os.urandom(len(data))])
            (at / name).write_bytes(data)
