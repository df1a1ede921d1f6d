"""The system calls of a tier in a folder: bulk bytes past the page cache, files and folders that survive a power cut.

Everything here blocks and runs in threads, with the GIL released for all that takes time. Files of less than a MiB go
through the page cache. Larger ones do not, where the file system can do without (O_DIRECT): that is several times
faster when it has to be durable, costs a tenth of the processor, and leaves the cache to the training data.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .store import Buffer
from .work import Work

Bytes = npt.NDArray[np.uint8]

BULK_BYTES: Final = 1 << 20  # from here on, past the page cache
PIECE_BYTES: Final = 16 << 20  # of one system call
BOUNCE_BYTES: Final = 2 << 20  # per thread, for what lies unaligned in memory: it stays in the cache
BLOCK_BYTES: Final = 4096  # places and lengths of direct calls are multiples of it
MEMORY_ALIGNMENT: Final = 512  # that devices want of memory; where one wants more, bytes go through a bounce buffer
WORTH_BYTES: Final = 64 << 10  # less than that is not worth a call of its own
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY})

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Disk:
    """The system calls that change something, one method each: tests put a disk in its place that forgets what was not
    synced when the power is cut, or that is full. Any number of threads may use it."""

    def __init__(self) -> None:
        self._direct = True  # until the file system refuses
        self._alignment = MEMORY_ALIGNMENT
        self._thread = threading.local()

    def make_folder(self, path: Path) -> bool:
        """Make *path*, whose parent is there. False if it is there already."""
        try:
            path.mkdir()
        except FileExistsError:
            return False
        return True

    def create(self, path: Path) -> int:
        """A descriptor of a new file."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, parts: Sequence[Buffer], work: Work) -> None:
        """Write all of *parts* to the empty file *fd*. Not synced."""
        arrays = [array for part in parts if (array := as_bytes(part)).nbytes]
        total = sum(array.nbytes for array in arrays)
        if total < BULK_BYTES:
            with work.memory():
                data = b"".join(array.data for array in arrays)
            _write_fully(fd, memoryview(data), 0)
            return
        _reserve(fd, total)  # a full disk says so before anything is written, and files lie in one piece
        self._go_direct(fd)
        end = _Writer(self, fd, work).run(arrays)
        if end != total:
            os.ftruncate(fd, total)

    def sync(self, fd: int) -> None:
        """Return when the file's bytes and length are on the device. Its name is up to its folder."""
        os.fsync(fd)
        if not self._direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its name, in place of the file that has it."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Return when it is on the device which names *path* has in it."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if (
                error.errno not in _UNSUPPORTED
            ):  # some network file systems do it with every change, and say so like this
                raise
        finally:
            os.close(fd)

    def read(self, fd: int, parts: Sequence[memoryview], work: Work) -> None:
        """Fill *parts* from the file *fd*, which is exactly as long; an EOFError if it gets shorter meanwhile."""
        arrays = [array for part in parts if (array := as_bytes(part)).nbytes]
        total = sum(array.nbytes for array in arrays)
        if total >= BULK_BYTES:
            self._go_direct(fd)
        _Reader(self, fd, work).run(arrays, total)
        if total >= BULK_BYTES and not self._direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def aligned(self, array: Bytes) -> bool:
        """Whether *array* can be read or written in place, and is worth it."""
        return array.nbytes >= WORTH_BYTES and array.ctypes.data % self._alignment == 0

    def bounce(self) -> Bytes:
        """This thread's page-aligned buffer."""
        if not hasattr(self._thread, "bounce"):
            self._thread.bounce = np.frombuffer(mmap.mmap(-1, BOUNCE_BYTES), np.uint8)
        found: Bytes = self._thread.bounce
        return found

    def give_way(self, fd: int, array: Bytes) -> bool:
        """A call with *array* was refused as invalid: ask for less from now on. False if that was not why."""
        if array.ctypes.data % BLOCK_BYTES:
            self._alignment = BLOCK_BYTES
            return True
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return False
        self._direct = False
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return True

    def _go_direct(self, fd: int) -> None:
        # Not with open: where that is refused, the file has been made nevertheless.
        if self._direct:
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._direct = False


