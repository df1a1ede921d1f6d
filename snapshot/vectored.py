"""Copying many small pieces of memory in one call that does not hold the GIL.

A thousand small tensors cost a millisecond of Python or of torch's argument parsing, during which training cannot run its
own Python. ``process_vm_readv`` on one's own process takes arrays of (address, length) and copies in the kernel, at the
speed of memory and 0.2 µs per piece. Where a sandbox forbids it, pieces are copied one by one. Pieces of a few bytes
are gathered by NumPy (``Words``).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt

_log = logging.getLogger(__name__)
_AT_ONCE: Final = 1024  # IOV_MAX
_PIECE_BYTES: Final = 16  # struct iovec
WORD_BYTES: Final = 4


class Regions:
    """n pieces of memory. Whoever makes them keeps the memory alive.

    Attributes:
        pieces: ``uint64[n, 2]``, address and length of each.
    """

    __slots__ = ("_address", "_sums", "pieces")

    def __init__(self, addresses: Sequence[int] | npt.NDArray[np.uint64], lengths: Sequence[int]) -> None:
        self.pieces = np.empty((len(lengths), 2), np.uint64)
        self.pieces[:, 0], self.pieces[:, 1] = addresses, lengths
        # What each call needs is worked out once: with cold caches, asking NumPy takes longer than the copy.
        self._address = int(self.pieces.ctypes.data)
        self._sums = [sum(lengths[first : first + _AT_ONCE]) for first in range(0, len(lengths), _AT_ONCE)]

    def __len__(self) -> int:
        return len(self.pieces)

    def moved_to(self, addresses: npt.NDArray[np.uint64]) -> Regions:
        """Pieces of the same lengths at other addresses, ``uint64[n]``."""
        other = Regions.__new__(Regions)
        other.pieces = self.pieces.copy()
        other.pieces[:, 0] = addresses
        other._address, other._sums = int(other.pieces.ctypes.data), self._sums
        return other

    def copy_from(self, sources: Regions) -> None:
        """Copy each piece of *sources*, of which one has been ``moved_to`` from the other, here. Nothing may overlap."""
        assert self._sums is sources._sums, "pieces of other lengths"
        for first, nbytes in zip(range(0, len(self), _AT_ONCE), self._sums, strict=True):
            count, skip = min(_AT_ONCE, len(self) - first), first * _PIECE_BYTES
            # A call that was cut short is done again by hand: copying twice does no harm.
            if _read and _read(os.getpid(), self._address + skip, count, sources._address + skip, count, 0) == nbytes:
                continue
            part = slice(first, first + count)
            for (to, length), (start, _) in zip(self.pieces[part].tolist(), sources.pieces[part].tolist(), strict=True):
                ctypes.memmove(to, start, length)


class Words:
    """Many scattered words of 4 bytes, read in one call: independent reads, whose waits for memory overlap.

    For pieces of a few bytes each, where what the kernel does for every piece of a ``Regions`` takes ten times as long.
    Whoever makes them keeps the memory alive. The interpreter is held: for a microsecond per thousand words in the cache.
    """

    __slots__ = ("_all", "_read", "_which")

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        """*pieces*: address and length of each, multiples of 4; at least one."""
        words = words_of(pieces)
        first, last = int(words.min()), int(words.max())
        # A view of everything between the first word and the last, mapped or not: only the words that are asked for are touched.
        self._all = np.asarray(_Span(first * WORD_BYTES, last - first + 1))
        self._which = words - first
        self._read = np.empty(len(words), np.uint32)

    def read(self) -> npt.NDArray[np.uint32]:
        """All words in the order of the pieces, ``uint32[words]``, borrowed until the next call."""
        return self._all.take(self._which, out=self._read, mode="clip")  # "raise" would copy twice


def words_of(pieces: Iterable[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """The numbers of all words in *pieces* (start and length in bytes, multiples of 4), in their order."""
    starts = [range(at // WORD_BYTES, (at + nbytes) // WORD_BYTES) for at, nbytes in pieces]
    return np.array([*chain.from_iterable(starts)], np.intp)


class _Span:
    """Memory as NumPy wants it described: so many words from an address on, read-only."""

    def __init__(self, address: int, words: int) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, True), "shape": (words,), "typestr": "<u4"}


def _find() -> ctypes._NamedFuncPointer | None:
    """``process_vm_readv``, if there is one and it may be used."""
    try:
        function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except AttributeError:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_ulong
    function.argtypes = [ctypes.c_int, pointer, size, pointer, size, size]
    function.restype = ctypes.c_ssize_t
    source, target = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
    there, here = (np.array([at.ctypes.data, 8], np.uint64) for at in (source, target))
    if function(os.getpid(), here.ctypes.data, 1, there.ctypes.data, 1, 0) != 8 or not np.array_equal(source, target):
        _log.info("process_vm_readv is not allowed here; small tensors are copied one by one")
        return None
    return function


_read = _find()
