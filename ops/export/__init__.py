"""Snapshots as files for other programs: one module per format, loaded when it is asked for. Only torch and dcp need torch.

Whatever the format: tensors have their global shapes and their names (``model.…``, ``optim.…``), as snapshots have them. They are
read window by window and written as they come, so memory stays bounded; and the folder gets its name when all of it is durable.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..contents import Opened, Tensor

FORMATS: Final = ("zarr", "safetensors", "torch", "dcp")

Advance = Callable[[int], None]
"""Told how many bytes of tensors have been written since the last call."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be written.

    Attributes:
        tensors: whole ones.
        values: whether what is no tensor is wanted too (RNG, data loader, ...), and the tensors that ranks have of their own.
        only: the patterns by which the tensors were chosen; empty for all.
    """

    opened: Opened
    tensors: tuple[Tensor, ...]
    values: bool
    only: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Of the tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors)


Exporter = Callable[[Wanted, Path, Advance], Coroutine[Any, Any, list[str]]]
"""Writes into a folder that exists and is empty; says in words what of the snapshot the format has no place for."""


def exporter(format: str) -> Exporter:
    """The function that writes *format*, one of ``FORMATS``."""
    found: Exporter = importlib.import_module(f".{format}_format", __package__).export
    return found


def omitted(wanted: Wanted, format: str) -> list[str]:
    """What a format that only knows global tensors leaves out, in words."""
    if not wanted.values:
        return []
    own = sorted({piece.rank for tensor in wanted.tensors for piece in tensor.own})
    lines = [f"{format} has no place for what is no tensor (RNG, data loader, schedulers, ...): left out"]
    if own:
        count = sum(bool(tensor.own) for tensor in wanted.tensors)
        lines.append(f"{count} tensors of which ranks have bytes of their own: left out for {len(own)} ranks (--rank)")
    return lines
