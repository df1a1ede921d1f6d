"""Holdfast keeps a distributed PyTorch training job's state alive: lazy snapshots, held outside the trainer.

Importing this package imports neither torch nor gRPC; the names below load what they need when they are first used, so
that the agent and the command line, which need no torch, start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__
from .errors import HoldfastError

if TYPE_CHECKING:
    from .hooks.checkpointer import Checkpointer
    from .hooks.contract import Deadlines, Stats, Ticket

_LAZY = frozenset({"Checkpointer", "Deadlines", "Stats", "Ticket"})


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .hooks import checkpointer, contract

    return getattr(checkpointer if name == "Checkpointer" else contract, name)


__all__ = ["Checkpointer", "Deadlines", "HoldfastError", "Stats", "Ticket", "__version__"]
