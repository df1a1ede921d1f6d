"""A checksum of a whole from its parts, against the checksum of the whole."""

from __future__ import annotations

import numpy as np
from holdfast.erasure.crc import contributions, whole
from holdfast.erasure.kernel import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(derandomize=True, max_examples=200)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_parts_make_up_the_whole(parts: list[bytes]) -> None:
    text = b"".join(parts)
    lengths = np.array([len(part) for part in parts], np.int64)
    after = lengths.sum() - lengths.cumsum()
    shares = contributions(np.array([crc32c(part) for part in parts], np.uint32), lengths, after)
    total = np.bitwise_xor.reduce(shares) if len(shares) else np.uint32(0)
    assert whole(np.array([total], np.uint32), np.array([len(text)], np.int64))[0] == crc32c(text)


def test_long_wholes() -> None:
    """A part far from the end: zeros stand for what follows."""
    text, zeros = b"holdfast", 5_000_011
    (share,) = contributions(np.array([crc32c(text)], np.uint32), np.array([8]), np.array([zeros]))
    assert whole(np.array([share], np.uint32), np.array([8 + zeros]))[0] == crc32c(text + bytes(zeros))
