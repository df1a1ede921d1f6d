"""Checksums of what arrives in pieces are those of the whole."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from holdfast.agent.sums import Sums
from holdfast.erasure.kernel import block_checksums


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_001])
def test_pieces_in_any_order(nbytes: int) -> None:
    rng = random.Random(nbytes)
    wanted = np.frombuffer(rng.randbytes(nbytes), np.uint8)
    cuts = sorted({0, nbytes, *(rng.randint(0, nbytes) for _ in range(40))})
    pieces = [*itertools.pairwise(cuts), (nbytes, nbytes)]
    rng.shuffle(pieces)
    image = np.zeros(nbytes, np.uint8)
    with ThreadPoolExecutor(2) as pool:
        sums = Sums(image, 4096, pool)
        for first, end in pieces:
            image[first:end] = wanted[first:end]
            sums.landed(first, end)
        found = sums.result()
    assert np.array_equal(found, block_checksums(wanted.ctypes.data, nbytes, 4096))
