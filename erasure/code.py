"""The code: which parity belongs to which data, and how what is lost follows from what is left. Pure.

Systematic Reed-Solomon over GF(256) (``galois``) with first root 0 and generator 2: the code that ``reedsolo`` defines, which
therefore decodes, byte by byte, whatever is stored. One byte of each of the k data segments of a stripe, in order, and
then one of each of its m parity segments make a codeword. Nothing here touches bulk bytes: what comes out are the
coefficients with which ``kernel`` combines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import reedsolo

from ..errors import ConfigError
from .galois import POLYNOMIAL, Bytes, invert, matmul

MAX_LENGTH = 255
"""The most segments, data and parity together, that a stripe over GF(256) can have."""


@dataclass(frozen=True)
class Code:
    """A code of k data and m parity segments, any k of which give all the others.

    Positions number the segments of a stripe: 0 to k-1 are data, k to k+m-1 are parity.

    Raises:
        ConfigError: k or m is less than 1, or ``k + m > 255``.
    """

    k: int
    m: int

    def __post_init__(self) -> None:
        if self.k < 1 or self.m < 1 or self.k + self.m > MAX_LENGTH:
            raise ConfigError(
                f"a code of {self.k} data and {self.m} parity segments: it takes at least one of each, "
                f"and at most {MAX_LENGTH} together"
            )

    @staticmethod
    @cache
    def of(k: int, m: int) -> Code:
        """The code of that size; the same object, its parity matrix computed once, on every call."""
        return Code(k, m)

    @cached_property
    def parity(self) -> Bytes:
        """``uint8[m, k]``, read-only: parity segment r is the sum over j of ``parity[r, j]`` times data segment j.

        With m = 1 all coefficients are 1: plain XOR.
        """
        codec = reedsolo.RSCodec(self.m, fcr=0, prim=POLYNOMIAL, generator=2)
        columns = [bytes(codec.encode(unit.tobytes())[self.k :]) for unit in np.eye(self.k, dtype=np.uint8)]
        parity = np.frombuffer(b"".join(columns), np.uint8).reshape(self.k, self.m).T.copy()
        parity.setflags(write=False)
        return parity

    def coefficients(self, have: Sequence[int], want: Sequence[int]) -> Bytes:
        """How the segments at the positions *have* give those at the positions *want*.

        Args:
            have: k different positions, in any order.
            want: any positions; one that is also in *have* gets a row with a single 1.

        Returns:
            ``uint8[len(want), k]``, newly allocated: segment ``want[w]`` is the sum over j of row w's coefficient j times
            segment ``have[j]``.

        Raises:
            ValueError: *have* or *want* breaks a bound above.
        """
        length = self.k + self.m
        if len(have) != self.k or len(set(have)) != self.k:
            raise ValueError(f"positions {list(have)}: {self.k} different ones are needed")
        if not all(0 <= position < length for position in (*have, *want)):
            raise ValueError(f"positions {list(have)} and {list(want)} of a stripe of {length} segments")
        # Row p of the generator gives segment p from the data; the inverse of the rows we have gives the data back.
        generator = np.vstack([np.eye(self.k, dtype=np.uint8), self.parity])
        return matmul(generator[list(want)], invert(generator[list(have)]))
