"""CRC-32C of a whole from its parts, wherever each of them lies. Pure, on NumPy arrays.

Without its initial and final inversions, a CRC is linear over GF(2): that of a text is the XOR of what each of its parts
contributes, as if all else were zeros. What a part contributes depends on its own CRC, its length, and how many bytes follow it.
Zeros that follow a register multiply it by a power of x, modulo the Castagnoli polynomial (bits reversed, as RFC 3720 has it).
"""

from __future__ import annotations

from functools import cache
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Sums: TypeAlias = npt.NDArray[np.uint32]
Counts: TypeAlias = npt.NDArray[np.int64]

_POLYNOMIAL: Final = 0x82F63B78
_ONES: Final = np.uint32(0xFFFFFFFF)
_POWERS: Final = 40  # lengths below 2**40


def contributions(sums: Sums, nbytes: Counts, after: Counts) -> Sums:
    """``uint32[n]``: what parts contribute to the CRC of a whole.

    Args:
        sums: ``uint32[n]``, the CRC-32C of each part.
        nbytes, after: ``int64[n]``, its length, and how many bytes of the whole follow it.
    """
    bare = sums ^ _inverted(nbytes)
    return _followed(bare, after)


def whole(contributed: Sums, nbytes: Counts) -> Sums:
    """``uint32[n]``: the CRC-32C of wholes of *nbytes* each, from the XOR of the contributions of all their parts."""
    return contributed ^ _inverted(nbytes)


def _inverted(nbytes: Counts) -> Sums:
    """The CRC-32C of so many zeros: what the inversions make of a text of that length."""
    return _followed(np.full(len(nbytes), _ONES, np.uint32), nbytes) ^ _ONES


def _followed(registers: Sums, nbytes: Counts) -> Sums:
    """The registers after so many zero bytes."""
    found = registers.astype(np.uint32)
    for power, matrix in enumerate(_matrices()):
        chosen = np.flatnonzero(nbytes >> power & 1)
        if len(chosen):
            found[chosen] = _times(matrix, found[chosen])
    return found


def _times(matrix: Sums, vectors: Sums) -> Sums:
    """``uint32[n]``: a 32 by 32 matrix over GF(2), given by its columns, times vectors."""
    product = np.zeros(len(vectors), np.uint32)
    for bit in range(32):
        product ^= (vectors >> np.uint32(bit) & np.uint32(1)) * matrix[bit]
    return product


@cache
def _matrices() -> list[Sums]:
    """What 1, 2, 4, 8, … zero bytes do to a register."""
    bit = np.array([_POLYNOMIAL, *(1 << n for n in range(31))], np.uint32)  # one zero bit: a shift, and the polynomial
    matrix = bit
    for _ in range(3):
        matrix = _times(matrix, matrix)
    matrices = [matrix]
    for _ in range(_POWERS - 1):
        matrix = _times(matrix, matrix)
        matrices.append(matrix)
    return matrices
