"""What the bits of torch's dtypes mean, as NumPy numbers, without torch: for comparing tensors and for their statistics.

NumPy has no bfloat16, float8 or complex32. bfloat16 is the upper half of a float32; a float8 has 256 values, which are computed
once from its definition (OCP's OFP8, and the variants that AMD's processors have); complex32 is a pair of float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..snapshot.layout import ITEM_BYTES

_MOST: Final = float(np.finfo(np.float64).max)  # JSON has no infinity
_NATIVE: Final = frozenset(
    {"bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
     "complex64", "complex128"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Float8:
    """A format of one byte: sign, exponent, mantissa. ``finite``: there are no infinities; NaN is all ones, or, with
    ``unsigned_zero``, what would be −0."""

    mantissa: int
    bias: int
    finite: bool
    unsigned_zero: bool = False


_FLOAT8: Final = {
    "float8_e4m3fn": _Float8(3, 7, finite=True),
    "float8_e4m3fnuz": _Float8(3, 8, finite=True, unsigned_zero=True),
    "float8_e5m2": _Float8(2, 15, finite=False),
    "float8_e5m2fnuz": _Float8(2, 16, finite=True, unsigned_zero=True),
}


def numbers(dtype: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The elements of these bytes (little-endian, ``uint8[n * item]``) as a flat array of a NumPy dtype.

    A view for the dtypes that NumPy has; a new array of float32 or complex64, exact, for the others.
    """
    if dtype in _NATIVE:
        return data.view(dtype)
    if dtype == "bfloat16":
        upper = np.left_shift(data.view(np.uint16), np.uint32(16), dtype=np.uint32)
        return upper.view(np.float32)
    if dtype == "complex32":
        with np.errstate(invalid="ignore"):  # signalling NaNs become quiet ones
            return data.view(np.float16).astype(np.float32).view(np.complex64)
    table: npt.NDArray[np.float32] = _table(dtype)[data]
    return table


@cache
def _table(dtype: str) -> npt.NDArray[np.float32]:
    """The 256 values of a float8."""
    if dtype == "float8_e8m0fnu":
        return np.array([math.ldexp(1.0, bits - 127) for bits in range(255)] + [math.nan], np.float32)
    kind = _FLOAT8[dtype]
    return np.array([_value(bits, kind) for bits in range(256)], np.float32)


def _value(bits: int, kind: _Float8) -> float:
    sign = -1.0 if bits & 0x80 else 1.0
    exponent, mantissa = (bits & 0x7F) >> kind.mantissa, bits & ((1 << kind.mantissa) - 1)
    if kind.unsigned_zero and bits == 0x80:
        return math.nan
    if not kind.unsigned_zero:
        if kind.finite and bits & 0x7F == 0x7F:
            return math.nan
        if not kind.finite and exponent == 0x7F >> kind.mantissa:
            return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - kind.bias - kind.mantissa)
    return sign * math.ldexp((1 << kind.mantissa) + mantissa, exponent - kind.bias - kind.mantissa)


# -- statistics -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stats:
    """Of the elements of a tensor, added window by window. Of complex numbers, the magnitudes count.

    ``low``, ``high`` and ``mean`` are of the finite elements, None if there are none.
    """

    dtype: str
    count: int = 0
    zeros: int = 0
    nans: int = 0
    infinities: int = 0
    low: float | None = None
    high: float | None = None
    _sum: float = 0.0

    def add(self, data: npt.NDArray[np.uint8]) -> None:
        """Count these bytes in."""
        found = _magnitudes(numbers(self.dtype, data))
        self.count += found.size
        self.zeros += int(np.count_nonzero(found == 0))
        if found.dtype.kind == "f":
            finite = np.isfinite(found)
            nans = int(np.count_nonzero(np.isnan(found)))
            self.nans += nans
            self.infinities += found.size - int(np.count_nonzero(finite)) - nans
            if nans or self.infinities:
                found = found[finite]
        if found.size:
            low, high = found.min().item(), found.max().item()
            self.low = low if self.low is None else min(self.low, low)
            self.high = high if self.high is None else max(self.high, high)
            self._sum += float(found.sum(dtype=np.float64))

    @property
    def mean(self) -> float | None:
        """Of the finite elements."""
        finite = self.count - self.nans - self.infinities
        return self._sum / finite if finite else None


def _magnitudes(found: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if found.dtype.kind == "c":
        with np.errstate(invalid="ignore", over="ignore"):
            sizes: npt.NDArray[Any] = np.abs(found)
        return sizes
    return found.view(np.uint8) if found.dtype.kind == "b" else found


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Difference:
    """By how much two tensors of the same dtype and shape differ, added window by window.

    Attributes:
        elements: whose bits differ; two NaNs of different bits count here, and so do 0 and −0.
        largest: absolute difference of two finite elements; None if none differ.
        relative: the largest difference, divided by the larger of the two magnitudes.
        unlike: elements that are finite on one side only, or infinite or NaN in different ways.
    """

    dtype: str
    count: int = 0
    elements: int = 0
    largest: float | None = None
    relative: float | None = None
    unlike: int = 0
    _sum: float = field(default=0.0)

    def add(self, a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> None:
        """Count in these bytes of the one and of the other."""
        item = ITEM_BYTES[self.dtype]
        self.count += a.size // item
        if np.array_equal(a, b):
            return
        unequal = (a.reshape(-1, item) != b.reshape(-1, item)).any(axis=1)
        self.elements += int(np.count_nonzero(unequal))
        mine, theirs = (
            numbers(self.dtype, np.ascontiguousarray(side.reshape(-1, item)[unequal]).reshape(-1)) for side in (a, b)
        )
        if mine.dtype.kind in "fc":
            both = np.isfinite(mine) & np.isfinite(theirs)
            self.unlike += int(np.count_nonzero(~both & ~(np.isnan(mine) & np.isnan(theirs)) & (mine != theirs)))
            mine, theirs = mine[both], theirs[both]
        if mine.size:
            self._measure(mine, theirs)

    def _measure(self, mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> None:
        wide = np.complex128 if mine.dtype.kind == "c" else np.float64
        with np.errstate(over="ignore"):
            x, y = mine.astype(wide), theirs.astype(wide)
            apart = np.minimum(_apart(mine, theirs) if mine.dtype.kind in "iu" else np.abs(x - y), _MOST)
            scale = np.maximum(np.abs(x), np.abs(y))
        relative = np.divide(apart, scale, out=np.zeros_like(apart), where=scale > 0)
        self.largest = max(self.largest or 0.0, float(apart.max()))
        self.relative = max(self.relative or 0.0, float(relative.max()))
        self._sum += float(apart.sum())

    @property
    def mean(self) -> float:
        """Absolute difference, over all elements; those that are not finite count as equal."""
        return self._sum / self.count if self.count else 0.0


def _apart(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The differences of integers, exact where those of floats are not."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    apart: npt.NDArray[np.float64] = (np.maximum(a, b).view(unsigned) - np.minimum(a, b).view(unsigned)).astype(
        np.float64
    )
    return apart
