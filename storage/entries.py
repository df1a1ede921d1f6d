"""The entry of one rank's image in a tier: its commit, and its manifest.

Whoever spills an image writes the entry last, when all else is durable. It says what the image is, how it was laid out,
and which object holds which rows, each with its checksum; so an image is read back from its entry alone. Its document is
specified in docs/tiers.md.

An entry is believed only as far as it can be checked: its keys stay below its snapshot's folder, and its chunks hold each row
of each slice exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import Corrupt
from ..snapshot.layout import Layout, Slice
from ..snapshot.record import SnapshotId
from .chunks import CRC_BYTES, Chunk, payload_bytes
from .documents import seal, unseal
from .store import is_key

FORMAT: Final = 1
_STEP_LIMIT: Final = 1 << 63
_BYTES_LIMIT: Final = 1 << 46  # more than any node holds


@dataclass(frozen=True, slots=True)
class Stored:
    """A chunk as it was written: *crc* is the crc32c of its payload, padding included."""

    chunk: Chunk
    crc: int


@dataclass(frozen=True, slots=True)
class StoredValues:
    """The eager values as they were written, in one object: *nbytes* of payload; no object where that is zero."""

    key: str
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What a tier says of one rank's image. All keys are relative to the snapshot's folder."""

    id: SnapshotId
    job: str
    rank: int
    world: int
    watermark: int
    image_bytes: int
    layout: Layout
    values: StoredValues
    chunks: tuple[Stored, ...]

    @property
    def stored_bytes(self) -> int:
        """What the objects of this entry take in the tier, checksums and padding included."""
        slices = self.layout.placed
        payload = sum(payload_bytes(slices[s.chunk.index].slice, s.chunk) + CRC_BYTES for s in self.chunks)
        return payload + (self.values.nbytes + CRC_BYTES if self.values.nbytes else 0)

    def to_bytes(self) -> bytes:
        """The entry object: a sealed document (``documents``)."""
        return seal(
            {
                "format": FORMAT,
                "job": self.job,
                "run": self.id.run,
                "generation": self.id.generation,
                "step": self.id.step,
                "rank": self.rank,
                "world": self.world,
                "watermark": self.watermark,
                "image_bytes": self.image_bytes,
                "layout": self.layout.to_text().decode("utf-8", "surrogatepass"),
                "values": {"key": self.values.key, "nbytes": self.values.nbytes, "crc": self.values.crc},
                "chunks": [
                    [s.chunk.index, s.chunk.key, s.chunk.first_row, s.chunk.rows, list(s.chunk.shape), s.crc]
                    for s in self.chunks
                ],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> Entry:
        """Inverse of ``to_bytes``; *what* names the object in messages.

        Raises:
            Corrupt: damaged, of another format, or something that no writer writes.
        """
        document = unseal(data, what)
        try:
            if document["format"] != FORMAT:
                raise Corrupt(f"{what}: an entry of format {document['format']!r}, this version reads {FORMAT}")
            entry = cls._read(document)
        except Corrupt:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"{what}: unreadable entry: {type(error).__name__}: {error}") from error
        entry._check(what)
        return entry

    @classmethod
    def _read(cls, document: dict[str, Any]) -> Entry:
        values = document["values"]
        return cls(
            SnapshotId(_natural(document["generation"]), _natural(document["step"]), _run(document["run"])),
            _text(document["job"]),
            _natural(document["rank"]),
            _natural(document["world"]),
            _natural(document["watermark"], least=-1),
            _natural(document["image_bytes"]),
            Layout.from_text(_text(document["layout"]).encode("utf-8", "surrogatepass")),
            StoredValues(_key(values["key"]), _natural(values["nbytes"]), _crc(values["crc"])),
            tuple(map(_stored, document["chunks"])),
        )

    def _check(self, what: str) -> None:
        if self.image_bytes > _BYTES_LIMIT:
            raise Corrupt(f"{what}: an image of {self.image_bytes} bytes")
        if self.rank >= self.world:
            raise Corrupt(f"{what}: rank {self.rank} of a world of {self.world}")
        if self.image_bytes != self.layout.values_offset + self.values.nbytes:
            raise Corrupt(
                f"{what}: an image of {self.image_bytes} bytes, whose layout and values make "
                f"{self.layout.values_offset + self.values.nbytes}"
            )
        slices = [placed.slice for placed in self.layout.placed]
        rows: dict[int, list[tuple[int, int]]] = {}
        for stored in self.chunks:
            if stored.chunk.index >= len(slices) or not _fits(stored.chunk, slices[stored.chunk.index]):
                raise Corrupt(f"{what}: chunk {stored.chunk.key} does not fit its slice")
            rows.setdefault(stored.chunk.index, []).append((stored.chunk.first_row, stored.chunk.rows))
        for index, piece in enumerate(slices):
            if not _covers(rows.get(index, []), piece.rows if piece.nbytes else 0):
                raise Corrupt(f"{what}: the chunks of {piece.name} do not hold each of its rows once")


def _fits(chunk: Chunk, piece: Slice) -> bool:
    """Whether rows of *piece* lie in the leading corner of a chunk of that shape, and no lie is told of its size."""
    if len(chunk.shape) != len(piece.extent) or chunk.rows < 1:
        return False
    inside = all(have >= need for have, need in zip(chunk.shape[1:], piece.extent[1:], strict=True))
    # A chunk reaches no farther than its tensor does. The layout may lie, too. Less cannot be asked: where the grid is coarse,
    # most of the last chunk is padding.
    modest = all(have <= max(n, 1) for have, n in zip(chunk.shape, piece.shape, strict=True))
    modest = modest and payload_bytes(piece, chunk) <= _BYTES_LIMIT
    return inside and modest and (not chunk.shape or chunk.shape[0] >= chunk.rows)


def _covers(parts: list[tuple[int, int]], rows: int) -> bool:
    """Whether *parts* (first row, rows) are 0 … *rows* without gap or overlap."""
    end = 0
    for first, count in sorted(parts):
        if first != end:
            return False
        end += count
    return end == rows


def _stored(row: Sequence[Any]) -> Stored:
    index, key, first_row, rows, shape, crc = row
    sizes = tuple(_natural(size, least=1) for size in shape)
    return Stored(Chunk(_natural(index), _key(key), _natural(first_row), _natural(rows), sizes), _crc(crc))


def _natural(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < _STEP_LIMIT:
        raise ValueError(f"{str(value)[:40]!r} where a number belongs")
    return value


def _crc(value: Any) -> int:
    if _natural(value) >> 32:
        raise ValueError(f"{value} is no crc32c")
    return int(value)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{str(value)[:40]!r} where text belongs")
    return value


def _run(value: Any) -> str:
    if len(_text(value)) != 32 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{value[:40]!r} is no run")
    return str(value)


def _key(value: Any) -> str:
    """A key below the snapshot's folder, and nowhere else."""
    if not is_key(_text(value)):
        raise ValueError(f"{value[:80]!r} is no key")
    return str(value)
