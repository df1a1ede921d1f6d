"""Amounts as people write them: ``64GiB``, ``500MB``, ``30s``, ``1.5h``. Pure."""

from __future__ import annotations

import re
from typing import Final

from ..errors import ConfigError

BYTES: Final = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)},
}
SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NUMBER: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+)", re.ASCII)


def parse_bytes(text: object, what: str) -> int:
    """Bytes that *text* says. Raises ``ConfigError``, naming *what*, if it is no positive amount with its unit."""
    nbytes = int(_parse(text, what, "an amount of bytes", BYTES))
    if nbytes < 1:
        raise ConfigError(f"{what}={text!r}: at least one byte is needed")
    return nbytes


def parse_seconds(text: object, what: str) -> float:
    """Seconds that *text* says. Raises ``ConfigError``, naming *what*, if it is no positive duration with its unit."""
    seconds = _parse(text, what, "a duration", SECONDS)
    if seconds <= 0:
        raise ConfigError(f"{what}={text!r}: more than nothing is needed")
    return seconds


def _parse(text: object, what: str, kind: str, units: dict[str, int]) -> float:
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ConfigError(f"{what}={text!r} is not {kind}: a text of a number and one of {', '.join(units)} is needed")
    return float(match[1]) * units[match[2]]
