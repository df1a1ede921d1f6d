"""``holdfast.dcp``: the memory tier and the tiers behind ``torch.distributed.checkpoint.save``, ``async_save`` and ``load``."""

from __future__ import annotations

from .hooks.dcp import Reader, Writer

__all__ = ["Reader", "Writer"]
