"""A checkpoint of ``torch.distributed.checkpoint``, of full tensors under their names: it loads into any sharding of them."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from . import Advance, Wanted, omitted
from .spool import spool
from .torch_format import as_tensor


async def export(wanted: Wanted, folder: Path, advance: Advance) -> list[str]:
    """See ``Exporter``. Needs twice the room on disk while it works."""
    places = await spool(wanted.opened, wanted.tensors, folder, advance)
    state = {tensor.name: as_tensor(tensor.dtype, tensor.shape, place) for tensor, place in places.items()}
    await asyncio.to_thread(_save, state, folder)
    return omitted(wanted, "dcp")


def _save(state: dict[str, torch.Tensor], folder: Path) -> None:
    with warnings.catch_warnings():  # torch's own, about itself
        warnings.simplefilter("ignore")
        save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
