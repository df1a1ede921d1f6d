"""The settings of a job in a TOML file (``--config``, ``HOLDFAST_CONFIG``)::

    job = "run7"
    every = 1
    slots = 2
    protect = "auto"

    [[tier]]
    url = "file:///nvme/run7"
    every = "1m"

    [[tier]]
    url = "s3://bucket/run7"
    every = "auto"
    mtbf = "6h"
    milestone_steps = 10_000

Every key may be missing. What is passed to ``Checkpointer`` comes before what the file says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError
from .tiers import Tier, parse_tiers

_KINDS: Final[dict[str, tuple[type, ...]]] = {"job": (str,), "protect": (str,), "every": (int,), "slots": (int,)}
_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Config:
    """What a file says; None where it says nothing."""

    job: str | None = None
    protect: str | None = None
    every: int | None = None
    slots: int | None = None
    tiers: tuple[Tier, ...] = ()


def configured(environment: Mapping[str, str], path: str | Path | None = None) -> Config:
    """The settings in *path*; without it, in the file that ``HOLDFAST_CONFIG`` names; without that, none.

    Raises:
        ConfigError: the file cannot be read, or something in it cannot be used.
    """
    given = path or environment.get("HOLDFAST_CONFIG")
    return load_config(given) if given else Config()


def load_config(path: str | Path) -> Config:
    """The settings in the file at *path*. Paths in it that are relative begin at its folder.

    Raises:
        ConfigError: it cannot be read; a key is unknown, or has a value that cannot be used. Names file and key.
    """
    file = Path(path).expanduser().absolute()
    try:
        with file.open("rb") as stream:
            text = stream.read(_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"config {file}: {error.strerror}") from error
    if len(text) > _FILE_BYTES:
        raise ConfigError(f"config {file}: more than {_FILE_BYTES} bytes")
    try:
        return parse_config(text.decode(), file.parent)
    except ConfigError as error:
        raise ConfigError(f"config {file}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {file}: not UTF-8") from error


def parse_config(text: str, folder: Path) -> Config:
    """The settings in *text*; relative paths begin at *folder*. Raises ``ConfigError``."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"not TOML: {error}") from error
    _refuse_unknown(table, (*_KINDS, "tier"), "")
    for key, kinds in _KINDS.items():
        if key in table and type(table[key]) not in kinds:
            raise ConfigError(f"{key}={table[key]!r}: {kinds[0].__name__} is needed")
    tables = table.pop("tier", [])
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise ConfigError("tiers are written as tables in a list: [[tier]]")
    tiers = tuple(_tier(one, folder) for one in tables)
    parse_tiers(tiers)
    return Config(**table, tiers=tiers)


def _tier(table: dict[str, Any], folder: Path) -> Tier:
    _refuse_unknown(table, [field.name for field in fields(Tier)], "[[tier]] ")
    url = table.get("url")
    if not isinstance(url, str) or not url:
        raise ConfigError("[[tier]] needs a url, like 's3://bucket/run7'")
    if "://" not in url:
        table["url"] = str(folder / Path(url).expanduser())
    return Tier(**table)


def _refuse_unknown(table: dict[str, Any], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}{key}: no such key; {hint}")
