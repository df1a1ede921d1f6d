"""Checksums of an image that arrives in pieces: computed while the rest of it is on its way."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import numpy as np
import numpy.typing as npt

from ..erasure.kernel import crc32c_at


class Sums:
    """crc32c of each block of *image*; a block's is computed, in *pool*, once all of the block is there.

    ``landed`` is to be called from one thread; ``result`` from any but those of the pool.
    """

    def __init__(self, image: npt.NDArray[np.uint8], block_bytes: int, pool: Executor) -> None:
        """*image*: ``uint8[n]``, contiguous; kept alive as long as this is, and the work that it has given to the pool."""
        self._image = image
        self._size = block_bytes
        self._pool = pool
        starts = np.arange(0, len(image), block_bytes)
        self._missing: list[int] = np.minimum(len(image) - starts, block_bytes).tolist()
        self._sums: dict[int, Future[int]] = {}

    def landed(self, first: int, end: int) -> None:
        """Bytes [first, end) of the image are there, and will not change. To be said once of each byte."""
        for block in range(first // self._size, -(-end // self._size)) if first < end else ():
            start = block * self._size
            self._missing[block] -= min(end, start + self._size) - max(first, start)
            if not self._missing[block]:
                self._sums[block] = self._pool.submit(self._sum, block)

    def result(self) -> npt.NDArray[np.uint32]:
        """All of them, ``uint32[blocks]``; every byte has landed."""
        return np.array([self._sums[block].result() for block in range(len(self._missing))], np.uint32)

    def _sum(self, block: int) -> int:
        start = block * self._size
        return crc32c_at(int(self._image.ctypes.data) + start, min(self._size, len(self._image) - start))
