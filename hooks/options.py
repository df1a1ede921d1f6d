"""What a Checkpointer was told: by its arguments first, then by a config file, then by defaults."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from ..erasure.placement import Protection
from ..errors import ConfigError
from ..storage.config import configured
from ..storage.quantity import parse_seconds
from ..storage.tiers import Tier, TierSettings, parse_tiers

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Options:
    """All checked. Attributes as ``Checkpointer``'s arguments; ``grace_s`` in seconds, None without preemption notices."""

    job: str | None
    every: int
    slots: int
    protect: str
    tiers: tuple[TierSettings, ...]
    grace_s: float | None

    @classmethod
    def read(
        cls,
        environment: Mapping[str, str],
        config: str | Path | None,
        *,
        job: str | None,
        every: int | None,
        slots: int | None,
        protect: str | None,
        tiers: Sequence[Tier] | None,
        grace: str | float | None,
    ) -> Self:
        """None stands for what was not passed. Raises ``ConfigError``."""
        said = configured(environment, config)
        every, slots = _first(every, said.every, 1), _first(slots, said.slots, 2)
        if every < 1 or slots < 2:
            raise ConfigError(f"every={every}, slots={slots}: at least 1 and 2 are needed")
        protect = _first(protect, said.protect, "auto")
        Protection.parse(protect)
        grace_s = parse_seconds(grace, "grace") if isinstance(grace, str) else grace
        if grace_s is not None and not grace_s > 0:
            raise ConfigError(f"grace={grace!r}: more than nothing is needed")
        return cls(job or said.job, every, slots, protect, parse_tiers(said.tiers if tiers is None else tiers), grace_s)


def _first(passed: Value | None, said: Value | None, default: Value) -> Value:
    return passed if passed is not None else said if said is not None else default


def natural(step: int) -> int:
    """*step*, as a plain int. Raises ``ConfigError`` if it is no natural number."""
    try:
        number = operator.index(step)
    except TypeError as error:
        raise ConfigError(f"step {step!r} is a {type(step).__name__}; a natural number is needed") from error
    if not 0 <= number < 1 << 53:
        raise ConfigError(f"step {number} is out of range; a natural number below 2**53 is needed")
    return number
