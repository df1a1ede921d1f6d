"""One file ``snapshot.safetensors``: eight bytes with the length of the header, the header (JSON), the tensors.

Written by ourselves, since the library wants all tensors in memory. The longest elements come first, then by name, as the
library has it, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Final

import numpy as np

from ...errors import StateRefused
from ...snapshot.layout import ITEM_BYTES
from ..contents import Bytes, Tensor
from . import Advance, Wanted, omitted
from .spool import fill, mapped

FILE: Final = "snapshot.safetensors"
_HEADER_LIMIT: Final = 100_000_000  # of the library
_DTYPES: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


async def export(wanted: Wanted, folder: Path, advance: Advance) -> list[str]:
    """See ``Exporter``. Raises ``StateRefused`` for a dtype that the format does not have."""
    chosen = sorted(wanted.tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    header, data_bytes = _header(wanted, chosen), sum(tensor.nbytes for tensor in chosen)
    with open(folder / FILE, "x+b") as file:
        whole = mapped(file, len(header) + data_bytes)
        whole[: len(header)] = np.frombuffer(header, np.uint8)
        places: dict[Tensor, Bytes] = {}
        end = len(header)
        for tensor in chosen:
            places[tensor] = whole[end : end + tensor.nbytes]
            end += tensor.nbytes
        await fill(wanted.opened, places, advance)
    return omitted(wanted, "safetensors")


def _header(wanted: Wanted, chosen: list[Tensor]) -> bytes:
    id = wanted.opened.id
    document: dict[str, object] = {
        "__metadata__": {
            "format": "pt", "job": wanted.opened.job, "run": id.run, "step": str(id.step), "generation": str(id.generation),
        }
    }  # fmt: skip
    end = 0
    for tensor in chosen:
        if tensor.name in document or not tensor.name.isprintable():
            raise StateRefused(f"{tensor.name!r} is no name for a tensor in safetensors; leave it out (--only)")
        if tensor.dtype not in _DTYPES:
            raise StateRefused(
                f"{tensor.name}: safetensors has no dtype {tensor.dtype}; choose another --format, or leave it out (--only)"
            )
        start, end = end, end + tensor.nbytes
        document[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise StateRefused(
            f"{len(chosen)} tensors make a header of {len(text)} bytes; safetensors allows {_HEADER_LIMIT}"
        )
    return struct.pack("<Q", len(text)) + text
