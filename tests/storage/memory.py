"""A store that is a dictionary, and images of whole jobs to put into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from holdfast.errors import Corrupt, ObjectMissing
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.partition import share
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.store import Buffer, Found, Names, checked
from holdfast.storage.writer import Image

Bytes = npt.NDArray[np.uint8]
ID = SnapshotId(3, 700, "0123456789abcdef" * 2)


@dataclass
class Memory:
    """Objects by key; what has not been settled is kept apart, so that a test can lose it."""

    url: str = "memory://test"
    objects: dict[str, bytes] = field(default_factory=dict)
    unsettled: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        self.puts.append(checked(key))
        held = b"".join(bytes(memoryview(part)) for part in parts)  # type: ignore[arg-type]
        if durable:
            self.unsettled.pop(key, None)
        (self.objects if durable else self.unsettled)[key] = held

    async def settle(self) -> None:
        self.objects.update(self.unsettled)
        self.unsettled.clear()

    async def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.unsettled.pop(key, None)

    async def confirm(self, prefix: str) -> None:
        pass

    async def get(self, key: str) -> bytes:
        try:
            return (self.objects | self.unsettled)[checked(key)]
        except KeyError:
            raise ObjectMissing(f"{self.url} has no {key}") from None

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        data, at = await self.get(key), 0
        if len(data) != sum(part.nbytes for part in parts):
            raise Corrupt(f"{key} in {self.url} has {len(data)} bytes")
        for part in parts:
            part.cast("B")[:] = data[at : at + part.nbytes]
            at += part.nbytes

    async def list(self, prefix: str) -> list[Found]:
        return [Found(key, len(data), 0.0) for key, data in sorted(self.objects.items()) if key.startswith(prefix)]

    async def children(self, prefix: str) -> Names:
        return sorted({key[len(prefix) :].split("/")[0] for key in self.objects if key.startswith(prefix)})

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    async def sweep(self, older_than_s: float) -> int:
        return 0

    async def free_bytes(self) -> int | None:
        return None

    async def close(self) -> None:
        pass

    def below(self, prefix: str) -> dict[str, bytes]:
        """The objects of a folder, by the rest of their keys."""
        return {key[len(prefix) :]: data for key, data in self.objects.items() if key.startswith(prefix)}


def tensor_bytes(name: str, shape: Sequence[int], item: int, owner: int = -1) -> Bytes:
    """``uint8[*shape, item]``: what tensor *name* holds; for one that is private to a rank, as that *owner* has it."""
    seed = np.frombuffer(f"{name}/{owner}".encode(errors="surrogatepass"), np.uint8)
    return np.random.default_rng(seed).integers(0, 256, (*shape, item), np.uint8)


def box(whole: Bytes, piece: Slice) -> Bytes:
    """The bytes of *piece*, row-major, of a tensor's as ``tensor_bytes`` makes them."""
    cut = tuple(slice(s, s + e) for s, e in zip(piece.start, piece.extent, strict=True))
    return np.ascontiguousarray(whole[cut]).reshape(-1)


def image_of(held: Sequence[Slice], rank: int, world: int, values: bytes = b"values", id: SnapshotId = ID) -> Image:
    """The image that *rank* makes of the boxes it holds; gaps are filled with noise, as in a slot."""
    layout = Layout.of(1, share(held, rank))
    out = np.full(layout.values_offset + len(values), 0xA5, np.uint8)
    for placed in layout.placed:
        piece = placed.slice
        owner = rank if piece.chunk is None and not piece.members else -1
        whole = tensor_bytes(piece.name, piece.shape, ITEM_BYTES[piece.dtype], owner)
        out[placed.offset : placed.end] = box(whole, piece)
    out[layout.values_offset :] = np.frombuffer(values, np.uint8)
    return Image(id, rank, world, id.step - 1, "a job", layout, out)


def as_restored(image: Image) -> Bytes:
    """What is to come back: the image, with zeros in the gaps."""
    out = np.zeros_like(image.bytes)
    for placed in image.layout.placed:
        out[placed.offset : placed.end] = image.bytes[placed.offset : placed.end]
    out[image.layout.values_offset :] = image.bytes[image.layout.values_offset :]
    return out
