"""The code: byte for byte what ``reedsolo`` encodes, and decodes; any k segments give all the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import reedsolo
from holdfast.erasure.code import Code
from holdfast.erasure.galois import Bytes, matmul
from holdfast.erasure.kernel import combine
from holdfast.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = [(k, n - k) for n in range(2, 13) for k in range(1, n)]


def codewords(code: Code, count: int, seed: int) -> Bytes:
    """``uint8[k + m, count]``: in every column a codeword as ``reedsolo`` encodes it, of random data."""
    data = np.random.default_rng(seed).integers(0, 256, (count, code.k), np.uint8)
    codec = reedsolo.RSCodec(code.m, fcr=0, prim=0x11D, generator=2)
    return np.array([list(codec.encode(row.tobytes())) for row in data], np.uint8).T


def decoded(code: Code, codeword: Bytes, erased: Sequence[int]) -> list[int]:
    """What ``reedsolo`` makes of a codeword without the bytes at the positions *erased*."""
    torn = codeword.copy()
    torn[list(erased)] = 0xEE
    codec = reedsolo.RSCodec(code.m, fcr=0, prim=0x11D, generator=2)
    return list(codec.decode(torn.tobytes(), erase_pos=list(erased), only_erasures=True)[1])


@pytest.mark.parametrize(("k", "m"), [*SMALL, (32, 8), (10, 245), (254, 1), (1, 254)])
def test_parity_is_reedsolos(k: int, m: int) -> None:
    code = Code.of(k, m)
    words = codewords(code, 16, seed=k * 256 + m)
    assert code.parity.shape == (m, k)
    assert np.array_equal(matmul(code.parity, words[:k]), words[k:])


@pytest.mark.parametrize("k", [1, 2, 5, 10, 254])
def test_one_parity_segment_is_plain_xor(k: int) -> None:
    assert (Code.of(k, 1).parity == 1).all()


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_any_k_segments_give_all_the_others(k: int, m: int) -> None:
    """Every choice of k: with that, every pattern of up to m lost segments, whichever of those left are used."""
    code = Code.of(k, m)
    words = codewords(code, 4, seed=m * 256 + k)
    everything = range(k + m)
    for have in combinations(everything, k):
        assert np.array_equal(matmul(code.coefficients(have, everything), words[list(have)]), words), have


@pytest.mark.parametrize(("k", "m"), SMALL)
def test_reedsolo_decodes_what_we_encode(k: int, m: int) -> None:
    """Every pattern of up to m lost segments, of codewords whose parity the kernel computed."""
    code = Code.of(k, m)
    rng = np.random.default_rng(k * 256 + m)
    words = rng.integers(0, 256, (k + m, 64), np.uint8)
    combine(code.parity, [row.ctypes.data for row in words[:k]], [row.ctypes.data for row in words[k:]], 64)
    patterns = [lost for count in range(m + 1) for lost in combinations(range(k + m), count)]
    for number, lost in enumerate(patterns):
        column = words[:, number % 64]
        assert decoded(code, column, lost) == column.tolist(), lost


@settings(deadline=None)
@given(
    k=st.integers(1, 32), m=st.integers(1, 8), seed=st.integers(0, 2**32 - 1), choose=st.randoms(use_true_random=False)
)
def test_as_reedsolo_up_to_32_and_8(k: int, m: int, seed: int, choose: np.random.Generator) -> None:
    """Lost segments are computed by the kernel from k of those left, in any order; ``reedsolo`` finds the same bytes."""
    code = Code.of(k, m)
    words = codewords(code, 8, seed)
    order = list(range(k + m))
    choose.shuffle(order)
    have, lost = order[:k], order[k:]
    left, found = words[have], np.zeros((m, 8), np.uint8)
    combine(code.coefficients(have, lost), [row.ctypes.data for row in left], [row.ctypes.data for row in found], 8)
    assert np.array_equal(found, words[lost])
    assert decoded(code, words[:, 0], lost) == words[:, 0].tolist()


def test_what_we_have_is_passed_through() -> None:
    found = Code.of(4, 2).coefficients([5, 2, 0, 3], [2, 3, 5, 2])
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_nothing_wanted_is_no_rows() -> None:
    assert Code.of(4, 2).coefficients(range(4), []).shape == (0, 4)


def test_from_all_data_the_coefficients_are_the_parity_matrix() -> None:
    code = Code.of(6, 3)
    assert np.array_equal(code.coefficients(range(6), range(6, 9)), code.parity)


@pytest.mark.parametrize("have", [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2], [0, 1, 2, 6], [-1, 0, 1, 2]])
def test_refuses_positions_that_do_not_suffice(have: list[int]) -> None:
    with pytest.raises(ValueError, match="positions"):
        Code.of(4, 2).coefficients(have, [4])


@pytest.mark.parametrize("want", [[6], [-1], [0, 99]])
def test_refuses_to_want_what_is_not_there(want: list[int]) -> None:
    with pytest.raises(ValueError, match="stripe of 6"):
        Code.of(4, 2).coefficients([0, 1, 2, 3], want)


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (-1, 2), (2, -1), (128, 128), (255, 1)])
def test_refuses_codes_that_cannot_be(k: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"{k} data and {m} parity"):
        Code.of(k, m)
    with pytest.raises(ConfigError):
        Code(k, m)


def test_one_of_each() -> None:
    assert Code.of(4, 2) is Code.of(4, 2)
    assert Code.of(4, 2) == Code(4, 2)
    assert Code.of(4, 2).parity is Code.of(4, 2).parity
    with pytest.raises(ValueError, match="read-only"):
        Code.of(4, 2).parity[0, 0] = 1
