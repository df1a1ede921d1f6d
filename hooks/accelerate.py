"""Hugging Face Accelerate: a ``Checkpointer`` made of prepared objects, in a training loop of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from accelerate import Accelerator, skip_first_batches
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn
from torch.utils.data import DataLoader

from ..errors import ConfigError
from .batches import Batches
from .checkpointer import Checkpointer


def accelerated(
    accelerator: Accelerator, *prepared: Any, extras: Mapping[str, Any] | None = None, **options: Any
) -> Checkpointer:
    """A ``Checkpointer`` for what ``accelerator.prepare`` gave, which may come in any order.

    Call its ``step`` where ``accelerator.sync_gradients`` is true: gradients are not captured, so in the middle of an
    accumulation there is nothing to snapshot.

    Args:
        accelerator: its gradient scaler, if it has one, is captured too.
        prepared: models, optimizers, schedulers; and data loaders, each within a ``Batches``.
        extras: more state, as for ``Checkpointer``.
        options: of ``Checkpointer``: ``every``, ``slots``, ``protect``, ``tiers``, ``job``, ``strict`` and so on.

    Raises:
        ConfigError: something else among *prepared*; and what ``Checkpointer`` raises.
    """
    models = [one for one in prepared if isinstance(one, nn.Module)]
    optimizers = [one.optimizer for one in prepared if isinstance(one, AcceleratedOptimizer)]
    loaders = [one for one in prepared if isinstance(one, Batches)]
    found = {
        "scheduler": [one for one in prepared if isinstance(one, AcceleratedScheduler)],
        "batches": loaders,
        "scaler": [accelerator.scaler] if accelerator.scaler is not None else [],
    }
    kinds = (nn.Module, AcceleratedOptimizer, AcceleratedScheduler, Batches)
    for one in prepared:
        if not isinstance(one, kinds):
            hint = "; wrap it: holdfast.Batches(loader)" if isinstance(one, DataLoader) else ""
            raise ConfigError(f"{type(one).__name__} is no model, optimizer or scheduler that was prepared{hint}")
    for batches in loaders:
        if not getattr(batches, "use_stateful_dataloader", False):  # those remember their position themselves
            batches.skip_with(_rest)
    parts = {name: part for kind, parts in found.items() for name, part in _named(kind, parts).items()}
    return Checkpointer(_several(models), _several(optimizers), {**parts, **(extras or {})}, **options)


def _named(kind: str, parts: list[Any]) -> dict[str, Any]:
    """One part by its kind, several by number too."""
    return {kind if len(parts) == 1 else f"{kind}{i}": part for i, part in enumerate(parts)}


def _several(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else {str(i): part for i, part in enumerate(parts)}


def _rest(loader: Any, count: int) -> Iterator[Any]:
    """Accelerate's own way to skip, for one pass of *loader*, which counts its passes."""
    # It fetches one batch ahead of what it hands out, and notices the end then. So all but one are skipped without being
    # loaded, and the last one is handed out to nobody: then it stands, and has drawn, as it had before.
    iterator = iter(skip_first_batches(loader, max(count - 1, 0)))
    for _ in islice(iterator, min(count, 1)):
        pass

    def left() -> Iterator[Any]:
        yield from iterator
        loader.set_epoch(loader.iteration + 1)

    return left()
