"""Tiers in a folder: of a local disk, or of a file system that several nodes share."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Corrupt, ObjectMissing, TierFull, TierUnreachable
from .store import TIMEOUT_S, Buffer, Found, checked, checked_prefix

_TEMPORARY = ".tmp-"


class FileStore:
    """A folder whose files are the objects. It is made with the first put."""

    def __init__(self, root: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = root.as_uri()
        self._root = root
        self._timeout_s = timeout_s

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        """See Store."""
        with self._translated("write", key):
            await asyncio.to_thread(self._put, checked(key), parts)

    def _put(self, key: str, parts: Sequence[Buffer]) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{uuid.uuid4()}"
        try:
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for folder in path.parents:
            _sync_folder(folder)
            if folder == self._root.parent:
                break

    async def settle(self) -> None:
        """See Store."""

    async def get(self, key: str) -> bytes:
        """See Store."""
        with self._translated("read", key):
            return await asyncio.to_thread((self._root / checked(key)).read_bytes)

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        """See Store."""
        data = await self.get(key)
        if len(data) != sum(part.nbytes for part in parts):
            raise Corrupt(f"{key} in {self.url} has {len(data)} bytes")
        at = 0
        for part in parts:
            part.cast("B")[:] = data[at : at + part.nbytes]
            at += part.nbytes

    async def list(self, prefix: str) -> list[Found]:
        """See Store."""
        with self._translated("list", prefix):
            return await asyncio.to_thread(lambda: sorted(self._walk(checked_prefix(prefix)), key=lambda f: f.key))

    def _walk(self, prefix: str) -> Iterator[Found]:
        try:
            entries = sorted(os.scandir(self._root / prefix), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if entry.is_dir():
                yield from self._walk(f"{prefix}{entry.name}/")
            elif not entry.name.startswith(_TEMPORARY):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield Found(prefix + entry.name, stat.st_size, stat.st_mtime)

    async def children(self, prefix: str) -> list[str]:
        """See Store."""
        with self._translated("list", prefix), suppress(FileNotFoundError, NotADirectoryError):
            return sorted(e.name for e in os.scandir(self._root / checked_prefix(prefix)) if e.is_dir())
        return []

    async def delete(self, keys: Sequence[str]) -> None:
        """See Store."""
        for key in keys:
            with self._translated("delete", key):
                path = self._root / checked(key)
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
                with suppress(OSError):
                    for folder in path.parents:
                        if folder == self._root:
                            break
                        folder.rmdir()

    async def sweep(self, older_than_s: float) -> int:
        """See Store."""
        freed = 0
        for path in self._root.rglob(f"{_TEMPORARY}*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                if stat.st_mtime < time.time() - older_than_s:
                    path.unlink()
                    freed += stat.st_size
        return freed

    async def free_bytes(self) -> int | None:
        """See Store."""
        existing = next(folder for folder in (self._root, *self._root.parents) if folder.exists())
        return shutil.disk_usage(existing).free

    async def close(self) -> None:
        """See Store."""

    @contextmanager
    def _translated(self, operation: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"{operation} of {key or 'all'} in {self.url}: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise TierFull(what) from error
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR) and operation == "read":
                raise ObjectMissing(what) from error
            raise TierUnreachable(what) from error


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
