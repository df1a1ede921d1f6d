"""What bits mean, against torch; statistics and differences, against NumPy on whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from holdfast.ops.numbers import Difference, Stats, numbers
from holdfast.snapshot.layout import ITEM_BYTES


def every_bit(dtype: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """All values of small dtypes, many of others."""
    if ITEM_BYTES[dtype] == 1:
        return np.arange(2 if dtype == "bool" else 256, dtype=np.uint8)
    if ITEM_BYTES[dtype] == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return np.random.default_rng(1).integers(0, 256, 4096, np.uint8)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_the_numbers_are_those_of_torch(dtype: str) -> None:
    data = every_bit(dtype)
    tensor = torch.from_numpy(data.copy()).view(getattr(torch, dtype))
    wide = tensor.to(torch.complex64) if dtype == "complex32" else tensor
    if dtype.startswith(("float8", "bfloat16")):
        wide = tensor.to(torch.float32)
    np.testing.assert_array_equal(numbers(dtype, data), wide.numpy())


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int16", "bool", "uint64", "complex64", "float8_e5m2"]
)
def test_statistics_do_not_depend_on_how_the_bytes_come(dtype: str) -> None:
    data = every_bit(dtype)
    whole, parts = Stats(dtype), Stats(dtype)
    whole.add(data)
    half = data.size // ITEM_BYTES[dtype] // 3 * ITEM_BYTES[dtype]
    parts.add(data[:half])
    parts.add(data[half:])
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaNs
        found = np.abs(numbers(dtype, data)) if dtype == "complex64" else numbers(dtype, data).astype(np.float64)
    finite = found[np.isfinite(found)]
    for stats in (whole, parts):
        assert stats.count == found.size
        assert stats.nans == np.count_nonzero(np.isnan(found))
        assert stats.infinities == np.count_nonzero(np.isinf(found))
        assert stats.zeros == np.count_nonzero(found == 0)
        assert (stats.low, stats.high) == (finite.min(), finite.max())
        finite = finite.astype(np.float64)
        assert stats.mean == pytest.approx(finite.mean(), abs=1e-12 * np.abs(finite).max())


def test_nothing_finite_has_no_mean() -> None:
    stats = Stats("float32")
    stats.add(np.array([math.nan, math.inf], np.float32).view(np.uint8))
    assert (stats.low, stats.high, stats.mean, stats.nans, stats.infinities) == (None, None, None, 1, 1)


def difference(dtype: str, a: list[float], b: list[float]) -> Difference:
    found = Difference(dtype)
    found.add(np.array(a, dtype).view(np.uint8), np.array(b, dtype).view(np.uint8))
    return found


def test_differences() -> None:
    found = difference("float32", [1, 2, 3, 0.0], [1, 2.5, 1, -0.0])
    assert (found.count, found.elements, found.largest, found.unlike) == (4, 3, 2.0, 0)
    assert found.relative == pytest.approx(2 / 3)
    assert found.mean == 2.5 / 4
    same = difference("float32", [1, math.nan], [1, math.nan])
    assert (same.elements, same.largest, same.mean) == (0, None, 0.0)


def test_what_is_not_finite_has_no_distance() -> None:
    found = difference("float64", [math.nan, math.inf, 1, -math.inf], [1, math.inf, math.nan, math.inf])
    assert (found.elements, found.unlike, found.largest) == (3, 3, None)
    assert difference("float64", [1.7e308], [-1.7e308]).largest == pytest.approx(1.797e308, rel=0.01)


def test_large_integers_keep_their_distance() -> None:
    assert difference("int64", [2**62 + 1], [2**62]).largest == 1
    assert difference("int8", [-128], [127]).largest == 255
    assert difference("uint64", [2**64 - 1], [0]).largest == float(2**64 - 1)
    assert difference("bool", [True], [False]).largest == 1
