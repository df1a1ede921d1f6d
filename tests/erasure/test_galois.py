"""The field: against ``reedsolo``'s arithmetic, and its own laws."""

from __future__ import annotations

import numpy as np
import pytest
import reedsolo
from holdfast.erasure.galois import POLYNOMIAL, PRODUCTS, Bytes, combine, invert, matmul, multiply_add
from hypothesis import given
from hypothesis import strategies as st

ELEMENTS = np.arange(256, dtype=np.uint8)


def test_products_are_reedsolos() -> None:
    expected = [[reedsolo.gf_mult_noLUT(a, b, prim=POLYNOMIAL) for b in range(256)] for a in range(256)]
    assert PRODUCTS.tolist() == expected


def test_nobody_changes_the_table() -> None:
    with pytest.raises(ValueError, match="read-only"):
        PRODUCTS[1, 1] = 0


def test_multiply_add() -> None:
    target = ELEMENTS[::-1].copy()
    multiply_add(target, ELEMENTS, 29)
    assert target.tolist() == [(255 - a) ^ int(PRODUCTS[29, a]) for a in range(256)]


def test_combine_overwrites() -> None:
    target = np.full(256, 9, np.uint8)
    combine(np.array([[3, 1]], np.uint8), [ELEMENTS, ELEMENTS], [target])
    assert target.tolist() == [int(PRODUCTS[2, a]) for a in range(256)]


def invertible(n: int, rng: np.random.Generator) -> Bytes:
    """A random matrix with an inverse: two triangles without zeros in their diagonals, rows shuffled."""
    lower, upper = rng.integers(1, 256, (2, n, n), np.uint8)
    return matmul(np.tril(lower), np.triu(upper))[rng.permutation(n)]


@given(n=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_a_matrix_times_its_inverse(n: int, seed: int) -> None:
    matrix = invertible(n, np.random.default_rng(seed))
    inverse = invert(matrix)
    assert np.array_equal(matmul(matrix, inverse), np.eye(n, dtype=np.uint8))
    assert np.array_equal(matmul(inverse, matrix), np.eye(n, dtype=np.uint8))


@given(n=st.integers(2, 12), seed=st.integers(0, 2**32 - 1))
def test_a_row_that_follows_from_the_others(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = invertible(n, rng)
    matrix[-1] = matmul(rng.integers(0, 256, (1, n - 1), np.uint8), matrix[:-1])[0]
    with pytest.raises(ValueError, match="singular"):
        invert(matrix[rng.permutation(n)])


@pytest.mark.parametrize("matrix", [[[0]], [[1, 1], [1, 1]], [[2, 4], [1, 2]], [[1, 2, 3], [0, 0, 0], [4, 5, 6]]])
def test_a_singular_matrix_has_no_inverse(matrix: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="singular"):
        invert(np.array(matrix, np.uint8))


def test_invert_leaves_its_argument_alone() -> None:
    matrix = np.array([[0, 7], [5, 3]], np.uint8)
    invert(matrix)
    assert matrix.tolist() == [[0, 7], [5, 3]]
