"""What a user says of a tier (``Tier``), and what it means (``TierSettings``). Pure.

Tiers are given nearest first: ``[Tier("file:///nvme/run7", every="1m"), Tier("s3://bucket/run7", every="30m")]``. What is
due in a slower one is due in the faster ones too, as it is copied from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import unquote

from ..errors import ConfigError
from .quantity import parse_bytes, parse_seconds

TIERS_LIMIT: Final = 8
"""So many at most: which of them are due is a bit mask on the beat."""

SCHEMES: Final = ("file", "s3", "gs", "az", "memory")
_COUNT_LIMIT: Final = 1 << 40
_UPLOADS_LIMIT: Final = 256
_URL_LIMIT: Final = 2048


@dataclass(frozen=True, slots=True)
class Tier:
    """A place below memory to which snapshots are spilled.

    Attributes:
        url: ``file:///nvme/run7`` or a path, ``s3://bucket/run7``, ``gs://…``, ``az://…``. Credentials come from the
            environment and the usual files, never from here. One job, one url.
        every: how often: an int is a number of steps, ``"90s"``, ``"30m"``, ``"2h"`` a time, ``"auto"`` the interval that
            loses least, computed (Young, Daly) from what the last spill took and from *mtbf*.
        keep: so many of the newest complete snapshots stay.
        milestone_steps: besides, the first snapshot at or after every multiple of this stays for ever; it is spilled when
            it comes, whatever *every* says.
        mtbf: mean time between failures of the whole job, for ``"auto"``.
        limit: of all that this tier may hold, like ``"2TB"``: the whole tier if all nodes share it, else on each node.
            Without it, what is free there.
        keep_min: if there is no room, of *keep* snapshots so many stay, and the older ones make room.
        bandwidth: at most so much is written per second by each node, like ``"500MB"``.
        uploads: so many objects are written at once by each node, at most.
        any_job: whether this job may go on from what a job of another name left here. Without it, that is not looked at.
    """

    url: str
    every: int | str = "30m"
    keep: int = 3
    milestone_steps: int | None = None
    mtbf: str = "3h"
    limit: str | None = None
    keep_min: int = 1
    bandwidth: str | None = None
    uploads: int = 8
    any_job: bool = False


@dataclass(frozen=True, slots=True)
class EverySteps:
    """At multiples of so many steps, or at the first snapshot after one."""

    steps: int


@dataclass(frozen=True, slots=True)
class EverySeconds:
    """When so much time has passed since the last one was begun."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Auto:
    """As often as loses least, given the mean time between failures."""

    mtbf_s: float


Every = EverySteps | EverySeconds | Auto
_EVERY: Final[dict[str, Callable[[Any], Every]]] = {
    "steps": lambda value: EverySteps(int(value)),
    "seconds": lambda value: EverySeconds(float(value)),
    "mtbf_s": lambda value: Auto(float(value)),
}


