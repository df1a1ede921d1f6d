"""Bulk kernels on raw memory: checksums and parity at the speed of memory, without copies and without the GIL.

The work is done by ISA-L through ``ctypes``. Its shared library comes inside the wheel of ``pyeclib`` (which is never
imported: only the folder beside it is looked into), else from the system. What neither has, or computes wrong (each is
tried on a few bytes when it is loaded), is done by ``google_crc32c`` and by NumPy: correct but slow, which is logged once.

The library is looked for on first use, so that importing this module stays cheap.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from . import galois

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
_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class Checksums:
    """Who computes checksums, and how: ``crc32c_at(address, nbytes, value)`` is as the function of this module."""

    name: str
    crc32c_at: Callable[[int, int, int], int]


@dataclass(frozen=True, slots=True)
class Parity:
    """Who computes parity, and how: as the functions of this module, for at least one byte, source and target, unchecked."""

    name: str
    multiply_add: Callable[[int, int, int, int], None]
    combine: Callable[[galois.Bytes, Sequence[int], Sequence[int], int], None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """The loaded kernels."""

    checksums: Checksums
    parity: Parity


def crc32c(buffer: Buffer, value: int = 0) -> int:
    """CRC-32C (Castagnoli) of any C-contiguous *buffer*, as RFC 3720 defines it.

    Args:
        buffer: bytes, NumPy array, memory map, ...; of any item type and shape. Read in place, never modified.
        value: the CRC of what precedes *buffer*; ``crc32c(b, crc32c(a)) == crc32c(a + b)``. ``0 <= value < 2**32``.

    Raises:
        ValueError, BufferError: *buffer* is not C-contiguous.
    """
    data = np.frombuffer(buffer, np.uint8)
    return kernel().checksums.crc32c_at(data.ctypes.data, data.nbytes, value)


def crc32c_at(address: int, nbytes: int, value: int = 0) -> int:
    """CRC-32C of the *nbytes* at *address*. The caller keeps that memory mapped and unchanged meanwhile.

    Nothing checks the address: a wrong one ends the process.

    Raises:
        ValueError: *nbytes* is negative.
    """
    if nbytes < 0:
        raise ValueError(f"a length of {nbytes} bytes")
    return kernel().checksums.crc32c_at(address, nbytes, value)


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
    crc_at = kernel().checksums.crc32c_at

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


def multiply_add(target: int, source: int, nbytes: int, coefficient: int) -> None:
    """Add *coefficient* times the *nbytes* at *source* to those at *target*, in place, over GF(256) (``galois``).

    Coefficient 0 changes nothing, 1 is plain XOR. Any length and alignment will do. The caller keeps both mapped, and
    *source* unchanged, meanwhile; they must not overlap. Nothing checks the addresses: a wrong one ends the process.
    Doing it twice is not doing it once: with the same arguments again, it is undone.

    Raises:
        ValueError: *nbytes* is negative, or *coefficient* is not a byte.
    """
    if nbytes < 0 or not 0 <= coefficient <= 255:
        raise ValueError(f"{nbytes} bytes times {coefficient}")
    if nbytes and coefficient:
        kernel().parity.multiply_add(target, source, nbytes, coefficient)


def combine(matrix: galois.Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
    """Set the *nbytes* at each of *targets* to a combination of those at *sources*, over GF(256) (``galois``).

    Args:
        matrix: ``uint8[len(targets), len(sources)]``; target r becomes the sum over j of ``matrix[r, j]`` times source j.
        sources: at least one address, of any alignment; as in ``multiply_add``.
        targets: addresses of memory that overlaps nothing else here; what it held does not matter.
        nbytes: of every source and target; may be zero.

    Raises:
        ValueError: *nbytes* is negative, or *matrix* is not of that type and shape.
    """
    if matrix.dtype != np.uint8 or matrix.shape != (len(targets), len(sources)) or not sources:
        raise ValueError(
            f"{matrix.dtype}{list(matrix.shape)} does not combine {len(sources)} sources into {len(targets)} targets"
        )
    if nbytes < 0:
        raise ValueError(f"a length of {nbytes} bytes")
    if nbytes and targets:
        kernel().parity.combine(matrix, sources, targets, nbytes)


@cache
def kernel() -> Kernel:
    """The fastest kernels that load here and compute what their slow twins do; the same ones on every call.

    Raises:
        ConfigError: not even the fallback gives right checksums.
    """
    checksums = _from_isal(_isal_checksums, checksums_right)
    parity = _from_isal(_isal_parity, parity_right)
    fallbacks = []
    if checksums is None:
        checksums = Checksums("google-crc32c", _google_crc32c_at)
        if not checksums_right(checksums):
            raise ConfigError("no library here computes a right crc32c: neither ISA-L nor google-crc32c")
        fallbacks.append("checksums fall back to google-crc32c, which copies and holds the GIL")
    if parity is None:
        parity = Parity("NumPy", _numpy_multiply_add, _numpy_combine)
        fallbacks.append("parity falls back to NumPy, which is about ten times slower and holds the GIL")
    if fallbacks:
        _log.warning(
            "ISA-L was not found, or not all of it (neither in the wheel of pyeclib nor as libisal.so.2): %s",
            "; ".join(fallbacks),
        )
    return Kernel(checksums, parity)


def checksums_right(candidate: Checksums) -> bool:
    """Whether *candidate* agrees with ``crc32c_slow`` on short and long, aligned and unaligned, chained input."""
    sample = np.arange(1100, dtype=np.uint32).astype(np.uint8)
    address = sample.ctypes.data
    for start, stop, value in ((0, 0, 0), (0, 0, 7), (0, 9, 0), (3, 20, 0x1234), (1, 1100, _ALL_ONES)):
        expected = crc32c_slow(sample[start:stop].tobytes(), value)
        if candidate.crc32c_at(address + start, stop - start, value) != expected:
            return False
    return True


def parity_right(candidate: Parity) -> bool:
    """Whether *candidate* agrees with ``galois`` on short and long, aligned and unaligned input, and keeps to its targets.

    Vector code has paths of its own for what is shorter than a vector, for what is left at the end, and for every small number
    of rows: all of them are tried.
    """
    sources = (np.arange(3 * 1100, dtype=np.uint32) * 0x9E3779B1 >> 24).astype(np.uint8).reshape(3, 1100)
    matrix = (np.arange(7 * 3) * 37 + 1).astype(np.uint8).reshape(7, 3)
    for start, nbytes in enumerate((1, 15, 16, 31, 32, 63, 64, 95, 300, 1024, 1077)):
        part = sources[:, start : start + nbytes]
        addresses = [row.ctypes.data for row in part]
        for rows in range(1, len(matrix) + 1):
            expected = np.full((rows, nbytes + 2), 0xA5, np.uint8)
            found = expected.copy()
            galois.combine(matrix[:rows], list(part), list(expected[:, 1:-1]))
            candidate.combine(matrix[:rows], addresses, [row.ctypes.data + 1 for row in found], nbytes)
            if not np.array_equal(found, expected):
                return False
        for coefficient in (1, 2, 0x8E, 0xFF):
            galois.multiply_add(expected[0, 1:-1], part[0], coefficient)
            candidate.multiply_add(found.ctypes.data + 1, addresses[0], nbytes, coefficient)
        if not np.array_equal(found, expected):
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


def _from_isal(load: Callable[[str], _Part], right: Callable[[_Part], bool]) -> _Part | None:
    """The first ISA-L that loads, has all functions of that part, and computes them right; None if there is none."""
    for path in _isal_paths():
        try:
            found = load(path)
        except (OSError, AttributeError) as error:
            _log.debug("ISA-L at %s does not load: %s", path, error)
            continue
        if right(found):
            return found
        _log.warning("ISA-L at %s computes wrong %s and is not used for that", path, type(found).__name__.lower())
    return None


def _isal_checksums(path: str) -> Checksums:
    """Checksums by the ISA-L library at *path*.

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

    return Checksums(f"ISA-L ({path})", crc_at)


