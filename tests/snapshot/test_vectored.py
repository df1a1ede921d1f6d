"""Many small pieces of memory, copied in one call."""

from __future__ import annotations

import random

import numpy as np
from holdfast.snapshot.vectored import Regions, Words, words_of


def test_words_are_gathered_from_wherever_they_lie() -> None:
    rng = random.Random(1)
    held = [np.frombuffer(rng.randbytes(4 * rng.randint(1, 16)), np.uint8).copy() for _ in range(200)]
    words = Words([(array.ctypes.data, array.nbytes) for array in held])
    assert words.read().tobytes() == b"".join(array.tobytes() for array in held)
    held[7][:] = 255
    assert words.read().tobytes() == b"".join(array.tobytes() for array in held)


def test_words_are_counted_in_the_order_of_their_pieces() -> None:
    assert words_of([(64, 8), (0, 4)]).tolist() == [16, 17, 0]
    assert words_of([]).tolist() == []


def test_regions_copy_piece_by_piece() -> None:
    rng = random.Random(2)
    held = [np.frombuffer(rng.randbytes(rng.randint(1, 99)), np.uint8) for _ in range(1500)]  # more than one call takes
    sources = Regions([array.ctypes.data for array in held], [array.nbytes for array in held])
    out = np.zeros((len(held), 99), np.uint8)
    sources.moved_to(out.ctypes.data + np.arange(len(held), dtype=np.uint64) * np.uint64(99)).copy_from(sources)
    assert all(np.array_equal(row[: array.nbytes], array) for row, array in zip(out, held, strict=True))
