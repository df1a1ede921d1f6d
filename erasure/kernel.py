"""Bulk kernels on raw memory: checksums at the speed of memory, without copies and without the GIL.

The work is done by ISA-L through ``ctypes``. Its shared library comes inside the wheel of ``pyeclib`` (which is never
imported: only the folder beside it is looked into), else from the system. Where neither loads and passes
``self_check``, ``google_crc32c`` takes over: correct, but it copies and holds the GIL, which is logged once.

The library is looked for on first use, so that importing this module stays cheap.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

BLOCK_BYTES = 4 << 20
"""The unit that is sent, checksummed and coded, unless a caller says otherwise."""

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | npt.NDArray[Any]
"""Bytes in one piece, whatever holds them. (NumPy's arrays count as ``collections.abc.Buffer`` from Python 3.12 on.)"""

_ALL_ONES = 0xFFFFFFFF
# ISA-L takes the length as a C int.
_CALL_BYTES = 1 << 30
# What one task of the pool checksums: long enough to hide what a task costs, short enough to keep all threads busy.
_TASK_BYTES = 16 << 20
# The fallback copies what it is fed; pieces of this size stay in cache.
_COPY_BYTES = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The loaded kernels. ``crc32c_at(address, nbytes, value)`` is as the function of this module."""

    name: str
    crc32c_at: Callable[[int, int, int], int]


def crc32c(buffer: Buffer, value: int = 0) -> int:
    """CRC-32C (Castagnoli) of any C-contiguous *buffer*, as RFC 3720 defines it.

    Args:
        buffer: bytes, NumPy array, memory map, ...; of any item type and shape. Read in place, never modified.
        value: the CRC of what precedes *buffer*; ``crc32c(b, crc32c(a)) == crc32c(a + b)``. ``0 <= value < 2**32``.

    Raises:
        ValueError, BufferError: *buffer* is not C-contiguous.
    """
    data = np.frombuffer(buffer, np.uint8)
    return kernel().crc32c_at(data.ctypes.data, data.nbytes, value)


def crc32c_at(address: int, nbytes: int, value: int = 0) -> int:
    """CRC-32C of the *nbytes* at *address*. The caller keeps that memory mapped and unchanged meanwhile.

    Nothing checks the address: a wrong one ends the process.

    Raises:
        ValueError: *nbytes* is negative.
    """
    if nbytes < 0:
        raise ValueError(f"a length of {nbytes} bytes")
    return kernel().crc32c_at(address, nbytes, value)


def block_checksums(
    address: int, nbytes: int, block_bytes: int = BLOCK_BYTES, pool: Executor | None = None
) -> npt.NDArray[np.uint32]:
    """CRC-32C of each block of the *nbytes* at *address*.

    Args:
        address: start of memory that the caller keeps mapped and unchanged until this returns. Not checked.
        nbytes: may be zero.
        block_bytes: length of every block but the last, which may be shorter; at least 1.
        pool: threads to share the work with. The caller must not be one of them: it waits for them.

    Returns:
        ``uint32[ceil(nbytes / block_bytes)]``, newly allocated.

    Raises:
        ValueError: *nbytes* or *block_bytes* breaks a bound above.
    """
    if nbytes < 0 or block_bytes < 1:
        raise ValueError(f"{nbytes} bytes in blocks of {block_bytes}")
    checksums = np.empty(-(-nbytes // block_bytes), np.uint32)
    blocks_per_task = max(1, _TASK_BYTES // block_bytes)
    crc_at = kernel().crc32c_at

    def fill(first: int) -> None:
        for block in range(first, min(first + blocks_per_task, len(checksums))):
            start = block * block_bytes
            checksums[block] = crc_at(address + start, min(block_bytes, nbytes - start), 0)

    _run_all(fill, range(0, len(checksums), blocks_per_task), pool)
    return checksums


def _run_all(task: Callable[[int], None], arguments: range, pool: Executor | None) -> None:
    """Call *task* once per argument, in *pool* where that pays. Returns or raises only when no call is under way."""
    if pool is None or len(arguments) < 2:
        for argument in arguments:
            task(argument)
        return
    futures: list[Future[None]] = []
    try:
        futures.extend(pool.submit(task, argument) for argument in arguments)
        for future in futures:
            future.result()
    finally:
        # Whatever ends the wait, the caller may unmap its memory next: no thread may still be reading it.
        for future in futures:
            future.cancel()
        wait(futures)


@cache
def kernel() -> Kernel:
    """The fastest kernels that load here and pass ``self_check``; the same ones on every call.

    Raises:
        ConfigError: not even the fallback gives right checksums.
    """
    for path in _isal_paths():
        try:
            found = _isal(path)
        except (OSError, AttributeError) as error:
            _log.debug("ISA-L at %s does not load: %s", path, error)
            continue
        if self_check(found):
            return found
        _log.warning("ISA-L at %s computes wrong checksums and is not used", path)
    fallback = Kernel("google-crc32c", _google_crc32c_at)
    if not self_check(fallback):
        raise ConfigError("no library here computes a right crc32c: neither ISA-L nor google-crc32c")
    _log.warning(
        "ISA-L was not found (neither in the wheel of pyeclib nor as libisal.so.2): checksums fall back to "
        "google-crc32c, which copies and holds the GIL"
    )
    return fallback


def self_check(candidate: Kernel) -> bool:
    """Whether *candidate* agrees with ``crc32c_slow`` on short and long, aligned and unaligned, chained input."""
    sample = np.arange(1100, dtype=np.uint32).astype(np.uint8)
    address = sample.ctypes.data
    for start, stop, value in ((0, 0, 0), (0, 0, 7), (0, 9, 0), (3, 20, 0x1234), (1, 1100, _ALL_ONES)):
        expected = crc32c_slow(sample[start:stop].tobytes(), value)
        if candidate.crc32c_at(address + start, stop - start, value) != expected:
            return False
    return True


def crc32c_slow(data: bytes, value: int = 0) -> int:
    """CRC-32C one byte at a time: the plain definition that the fast kernels are held to."""
    table = _crc32c_table()
    register = value ^ _ALL_ONES
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ _ALL_ONES


@cache
def _crc32c_table() -> tuple[int, ...]:
    """The CRC register after each single byte; 0x82F63B78 is the Castagnoli polynomial, bits reversed."""
    table = []
    for byte in range(256):
        register = byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
        table.append(register)
    return tuple(table)


def _isal_paths() -> Iterator[str]:
    """Where ISA-L may lie, best first."""
    spec = importlib.util.find_spec("pyeclib")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parents[1] / "pyeclib.libs"
        yield from map(str, sorted(bundled.glob("libisal*.so.2*")))
    system = ctypes.util.find_library("isal")
    if system is not None:
        yield system


def _isal(path: str) -> Kernel:
    """The kernels of the ISA-L library at *path*.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it lacks a function.
    """
    library = ctypes.CDLL(path)  # a plain CDLL: calls release the GIL
    crc32_iscsi = library.crc32_iscsi
    crc32_iscsi.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
    crc32_iscsi.restype = ctypes.c_uint

    def crc_at(address: int, nbytes: int, value: int) -> int:
        # ISA-L keeps the bare register: the inversion before and after, which the standard asks for, is ours.
        register = value ^ _ALL_ONES
        while nbytes > _CALL_BYTES:
            register = crc32_iscsi(address, _CALL_BYTES, register)
            address += _CALL_BYTES
            nbytes -= _CALL_BYTES
        return int(crc32_iscsi(address, nbytes, register)) ^ _ALL_ONES

    return Kernel(f"ISA-L ({path})", crc_at)


def _google_crc32c_at(address: int, nbytes: int, value: int) -> int:
    import google_crc32c  # only where ISA-L is missing: an agent's start does not pay for it

    for start in range(0, nbytes, _COPY_BYTES):
        piece = ctypes.string_at(address + start, min(_COPY_BYTES, nbytes - start))
        value = google_crc32c.extend(value, piece)
    return int(value)
