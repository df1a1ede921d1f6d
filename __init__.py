"""Holdfast keeps a distributed PyTorch training job's state alive: lazy snapshots, held outside the trainer.

Importing this package imports neither torch nor gRPC; the names below load what they need when they are first used, so
that the agent and the command line, which need no torch, start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__
from .errors import HoldfastError

if TYPE_CHECKING:
    from . import dcp
    from .hooks.accelerate import accelerated as accelerated
    from .hooks.batches import Batches
    from .hooks.checkpointer import Checkpointer
    from .hooks.contract import Deadlines, Stats, Ticket
    from .hooks.lightning import HoldfastCallback as HoldfastCallback
    from .hooks.transformers import HoldfastTrainerCallback as HoldfastTrainerCallback
    from .storage.tiers import Tier

_LAZY = {
    "Batches": ".hooks.batches",
    "Checkpointer": ".hooks.checkpointer",
    "Deadlines": ".hooks.contract",
    "HoldfastCallback": ".hooks.lightning",
    "HoldfastTrainerCallback": ".hooks.transformers",
    "Stats": ".hooks.contract",
    "Ticket": ".hooks.contract",
    "Tier": ".storage.tiers",
    "accelerated": ".hooks.accelerate",
}
_MODULES = frozenset({"dcp"})


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


# Adapters are offered too, to those who have the framework.
__all__ = ["Batches", "Checkpointer", "Deadlines", "HoldfastError", "Stats", "Ticket", "Tier", "__version__", "dcp"]
