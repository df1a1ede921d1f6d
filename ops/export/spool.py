"""A file whose bytes are an array: what is written into the array, the kernel writes into the file, and drops as it likes."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from ...snapshot.layout import align
from ..contents import Bytes, Opened, Tensor, stream
from . import Advance

_PAGE = 4096


def mapped(file: IO[bytes], nbytes: int) -> Bytes:
    """All *nbytes* of *file*, which is made so long. The file stays mapped as long as the array, or a view of it, lives.

    Raises:
        OSError: the disk is full; it would be a SIGBUS later.
    """
    if nbytes == 0:
        return np.empty(0, np.uint8)
    os.posix_fallocate(file.fileno(), 0, nbytes)
    return np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)


async def fill(opened: Opened, places: Mapping[Tensor, Bytes], advance: Advance) -> None:
    """Read each tensor into its place, which is as long as it is."""
    async for cell in stream(opened, places):
        await asyncio.to_thread(cell.put_into, places[cell.tensor])
        advance(cell.bytes.nbytes)


async def spool(opened: Opened, chosen: Iterable[Tensor], folder: Path, advance: Advance) -> dict[Tensor, Bytes]:
    """The bytes of each tensor, in a file without a name on *folder*'s file system: for libraries that want everything in
    memory. It goes with the last view."""
    starts: dict[Tensor, int] = {}
    end = 0
    for tensor in chosen:
        starts[tensor] = end
        end = align(end + tensor.nbytes, _PAGE)
    with tempfile.TemporaryFile(dir=folder) as file:
        whole = mapped(file, end)
    places = {tensor: whole[start : start + tensor.nbytes] for tensor, start in starts.items()}
    await fill(opened, places, advance)
    return places
