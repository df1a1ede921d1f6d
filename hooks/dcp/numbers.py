"""Which training step the name of a checkpoint means. Pure."""

from __future__ import annotations

import os
import re
from typing import Final

from ...errors import ConfigError
from ..options import natural

_LAST_NUMBER: Final = re.compile(r"(\d+)\D*\Z", re.ASCII)


def step_of(checkpoint_id: str | os.PathLike[str] | int) -> int:
    """The last number in the last part of the name: 1200 of ``1200``, ``"step-1200"``, ``"/ckpts/run7/step_001200.dcp"``.

    Raises ``ConfigError`` if there is none, or it is no step.
    """
    if isinstance(checkpoint_id, int):
        return natural(checkpoint_id)
    name = os.fspath(checkpoint_id).rstrip("/").rpartition("/")[2]
    found = _LAST_NUMBER.search(name)
    if found is None:
        raise ConfigError(f"checkpoint_id {checkpoint_id!r} names no step; one that ends like 'step-1200' is needed")
    return natural(int(found[1]))
