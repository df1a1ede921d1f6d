"""GF(256), the field of the code, on NumPy arrays: slow and obvious. Pure.

Elements are bytes. Adding is XOR; multiplying is that of polynomials over GF(2), modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d),
of which 2 is a generator: the field of ``reedsolo`` and of ISA-L. Small matrices are worked on here; for bulk bytes these
functions are the twins that ``kernel`` is held to, and falls back to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]

POLYNOMIAL = 0x11D


def _products() -> Bytes:
    """The product of every two elements: of powers of 2, by adding their exponents."""
    powers = [1]
    while len(powers) < 255:
        doubled = powers[-1] << 1
        powers.append(doubled ^ POLYNOMIAL if doubled & 0x100 else doubled)
    exponents = np.arange(255)
    table = np.zeros((256, 256), np.uint8)
    table[np.ix_(powers, powers)] = np.array(powers, np.uint8)[(exponents[:, None] + exponents) % 255]
    table.setflags(write=False)
    return table


PRODUCTS = _products()
"""``uint8[256, 256]``, read-only: ``PRODUCTS[a, b]`` is a times b."""


def multiply_add(target: Bytes, source: Bytes, coefficient: int) -> None:
    """Add *coefficient* times *source* to *target*, in place. Both are ``uint8[n]`` and do not overlap."""
    target ^= PRODUCTS[coefficient].take(source)


def combine(matrix: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
    """Set ``targets[r]`` to the sum over j of ``matrix[r, j] * sources[j]``, whatever it held.

    *matrix* is ``uint8[len(targets), len(sources)]``; all others are ``uint8[n]``, and no target overlaps anything.
    """
    for row, target in zip(matrix, targets, strict=True):
        target[:] = 0
        for coefficient, source in zip(row, sources, strict=True):
            multiply_add(target, source, coefficient)


def matmul(left: Bytes, right: Bytes) -> Bytes:
    """The matrix product, ``uint8[r, c]``, of ``uint8[r, n]`` and ``uint8[n, c]``."""
    product = np.empty((len(left), right.shape[1]), np.uint8)
    combine(left, list(right), list(product))
    return product


def invert(matrix: Bytes) -> Bytes:
    """The inverse of ``uint8[n, n]``, by Gauss-Jordan elimination.

    Raises:
        ValueError: the matrix has none.
    """
    n = len(matrix)
    work = np.hstack([matrix, np.eye(n, dtype=np.uint8)])
    for column in range(n):
        pivot = column + int(np.argmax(work[column:, column] != 0))
        if work[pivot, column] == 0:
            raise ValueError("a singular matrix has no inverse")
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = PRODUCTS[_reciprocal(int(work[column, column]))][work[column]]
        factors = work[:, column].copy()
        factors[column] = 0
        work ^= PRODUCTS[factors[:, None], work[column]]
    return work[:, n:].copy()


def _reciprocal(element: int) -> int:
    return int(np.argmax(PRODUCTS[element] == 1))