@dataclass(frozen=True, slots=True)
class TierSettings:
    """A ``Tier``, checked and in plain units. ``url`` has a scheme, and a path that is absolute and without ``..``."""

    url: str
    every: Every
    keep: int
    milestone_steps: int | None = None
    limit_bytes: int | None = None
    keep_min: int = 1
    bytes_per_s: int | None = None
    uploads: int = 8
    any_job: bool = False

    @classmethod
    def parse(cls, tier: Tier) -> Self:
        """Check what the user said. A path is taken from the working directory: parse where it was written.

        Raises:
            ConfigError: something cannot be used; names it.
        """
        url = parse_url(tier.url)
        what = f"tier {url}: "
        keep = _count(tier.keep, what + "keep")
        keep_min = _count(tier.keep_min, what + "keep_min")
        if keep_min > keep:
            raise ConfigError(f"{what}keep_min={keep_min} is more than keep={keep}")
        return cls(
            url,
            _every(tier, what),
            keep,
            None if tier.milestone_steps is None else _count(tier.milestone_steps, what + "milestone_steps"),
            None if tier.limit is None else parse_bytes(tier.limit, what + "limit"),
            keep_min,
            None if tier.bandwidth is None else parse_bytes(tier.bandwidth, what + "bandwidth"),
            _count(tier.uploads, what + "uploads", _UPLOADS_LIMIT),
            _flag(tier.any_job, what + "any_job"),
        )

    def to_json(self) -> str:
        """One line of JSON, for the wire."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of ``to_json``. Everything is checked again.

        Raises:
            ConfigError: it is not what ``to_json`` gives.
        """
        try:
            fields = json.loads(text)
            ((unit, amount),) = fields.pop("every").items()
            settings = cls(every=_EVERY[unit](amount), **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ConfigError(f"settings of a tier cannot be read: {text[:200]!r}") from error
        settings._check()
        return settings

    def _check(self) -> None:
        if not isinstance(self.url, str) or parse_url(self.url) != self.url:
            raise ConfigError(f"settings of a tier: url {self.url!r} is not whole")
        counts: dict[str, Any] = {"keep": self.keep, "keep_min": self.keep_min, "uploads": self.uploads}
        optional = {
            "milestone_steps": self.milestone_steps,
            "limit_bytes": self.limit_bytes,
            "bytes_per_s": self.bytes_per_s,
        }
        counts |= {name: value for name, value in optional.items() if value is not None}
        match self.every:
            case EverySteps(steps):
                counts["every"] = steps
            case EverySeconds(seconds) | Auto(seconds):
                if not 0 < seconds < _COUNT_LIMIT:
                    raise ConfigError(f"settings of a tier: {seconds} seconds")
        for name, value in counts.items():
            _count(value, f"settings of a tier: {name}", 1 << 62)
        _flag(self.any_job, "settings of a tier: any_job")


def parse_tiers(tiers: Sequence[Tier]) -> tuple[TierSettings, ...]:
    """All tiers of a job, nearest first, as given.

    Raises:
        ConfigError: one of them cannot be used; there are too many; two are the same place, or one lies within another.
    """
    for tier in tiers:
        if not isinstance(tier, Tier):
            raise ConfigError(f"tiers={tier!r}: a holdfast.Tier is needed, like Tier('s3://bucket/run')")
    if len(tiers) > TIERS_LIMIT:
        raise ConfigError(f"{len(tiers)} tiers: {TIERS_LIMIT} at most")
    parsed = tuple(TierSettings.parse(tier) for tier in tiers)
    for index, settings in enumerate(parsed):
        for other in (*parsed[:index], *parsed[index + 1 :]):
            if (settings.url + "/").startswith(other.url + "/"):
                raise ConfigError(f"tier {settings.url} lies in tier {other.url}: each needs a place of its own")
    return parsed


def parse_url(url: object) -> str:
    """*url* with its scheme, without a final slash; a path becomes a ``file://`` URL, from the working directory.

    Raises:
        ConfigError: no such place can be; the message never repeats credentials.
    """
    if not isinstance(url, str) or not url or len(url) > _URL_LIMIT or not url.isprintable():
        raise ConfigError(f"tier {str(url)[:200]!r}: a path or a URL is needed, of {_URL_LIMIT} characters at most")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _file_url(Path(url).expanduser())
    if scheme not in SCHEMES:
        raise ConfigError(f"tier {scheme}://…: one of {', '.join(f'{known}://' for known in SCHEMES)} is needed")
    if "@" in rest.partition("/")[0]:
        raise ConfigError(f"tier {scheme}://…: credentials do not belong in a URL; set them in the environment")
    if "?" in rest or "#" in rest:
        raise ConfigError(f"tier {url.partition('?')[0].partition('#')[0]}: no ?… or #… is understood in it")
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigError(f"tier {url}: a file URL has three slashes, like file:///nvme/run7")
        return _file_url(Path(unquote(rest)))
    bucket, *path = rest.rstrip("/").split("/")
    if (not bucket and scheme != "memory") or any(part in ("", ".", "..") for part in path):
        raise ConfigError(f"tier {url}: a bucket is needed, and no empty part, '.' or '..' after it")
    return f"{scheme}://{rest.rstrip('/')}"


def _file_url(path: Path) -> str:
    if ".." in path.parts or not str(path).isprintable():
        raise ConfigError(f"tier {str(path)!r}: '..' cannot be in it, nor what cannot be printed")
    whole = Path.cwd() / path
    if whole == Path("/"):
        raise ConfigError("tier file:///: a folder is needed, not the root of the file system")
    return whole.as_uri()


def _every(tier: Tier, what: str) -> Every:
    if tier.every == "auto":
        return Auto(parse_seconds(tier.mtbf, what + "mtbf"))
    if isinstance(tier.every, str):
        return EverySeconds(parse_seconds(tier.every, what + "every"))
    return EverySteps(_count(tier.every, what + "every"))


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{what}={value!r}: True or False is needed")
    return value


def _count(value: object, what: str, limit: int = _COUNT_LIMIT) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ConfigError(f"{what}={value!r}: a whole number from 1 to {limit} is needed")
    return value
