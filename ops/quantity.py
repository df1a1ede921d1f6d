"""Quantities on the command line: ``64GiB``, ``500MB``, ``5m``, ``1.5h``; and how they are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import click

_BYTES: Final = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


class _Bytes(click.ParamType[int]):
    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _NUMBER.fullmatch(str(value))
        if match is None or match[2] not in _BYTES:
            self.fail(
                f"{value!r} is no amount of memory; a number and one of {', '.join(filter(None, _BYTES))} is",
                param,
                ctx,
            )
        return int(float(match[1]) * _BYTES[match[2]])


class _Seconds(click.ParamType[float | None]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value is None or value == "never":
            return None
        match = _NUMBER.fullmatch(str(value))
        if match is None or match[2] not in _SECONDS:
            self.fail(f"{value!r} is no duration; a number and one of s, m, h, d is", param, ctx)
        return float(match[1]) * _SECONDS[match[2]]


BYTES: Final = _Bytes()
SECONDS: Final = _Seconds()


def show_bytes(nbytes: int) -> str:
    """Like ``1.5 GiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_seconds(seconds: float) -> str:
    """Like ``42 s``, ``5 min 3 s``, ``2 h 10 min``, ``3 d 4 h``: the two largest units."""
    whole = int(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


def show_milliseconds(seconds: float) -> str:
    """Like ``0.42 ms``, ``17 ms``."""
    ms = 1000 * seconds
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.0f} ms"


def show_ranks(ranks: Sequence[int]) -> str:
    """Like ``0-3, 7``; *ranks* are distinct and in order."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