class _Writer:
    """Writes arrays one after the other: in place where they lie aligned, else through the bounce buffer.

    Invariant: what is written so far ends on a block; what comes after that lies in the bounce buffer.
    """

    def __init__(self, disk: Disk, fd: int, work: Work) -> None:
        self._disk, self._fd, self._work = disk, fd, work
        self._bounce = disk.bounce()
        self._in_place = _has_device(fd)
        self._at = 0
        self._held = 0

    def run(self, arrays: Sequence[Bytes]) -> int:
        """Write them all; how long the file is then, which is whole blocks."""
        for array in arrays:
            while array.nbytes:
                array = array[self._some_of(array) :]
        if self._held:
            padded = -(-self._held // BLOCK_BYTES) * BLOCK_BYTES
            self._bounce[self._held : padded] = 0
            self._held = padded
            self._flush()
        return self._at

    def _some_of(self, array: Bytes) -> int:
        if self._in_place and not self._held and self._disk.aligned(array):
            count = min(array.nbytes // BLOCK_BYTES * BLOCK_BYTES, PIECE_BYTES)
            with self._work.memory():
                if self._write(array[:count]):
                    return count
        count = min(array.nbytes, BOUNCE_BYTES - self._held)
        with self._work.memory():
            self._bounce[self._held : self._held + count] = array[:count]
        self._held += count
        if self._held == BOUNCE_BYTES:
            self._flush()
        return count

    def _flush(self) -> None:
        self._work.go_on()
        while not self._write(self._bounce[: self._held]):
            pass
        self._held = 0

    def _write(self, array: Bytes) -> bool:
        try:
            _write_fully(self._fd, array.data, self._at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._disk.give_way(self._fd, array):
                raise
            return False
        self._at += array.nbytes
        return True


class _Reader:
    """Fills arrays one after the other, as the writer wrote them."""

    def __init__(self, disk: Disk, fd: int, work: Work) -> None:
        self._disk, self._fd, self._work = disk, fd, work
        self._in_place = _has_device(fd)
        self._at = 0  # what is read of the file so far: whole blocks, or all of it
        self._rest: Bytes = np.empty(0, np.uint8)  # of that, what lies in the bounce buffer and is not yet handed out
        self._left = 0

    def run(self, arrays: Sequence[Bytes], total: int) -> None:
        """Fill them all, with *total* bytes."""
        self._left = total
        for array in arrays:
            while array.nbytes:
                array = array[self._some_of(array) :]

    def _some_of(self, array: Bytes) -> int:
        if self._in_place and not self._rest.nbytes and self._disk.aligned(array):
            count = min(array.nbytes // BLOCK_BYTES * BLOCK_BYTES, PIECE_BYTES)
            with self._work.memory():
                if (read := self._read(array[:count])) is not None:
                    return read
        if not self._rest.nbytes:
            self._fill()
        count = min(array.nbytes, self._rest.nbytes)
        with self._work.memory():
            array[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _fill(self) -> None:
        bounce = self._disk.bounce()
        wanted = min(-(-self._left // BLOCK_BYTES) * BLOCK_BYTES, BOUNCE_BYTES)
        self._work.go_on()
        while (read := self._read(bounce[:wanted])) is None:
            pass
        self._rest = bounce[:read]

    def _read(self, array: Bytes) -> int | None:
        try:
            read = os.preadv(self._fd, [array.data], self._at)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._disk.give_way(self._fd, array):
                raise
            return None
        if not read:
            raise EOFError
        self._at += read
        self._left -= read
        return read


def as_bytes(buffer: Buffer) -> Bytes:
    """The bytes of *buffer*, which lie in one piece, without copying."""
    if isinstance(buffer, np.ndarray):
        assert buffer.dtype == np.uint8
        assert buffer.flags.c_contiguous
        return buffer.reshape(-1)
    return np.frombuffer(buffer, np.uint8) if memoryview(buffer).nbytes else np.empty(0, np.uint8)


def _has_device(fd: int) -> bool:
    """Whether the file lies on a device of this node: a call then ends, at the latest when the kernel gives the device
    up. On a network file system it may hang for ever, so the caller's memory must not be part of it."""
    return os.major(os.fstat(fd).st_dev) != 0


def _write_fully(fd: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


def _reserve(fd: int, nbytes: int) -> None:
    """Have the file system set *nbytes* aside. Not posix_fallocate: where this is unknown, that writes zeros instead."""
    while _fallocate(fd, 0, 0, nbytes):
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def quietly_unlink(disk: Disk, path: Path) -> None:
    """Remove a file that nobody needs any more, if that works."""
    with suppress(OSError):
        disk.unlink(path)
