"""Tiers in a folder: of a local disk, or of a file system that several nodes share.

An object is a plain file, so that any zarr reader finds what it expects. A put writes a temporary file beside it, syncs
it, renames it, and syncs its folder and those above, up to the tier's own:

    killed before the rename    the old object, or none, and a temporary file, which nobody takes for an object
    killed after it             the new object
    power cut before the last   the old object or the new one: the file was synced before it got its name
    folder is synced

Puts that may wait stay temporary files until ``settle``, small ones in memory: then all are written and synced, then all
renamed, then every folder is synced once. The first sync makes the file system commit what the others would wait for, and
several at a time share one flush of the device.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import resource
import stat
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from ..crashpoints import reach
from ..errors import Corrupt, HoldfastError, ObjectMissing, TierError, TierFull, TierUnreachable
from .disk import Disk, as_bytes, quietly_unlink
from .store import GET_BYTES, TIMEOUT_S, Buffer, Found, Names, checked, checked_prefix, is_key
from .work import Work, in_thread, soon

# That many calls keep a disk busy, though at any time some threads copy from or to their bounce buffers, or sum up.
THREADS: Final = 8
# Descriptors kept for settle: a file's failure to get to the disk is told to one who has it open. Many, as far as the process
# may have them: a sync while bulk bytes are on their way has the device flush, and they wait.
UNSYNCED_FILES: Final = max(64, min(2048, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
SYNCS: Final = 8  # at a time: whoever syncs only waits
HELD_BYTES: Final = 64 << 10  # an object that may wait and is no longer than this is written together with others
HELD_OBJECTS: Final = 64  # so many
_TEMPORARY: Final = re.compile(r"\.tmp-([0-9a-f]{8})-([0-9]{1,10})-[0-9a-f]{32}", re.ASCII)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP})
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class _Draft:
    """A temporary file that is to become the object *key*. *fd* is closed, and None, once the file is synced.

    Without a file yet, *held* is what is to be written to it.
    """

    key: str
    temporary: Path
    path: Path
    fd: int | None
    held: bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class FileStore:
    """A folder whose files are the objects. It is made with the first put.

    After a failed ``settle`` the drafts that did not get to the disk are gone, and it goes on to fail until each is put
    again: a file that could not be synced once may seem synced the next time, and is not.
    """

    def __init__(self, root: Path, *, timeout_s: float = TIMEOUT_S, disk: Disk | None = None) -> None:
        self.url = root.as_uri()
        self._root = root
        self._timeout_s = timeout_s
        self._disk = disk or Disk()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tier")
        self._syncers = ThreadPoolExecutor(SYNCS, thread_name_prefix="sync")
        self._slots = asyncio.Semaphore(THREADS)  # so that nobody's deadline runs while others' work goes on
        self._settling = asyncio.Lock()
        self._lock = threading.Lock()  # of the two below
        self._drafts: dict[str, _Draft] = {}
        self._lost: dict[str, OSError] = {}
        self._renamed_in: set[Path] = set()  # folders that settle has yet to sync; only whoever settles changes it
        self._open_count = self._held_count = 0
        self._names_from, self._number = uuid.uuid4().hex[:20], itertools.count()
        self._closed = False

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        """See Store. A second put of a key that waits for ``settle`` takes the place of the first."""
        checked(key)
        if not durable and sum(as_bytes(part).nbytes for part in parts) <= HELD_BYTES:
            await self._hold(key, b"".join(as_bytes(part).data for part in parts))
        else:
            await self._run("write", key, lambda work: self._put(work, key, parts, durable))
        self._open_count += not durable
        if self._open_count >= UNSYNCED_FILES:
            self._open_count = 0
            async with self._settling:
                await self._run("write", key, self._sync_drafts)

    async def _hold(self, key: str, data: bytes) -> None:
        path = self._root / key
        earlier = self._keep(_Draft(key, self._temporary_beside(path), path, None, data))
        if earlier is not None:
            await self._run("write", key, lambda work: self._discard(earlier))
        self._held_count += 1
        if self._held_count >= HELD_OBJECTS:
            self._held_count = 0
            await self._run("write", key, self._write_all_held)

    async def settle(self) -> None:
        """See Store."""
        async with self._settling:
            await self._run("settle", "", self._settle)

    async def forget(self, keys: Sequence[str]) -> None:
        """See Store. Nothing waits for them any more even if this fails, as it does where threads hang: files stay then."""
        with self._lock:  # on the loop: in time for whoever settles next
            drafts = [draft for key in keys if (draft := self._drafts.pop(key, None)) is not None]
            for key in keys:
                self._lost.pop(key, None)
        await self._run("give up", "", lambda work: self._give_up(drafts))

    async def confirm(self, prefix: str) -> None:
        """See Store."""
        await self._run("settle", checked_prefix(prefix), lambda work: self._confirm(work, prefix))

    async def get(self, key: str) -> bytes:
        """See Store."""
        with self._translated("read", key):
            return await soon(self._get(self._root / checked(key)), self._timeout_s)

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        """See Store."""
        checked(key)
        await self._run("read", key, lambda work: self._read(work, key, parts))

    async def list(self, prefix: str) -> list[Found]:
        """See Store."""
        checked_prefix(prefix)
        found = await self._run("list", prefix, lambda work: list(self._objects(work, prefix)))
        return sorted(found, key=lambda object: object.key)

    async def children(self, prefix: str) -> Names:
        """See Store."""
        checked_prefix(prefix)
        return await self._run("list", prefix, lambda work: self._children(prefix))

    async def delete(self, keys: Sequence[str]) -> None:
        """See Store."""
        for key in keys:
            checked(key)
        await self._run("delete", keys[0] if len(keys) == 1 else "", lambda work: self._delete(work, keys))

    async def sweep(self, older_than_s: float) -> int:
        """See Store. Other nodes' files go by their age only; empty folders go, too."""
        return await self._run("sweep", "", lambda work: self._sweep(work, time.time() - older_than_s))

    async def free_bytes(self) -> int | None:
        """See Store."""
        return await self._run("ask", "", lambda work: self._free())

    async def close(self) -> None:
        """See Store. May be called again."""
        if self._closed:
            return
        self._closed = True
        with suppress(TierError):
            await self._run("close", "", lambda work: self._discard_all())
        self._pool.shutdown(wait=False)
        self._syncers.shutdown(wait=False)

    # ---- in threads, from here on ----

    def _put(self, work: Work, key: str, parts: Sequence[Buffer], durable: bool) -> None:
        draft = self._draft(key)
        try:
            reach("spill.temporary-made")
            assert draft.fd is not None
            self._disk.write(draft.fd, parts, work)
            reach("spill.temporary-written")
            if durable:
                self._sync(draft)
                reach("spill.temporary-synced")
                work.go_on()  # nothing becomes an object after its caller was told that it would not
                self._disk.rename(draft.temporary, draft.path)
                reach("spill.renamed")
                for folder in self._folders_of(draft.path):
                    self._sync_folder(folder)
                reach("spill.folders-synced")
                earlier = self._take_back(key)
            else:
                with work.memory():  # not while the loop calls this off, and whoever put it forgets it
                    earlier = self._keep(draft)
        except BaseException:
            self._discard(draft)
            raise
        if earlier is not None:
            self._discard(earlier)  # settling must not put it in place of this one

    def _keep(self, draft: _Draft) -> _Draft | None:
        """*draft* waits for ``settle``; returns the one that has waited under its key."""
        with self._lock:
            self._lost.pop(draft.key, None)
            earlier, self._drafts[draft.key] = self._drafts.get(draft.key), draft
        return earlier

    def _take_back(self, key: str) -> _Draft | None:
        """Nothing waits for ``settle`` under *key* any more; returns what did."""
        with self._lock:
            self._lost.pop(key, None)
            return self._drafts.pop(key, None)

    def _draft(self, key: str) -> _Draft:
        path = self._root / key
        draft = _Draft(key, self._temporary_beside(path), path, None)
        self._create(draft)
        return draft

    def _temporary_beside(self, path: Path) -> Path:
        return path.parent / f".tmp-{_host()}-{os.getpid()}-{self._names_from}{next(self._number):012x}"

    def _create(self, draft: _Draft) -> None:
        self._refuse_links(draft.path.parent)
        for _ in range(20):  # another process may remove a folder that is empty, between our making it and our using it
            with suppress(FileNotFoundError):
                draft.fd = self._disk.create(draft.temporary)
                return
            with suppress(FileNotFoundError):
                self._make_folder(draft.path.parent)
        draft.fd = self._disk.create(draft.temporary)

    def _make_folder(self, folder: Path) -> None:
        try:
            made = self._disk.make_folder(folder)
        except FileNotFoundError:
            if folder.parent == folder:
                raise
            self._make_folder(folder.parent)
            made = self._disk.make_folder(folder)
        if made:
            if self._root not in folder.parents:  # those inside the tier are synced with what is in them
                self._sync_folder(folder.parent)
        elif not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _refuse_links(self, path: Path) -> None:
        """Links inside the tier lead out of it, or to what is there under another key: whoever put them, none is followed."""
        at = str(self._root)
        for part in path.relative_to(self._root).parts:
            at = f"{at}/{part}"
            if os.path.islink(at):
                raise OSError(errno.ELOOP, "there is a link")

    def _is_beyond_link(self, path: Path) -> bool:
        try:
            self._refuse_links(path)
        except OSError:
            return True
        return False

    def _write_held(self, draft: _Draft) -> None:
        with draft.lock:
            if draft.held is None:
                return
            self._create(draft)
            reach("spill.temporary-made")
            assert draft.fd is not None
            self._disk.write(draft.fd, [draft.held], Work())  # memory of ours: nobody waits for it to be let go
            draft.held = None
            reach("spill.temporary-written")

    def _sync(self, draft: _Draft) -> None:
        with draft.lock:
            if draft.fd is not None:
                self._disk.sync(draft.fd)
                fd, draft.fd = draft.fd, None
                os.close(fd)

    def _discard(self, draft: _Draft) -> None:
        with draft.lock:
            if draft.fd is not None:
                os.close(draft.fd)
                draft.fd = None
            there, draft.held = draft.held is None or draft.temporary.exists(), None
        if there:
            quietly_unlink(self._disk, draft.temporary)

    def _give_up(self, drafts: Sequence[_Draft]) -> None:
        for draft in drafts:
            self._discard(draft)
            self._remove_empty(draft.path.parent)

    def _discard_all(self) -> None:
        with self._lock:
            drafts, self._drafts = list(self._drafts.values()), {}
        for draft in drafts:
            self._discard(draft)

    def _folders_of(self, path: Path) -> Iterator[Path]:
        """Those that must be synced for *path* to be found after a power cut. Who made them does not matter: another
        process may have, just now, and not have synced them yet."""
        for folder in path.parents:
            yield folder
            if folder == self._root.parent:
                return

    def _sync_folder(self, folder: Path) -> None:
        try:
            self._disk.sync_folder(folder)
        except (FileNotFoundError, NotADirectoryError):
            pass  # deleted by somebody, with what was in it
        except PermissionError:
            if folder == self._root or self._root in folder.parents:
                raise
            # A folder above the tier that we may not read: whoever made the tier there answers for it.

    def _sync_drafts(self, work: Work) -> Sequence[_Draft]:
        """Have what waits now on the device; returns it, what could not get there left out."""
        drafts = self._write_all_held(work)
        self._in_parallel(work, drafts, lambda draft: self._or_lose(draft, self._sync))
        with self._lock:
            return [draft for draft in drafts if self._drafts.get(draft.key) is draft]

    def _write_all_held(self, work: Work) -> Sequence[_Draft]:
        """Have a file of all that waits now; returns it."""
        with self._lock:
            drafts = list(self._drafts.values())
        for draft in drafts:
            if draft.held is not None:
                work.go_on()
                self._or_lose(draft, self._write_held)
        return drafts

    def _or_lose(self, draft: _Draft, step: Callable[[_Draft], None]) -> None:
        try:
            step(draft)
        except OSError as error:
            self._lose(draft, error)

    def _in_parallel(self, work: Work, items: Sequence[Item], task: Callable[[Item], None]) -> None:
        """Call *task* for each of *items*, several at a time. Returns or raises only when no call is under way."""

        def some(first: int) -> None:
            for item in items[first::SYNCS]:
                work.go_on()
                task(item)

        futures = [self._syncers.submit(some, first) for first in range(min(SYNCS, len(items)))]
        wait(futures)
        for future in futures:
            future.result()

    def _lose(self, draft: _Draft, error: OSError) -> None:
        with self._lock:
            if self._drafts.get(draft.key) is draft:
                del self._drafts[draft.key]
                self._lost[draft.key] = error
        self._discard(draft)

    def _settle(self, work: Work) -> None:
        synced = self._sync_drafts(work)  # what was put since is for whoever settles next
        reach("spill.drafts-synced")
        for draft in synced:
            work.go_on()
            self._note_renamed(draft.path)  # before, so that it is known however this ends
            try:
                self._disk.rename(draft.temporary, draft.path)
            except FileNotFoundError as error:
                self._lose(draft, error)  # somebody cleared the folder
                continue
            with self._lock:
                if self._drafts.get(draft.key) is draft:
                    del self._drafts[draft.key]
        reach("spill.drafts-renamed")
        self._in_parallel(work, sorted(self._renamed_in), self._sync_folder)
        self._renamed_in.clear()  # not before all are synced: if one fails, the next settle tries all again
        if self._lost:
            key, why = next(iter(self._lost.items()))
            raise OSError(why.errno, f"{key} and {len(self._lost) - 1} more did not get there: {why.strerror}")

    def _note_renamed(self, path: Path) -> None:
        missing = []
        for folder in self._folders_of(path):
            if folder in self._renamed_in:
                break  # and so are those above it
            missing.append(folder)
        self._renamed_in.update(missing)

    def _confirm(self, work: Work, prefix: str) -> None:
        folder = self._root / prefix
        if self._is_beyond_link(folder):
            return
        for found in self._walk(work, folder):
            self._sync_folder(found)
        for above in self._folders_of(folder / "any"):
            self._sync_folder(above)

    async def _get(self, path: Path) -> bytes:
        import aiofiles  # only here: agents without tiers do without it

        async with aiofiles.open(path, "rb", opener=self._open_to_read, executor=self._pool) as file:
            data: bytes = await file.read(GET_BYTES + 1)
        if len(data) > GET_BYTES:
            raise Corrupt(f"{path} is longer than any document: more than {GET_BYTES} bytes")
        return data

    def _open_to_read(self, path: str | Path, flags: int = os.O_RDONLY) -> int:
        self._refuse_links(Path(path))
        return _open_to_read(path, flags)

    def _read(self, work: Work, key: str, parts: Sequence[memoryview]) -> None:
        fd = self._open_to_read(self._root / key)
        try:
            there, wanted = os.fstat(fd).st_size, sum(part.nbytes for part in parts)
            if there != wanted:
                raise Corrupt(f"{key} in {self.url} has {there} bytes, not {wanted}")
            self._disk.read(fd, parts, work)
        except EOFError as error:
            raise Corrupt(f"{key} in {self.url} got shorter while it was read") from error
        finally:
            os.close(fd)

    def _walk(self, work: Work, folder: Path) -> Iterator[Path]:
        """All real folders under *folder*, those inside before those around them, and it itself last."""
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in self._names(folder, folders=True):
                yield from self._walk(work, folder / name)
            work.go_on()
            yield folder

    def _check_root(self) -> None:
        """A tier without a folder is one that holds nothing yet; something else in its place is none."""
        if self._root.exists() and not self._root.is_dir():
            raise TierUnreachable(f"{self.url}: listing: there is something else than a folder")

    def _names(self, folder: Path, *, folders: bool) -> Names:
        """Links are none of ours: they are not followed, and lead nowhere out of the tier."""
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if (entry.is_dir(follow_symlinks=False) if folders else entry.is_file(follow_symlinks=False))
            ]

    def _objects(self, work: Work, prefix: str) -> Iterator[Found]:
        self._check_root()
        if self._is_beyond_link(self._root / prefix):
            return
        for folder in self._walk(work, self._root / prefix):
            with suppress(FileNotFoundError):
                for name in self._names(folder, folders=False):
                    key = (folder / name).relative_to(self._root).as_posix()
                    if is_key(key) and not _TEMPORARY.fullmatch(name):
                        with suppress(FileNotFoundError):
                            about = os.stat(folder / name, follow_symlinks=False)
                            yield Found(key, about.st_size, about.st_mtime)

    def _children(self, prefix: str) -> Names:
        self._check_root()
        if self._is_beyond_link(self._root / prefix):
            return []
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted(name for name in self._names(self._root / prefix, folders=True) if is_key(name))
        return []

    def _delete(self, work: Work, keys: Sequence[str]) -> None:
        changed: set[Path] = set()
        for key in keys:
            work.go_on()
            with self._lock:
                draft = self._drafts.pop(key, None)
                self._lost.pop(key, None)
            if draft is not None:
                self._discard(draft)
            if self._is_beyond_link((self._root / key).parent):
                continue
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._disk.unlink(self._root / key)
            # Also for what was not there: it may have been removed a moment ago, by one who died before the sync.
            changed.add(self._remove_empty((self._root / key).parent))
        for folder in changed:
            work.go_on()
            self._sync_folder(folder)

    def _remove_empty(self, folder: Path) -> Path:
        """Remove *folder* and those above it, as long as they are empty; the first that is not, or the tier's own."""
        while folder != self._root:
            try:
                self._disk.remove_folder(folder)
            except FileNotFoundError:
                pass
            except OSError:
                break
            folder = folder.parent
        return folder

    def _sweep(self, work: Work, before_s: float) -> int:
        freed = 0
        for folder in self._walk(work, self._root):
            with suppress(FileNotFoundError):
                for name in self._names(folder, folders=False):
                    freed += self._sweep_file(folder / name, before_s)
                if folder != self._root and folder.stat().st_mtime < before_s:
                    with suppress(OSError):
                        self._disk.remove_folder(folder)
        return freed

    def _sweep_file(self, path: Path, before_s: float) -> int:
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            return 0
        about = path.stat()
        if about.st_mtime >= before_s and not (match[1] == _host() and _is_dead(int(match[2]))):
            return 0
        self._disk.unlink(path)
        return about.st_blocks * 512

    def _free(self) -> int:
        for folder in (self._root, *self._root.parents):
            with suppress(FileNotFoundError):
                about = os.statvfs(folder)
                return about.f_bavail * about.f_frsize
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    # ---- on the loop again ----

    async def _run(self, operation: str, key: str, function: Callable[[Work], Result]) -> Result:
        with self._translated(operation, key):
            async with self._slots:
                return await in_thread(self._pool, function, self._timeout_s)

    @contextmanager
    def _translated(self, operation: str, key: str) -> Iterator[None]:
        where = f"{operation} {key} in {self.url}" if key else f"{operation} {self.url}"
        try:
            yield
        except HoldfastError:
            raise
        except TimeoutError as error:
            raise TierUnreachable(f"cannot {where}: no progress for {self._timeout_s:g} s") from error
        except OSError as error:
            reason = f"cannot {where}: {error.strerror or error}"
            if error.errno in _FULL:
                raise TierFull(reason) from error
            if error.errno in _ABSENT and operation == "read":
                raise ObjectMissing(f"{key} is not in {self.url}") from error
            raise TierUnreachable(reason) from error


def _open_to_read(path: str | Path, flags: int = os.O_RDONLY) -> int:
    # Nonblocking: a pipe that somebody left there must not hold us up.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return fd


@cache
def _host() -> str:
    """Differs wherever process numbers may mean other processes: per boot, and per container."""
    boot, space = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        space = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{os.uname().nodename} {boot} {space}'.encode()):08x}"


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
