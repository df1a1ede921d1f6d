"""The commit record of a slot: one small page that says which snapshot its image is, and proves that it is whole.

The record codeword (255 bytes, little-endian) is 191 bytes of payload and 64 bytes of Reed-Solomon parity (``reedsolo``,
the same field and generator as the erasure code), so up to 32 damaged bytes are repaired::

    0    8s   magic "HOLDFAST"
    8    u16  format version
    10   16s  run (UUID)
    26   u64  generation: 1 + that of the run which was restored; orders runs without a clock
    34   i64  step
    42   i64  watermark: newest step of this run known complete on all ranks when staging began, -1 if none
    50   u32  rank          54 u32 world size
    58   u64  job: first 8 bytes of SHA-256 of the job's name
    66   u64  image_bytes   74 u64 table_bytes: capacity of the tables, so that the image starts at 8192 + table_bytes
    82   u32  block_bytes   86 u32 layout_bytes
    90   u32  crc32c of the block checksums     94 u32 crc32c of the layout text
    98   u64  nonce         106 u32 crc32c of bytes 0..106, then zeros up to 191

The record is written by the agent once it has checksummed the image, and by itself proves nothing: the copy may still
turn out torn. Beside it stands the *commit word*, eight bytes elsewhere in the slot, which the trainer sets to the record's
nonce once the torn-copy check has passed, by one aligned store that cannot be seen half done. The two come in either
order, and neither writer waits for the other: a snapshot is sealed when record and word are both there and agree.

The trainer draws the nonce when it begins to fill the slot. It has 16 bits set in each half, and a word within
``WORD_TOLERANCE`` bits of it counts: no plausible flip of bits seals or unseals a slot.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from uuid import UUID

import reedsolo

from ..erasure.kernel import crc32c
from ..errors import Corrupt

RECORD_BYTES: Final = 255
_PAYLOAD_BYTES: Final = 191
_PARITY_BYTES: Final = RECORD_BYTES - _PAYLOAD_BYTES
_MAGIC: Final = b"HOLDFAST"
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<8sH16sQqqIIQQQIIIIQ")
_CRC: Final = struct.Struct("<I")
WORD_TOLERANCE: Final = 8
FREE_WORD: Final = 0
OPEN_WORD: Final = 1  # being filled

assert _FIELDS.size == 106  # the table above


@dataclass(frozen=True, slots=True, order=True)
class SnapshotId:
    """Identity of a snapshot, ordered by age: a later run comes after every step of the runs before it.

    ``generation`` makes runs comparable; ``run`` (a UUID as hex) makes them distinct, since two runs that both went back
    to the same point have the same generation, and must never be mixed.
    """

    generation: int
    step: int
    run: str

    def __str__(self) -> str:
        return f"{self.run[:8]}/{self.step}"


@dataclass(frozen=True, slots=True)
class Record:
    """What the record page says. ``nonce`` is what the commit word must hold for the snapshot to count."""

    id: SnapshotId
    watermark: int
    rank: int
    world: int
    job: int
    image_bytes: int
    table_bytes: int
    block_bytes: int
    layout_bytes: int
    checks_crc: int
    layout_crc: int
    nonce: int

    def to_bytes(self) -> bytes:
        """The 255-byte codeword."""
        fields = _FIELDS.pack(
            _MAGIC, _VERSION, UUID(self.id.run).bytes, self.id.generation, self.id.step, self.watermark, self.rank,
            self.world, self.job, self.image_bytes, self.table_bytes, self.block_bytes, self.layout_bytes,
            self.checks_crc, self.layout_crc, self.nonce,
        )  # fmt: skip
        payload = (fields + _CRC.pack(crc32c(fields))).ljust(_PAYLOAD_BYTES, b"\0")
        return _codeword(payload)

    @classmethod
    def from_bytes(cls, codeword: bytes) -> tuple[Record, int]:
        """Read a codeword; returns the record and how many damaged bytes were repaired.

        Raises ``Corrupt`` if this is not a record of this version, or is damaged beyond repair.
        """
        if len(codeword) != RECORD_BYTES:
            raise Corrupt(f"no readable record: {len(codeword)} bytes, {RECORD_BYTES} needed")
        payload, repaired = codeword[:_PAYLOAD_BYTES], 0
        if not _payload_holds(payload):
            try:
                fixed, _, errata = _codec().decode(bytearray(codeword))
            except (reedsolo.ReedSolomonError, ZeroDivisionError, IndexError) as error:
                raise Corrupt(f"no readable record: {error}") from error
            payload, repaired = bytes(fixed), len(errata)
            if not _payload_holds(payload):
                raise Corrupt("no readable record: its checksum does not hold, even after Reed-Solomon repair")
        magic, version, run, generation, step, *rest = _FIELDS.unpack_from(payload)
        if magic != _MAGIC or version != _VERSION:
            raise Corrupt(f"record of format {magic!r} {version}, this version reads {_MAGIC!r} {_VERSION}")
        return cls(SnapshotId(generation, step, UUID(bytes=run).hex), *rest), repaired

    def sealed_by(self, word: int) -> bool:
        """Whether a commit word of this value seals the snapshot."""
        return (word ^ self.nonce).bit_count() <= WORD_TOLERANCE


BLOCK_SIZES: Final = frozenset(1 << power for power in range(16, 23))
"""Of checksum blocks: 64 KiB to 4 MiB."""


def block_bytes_for(image_bytes: int) -> int:
    """The length of an image's checksum blocks: a power of two, about 128 per image, 64 KiB to 4 MiB.

    Small images have small blocks, because what nodes protect each other with is cut at blocks.
    """
    return 1 << max(16, min(22, (image_bytes // 128).bit_length()))


def table_bytes_for(image_bytes: int, layout_bytes: int) -> int:
    """What a slot needs for the block checksums of any image of up to *image_bytes*, and a layout of *layout_bytes*."""
    return 4 * max(256, -(-image_bytes // (4 << 20))) + layout_bytes


def new_nonce(rng: random.Random | None = None) -> int:
    """A random commit word: 16 bits set in each half, so far from ``FREE_WORD``, ``OPEN_WORD`` and other nonces."""
    draw = rng or random.SystemRandom()
    return sum(1 << bit for half in (0, 32) for bit in draw.sample(range(half, half + 32), 16))


def _payload_holds(payload: bytes) -> bool:
    fields = payload[: _FIELDS.size]
    (crc,) = _CRC.unpack_from(payload, _FIELDS.size)
    return payload.startswith(_MAGIC) and bool(crc32c(fields) == crc)


@lru_cache(maxsize=256)
def _codeword(payload: bytes) -> bytes:
    """*payload* and its parity. Computing it takes a millisecond, and an agent tells every member of its group of a record,
    and every cell of all of theirs."""
    return bytes(_codec().encode(payload))


@lru_cache(maxsize=1)
def _codec() -> reedsolo.RSCodec:
    return reedsolo.RSCodec(_PARITY_BYTES, nsize=RECORD_BYTES, fcr=0, prim=0x11D, generator=2)