def _isal_parity(path: str) -> Parity:
    """Parity by the ISA-L library at *path*; raises as ``_isal_checksums``.

    All of it goes through the two functions that take any length and alignment. ``gf_vect_mad`` and ``xor_gen``, which do
    not on every processor, were measured to be no faster on blocks that do not fit into the cache, even for plain XOR.
    """
    library = ctypes.CDLL(path)  # a plain CDLL: calls release the GIL
    init_tables, encode, update = library.ec_init_tables, library.ec_encode_data, library.ec_encode_data_update
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    init_tables.argtypes = (integer, integer, ctypes.c_char_p, pointer)
    encode.argtypes = (integer, integer, integer, pointer, pointer, pointer)
    update.argtypes = (integer, integer, integer, integer, pointer, pointer, pointer)
    init_tables.restype = encode.restype = update.restype = None

    @lru_cache(maxsize=512)
    def tables(coefficients: bytes, columns: int) -> ctypes.Array[ctypes.c_char]:
        """What ISA-L wants to know about a matrix, given row by row; 32 bytes for each coefficient."""
        made = ctypes.create_string_buffer(32 * len(coefficients))
        init_tables(columns, len(coefficients) // columns, coefficients, made)
        return made

    def multiply_add(target: int, source: int, nbytes: int, coefficient: int) -> None:
        table = tables(bytes((coefficient,)), 1)
        for start in range(0, nbytes, _CALL_BYTES):
            update(min(_CALL_BYTES, nbytes - start), 1, 1, 0, table, source + start, _pointers([target], start))

    def combine(matrix: galois.Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
        rows, columns = matrix.shape
        table = tables(matrix.tobytes(), columns)
        for start in range(0, nbytes, _CALL_BYTES):
            length = min(_CALL_BYTES, nbytes - start)
            encode(length, columns, rows, table, _pointers(sources, start), _pointers(targets, start))

    return Parity(f"ISA-L ({path})", multiply_add, combine)


def _pointers(addresses: Sequence[int], offset: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*(address + offset for address in addresses))


def _google_crc32c_at(address: int, nbytes: int, value: int) -> int:
    import google_crc32c  # only where ISA-L is missing: an agent's start does not pay for it

    for start in range(0, nbytes, _COPY_BYTES):
        piece = ctypes.string_at(address + start, min(_COPY_BYTES, nbytes - start))
        value = google_crc32c.extend(value, piece)
    return int(value)


def _numpy_multiply_add(target: int, source: int, nbytes: int, coefficient: int) -> None:
    for start in range(0, nbytes, _COPY_BYTES):
        length = min(_COPY_BYTES, nbytes - start)
        into, of = _view(target + start, length), _view(source + start, length)
        if coefficient == 1:
            into ^= of  # thirty times faster than the table, and all that m = 1 needs
        else:
            galois.multiply_add(into, of, coefficient)


def _numpy_combine(matrix: galois.Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
    for row, target in zip(matrix.tolist(), targets, strict=True):
        ctypes.memset(target, 0, nbytes)
        for coefficient, source in zip(row, sources, strict=True):
            _numpy_multiply_add(target, source, nbytes, coefficient)


def _view(address: int, nbytes: int) -> galois.Bytes:
    """The *nbytes* at *address*, as an array that owns nothing."""
    return np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(address)), np.uint8)
