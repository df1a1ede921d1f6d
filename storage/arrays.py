"""The metadata of zarr arrays and groups, made by zarr itself.

Payloads are written and read by us (``writer``, ``reader``), as the codecs named here prescribe: little-endian, in C order,
followed by their crc32c. zarr is imported when metadata are first made, not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from .chunks import Array

# Types that zarr does not have as such are stored as their bits; the attributes have torch's name.
STORED_AS: Final[Mapping[str, str]] = {
    "bfloat16": "uint16", "complex32": "uint32",
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), "uint8"),
}  # fmt: skip


def array_metadata(array: Array) -> bytes:
    """The ``zarr.json`` of *array*. Blocks for a fraction of a millisecond; made once for equal arrays."""
    facts: dict[str, Any] = {"dtype": array.dtype, "name": array.name, "device": array.device}
    if array.start is not None:
        facts |= {"shape": array.of, "start": array.start}
    return _array_metadata(
        array.shape, array.chunk, STORED_AS.get(array.dtype, array.dtype), json.dumps({"holdfast": facts})
    )


def values_metadata(nbytes: int) -> bytes:
    """The ``zarr.json`` of the eager values of a rank: bytes, in one chunk."""
    return _array_metadata((nbytes,), (max(nbytes, 1),), "uint8", json.dumps({"holdfast": {"codec": 1}}))


def group_metadata(facts: Mapping[str, Any] | None = None) -> bytes:
    """The ``zarr.json`` of a group; *facts*, if any, are its attribute ``holdfast``."""
    return _group_metadata(json.dumps({} if facts is None else {"holdfast": facts}))


@lru_cache(maxsize=1 << 15)
def _array_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, attributes: str) -> bytes:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    held: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(held),
        shape=shape,
        chunks=chunk,
        dtype=dtype,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=Crc32cCodec(),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes=json.loads(attributes),
        zarr_format=3,
    )
    return bytes(held["zarr.json"].to_bytes())


@lru_cache(maxsize=64)
def _group_metadata(attributes: str) -> bytes:
    import zarr

    held: dict[str, Any] = {}
    zarr.create_group(zarr.storage.MemoryStore(held), attributes=json.loads(attributes), zarr_format=3)
    return bytes(held["zarr.json"].to_bytes())
