"""Quantities as users write them, and as they are shown."""

from __future__ import annotations

import click
import pytest
from holdfast.ops.quantity import BYTES, SECONDS, show_bytes, show_milliseconds, show_ranks, show_seconds


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("17", 17), ("17B", 17), ("2 KB", 2000), ("500MB", 500_000_000), ("1.5GiB", 3 << 29), ("1TiB", 1 << 40)],
)
def test_amounts_of_memory(text: str, nbytes: int) -> None:
    assert BYTES.convert(text, None, None) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("30", 30.0), ("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0), ("2d", 172800.0), ("never", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert SECONDS.convert(text, None, None) == seconds
    assert SECONDS.convert(seconds, None, None) == seconds  # as click does with defaults


@pytest.mark.parametrize("text", ["", "-1", "1e9", "GiB", "5 parsecs", "5mb", "1,5GB", "inf", "5m5s"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="a number and one of"):
        BYTES.convert(text, None, None)
    with pytest.raises(click.BadParameter, match="a number and one of"):
        SECONDS.convert(text, None, None)


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_memory_is_shown(nbytes: int, shown: str) -> None:
    assert show_bytes(nbytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.9, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (303, "5 min 3 s"), (7800, "2 h 10 min"), (90000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_durations_are_shown(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


def test_short_times_are_shown() -> None:
    assert [show_milliseconds(s) for s in (0.0, 0.00042, 0.0174, 2.5)] == ["0.00 ms", "0.42 ms", "17 ms", "2500 ms"]


@pytest.mark.parametrize(
    ("ranks", "shown"), [([], ""), ([3], "3"), ([0, 1, 2, 3, 7], "0-3, 7"), ([0, 2, 4, 5], "0, 2, 4-5")]
)
def test_ranks_are_shown(ranks: list[int], shown: str) -> None:
    assert show_ranks(ranks) == shown
