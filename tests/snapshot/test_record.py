"""Records: their fields, the repair of damage, the refusal of what is no record; and the commit word that counts."""

from __future__ import annotations

import dataclasses
import random
from uuid import UUID

import pytest
import reedsolo
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt
from holdfast.snapshot.record import (
    FREE_WORD,
    OPEN_WORD,
    RECORD_BYTES,
    WORD_TOLERANCE,
    Record,
    SnapshotId,
    new_nonce,
)

RUN = "0123456789abcdef0123456789abcdef"
RECORD = Record(
    SnapshotId(3, 41, RUN),
    watermark=40,
    rank=2,
    world=8,
    job=2**64 - 1,
    image_bytes=1 << 40,
    table_bytes=8192,
    block_bytes=4 << 20,
    layout_bytes=777,
    checks_crc=0xDEADBEEF,
    layout_crc=0x12345678,
    nonce=new_nonce(random.Random(0)),
)
CODEWORD = RECORD.to_bytes()


def test_round_trip() -> None:
    assert len(CODEWORD) == RECORD_BYTES
    assert Record.from_bytes(CODEWORD) == (RECORD, 0)


def test_the_bytes_lie_where_the_table_says() -> None:
    assert CODEWORD[0:8] == b"HOLDFAST"
    fields = {8: (1, 2), 26: (3, 8), 34: (41, 8), 42: (40, 8), 50: (2, 4), 54: (8, 4), 58: (2**64 - 1, 8),
              66: (1 << 40, 8), 74: (8192, 8), 82: (4 << 20, 4), 86: (777, 4), 90: (0xDEADBEEF, 4),
              94: (0x12345678, 4), 98: (RECORD.nonce, 8), 106: (crc32c(CODEWORD[:106]), 4)}  # fmt: skip
    assert {at: int.from_bytes(CODEWORD[at : at + n], "little") for at, (_, n) in fields.items()} == {
        at: value for at, (value, _) in fields.items()
    }
    assert UUID(bytes=CODEWORD[10:26]).hex == RUN
    assert CODEWORD[110:191] == bytes(81)


def test_the_codeword_is_reedsolos() -> None:
    """No code of our own: whoever has ``reedsolo`` reads a record."""
    codec = reedsolo.RSCodec(64, nsize=255, fcr=0, prim=0x11D, generator=2)
    assert bytes(codec.encode(CODEWORD[:191])) == CODEWORD
    damaged = bytearray(CODEWORD)
    damaged[:32] = bytes(32)
    assert bytes(codec.decode(damaged)[0]) == CODEWORD[:191]


@pytest.mark.parametrize("step", [-1, 0, 2**62])
def test_extreme_steps(step: int) -> None:
    record = dataclasses.replace(RECORD, id=SnapshotId(2**64 - 1, step, RUN), watermark=-1)
    assert Record.from_bytes(record.to_bytes()) == (record, 0)


@pytest.mark.parametrize("first", [0, 8, 26, 78, 100, 223])
def test_thirty_two_bytes_in_a_row_are_repaired(first: int) -> None:
    damaged = bytearray(CODEWORD)
    for at in range(first, first + 32):
        damaged[at] ^= 0xFF
    record, repaired = Record.from_bytes(bytes(damaged))
    assert record == RECORD
    assert repaired == (32 if first < 110 else 0)  # behind its checksum, damage does not matter, and is not looked for


@pytest.mark.parametrize("codeword", [bytes(255), b"\xff" * 255, CODEWORD[1:] + b"\0", CODEWORD[64:], bytes(600)])
def test_what_is_no_record(codeword: bytes) -> None:
    with pytest.raises(Corrupt, match="no readable record"):
        Record.from_bytes(codeword)


def test_a_record_proves_itself_without_its_parity() -> None:
    """Its first 110 bytes do; the rest only repairs them."""
    assert Record.from_bytes(CODEWORD[:110].ljust(255, b"\xaa")) == (RECORD, 0)


@pytest.mark.parametrize("length", [0, 1, 50, 109, 110, 254, 256, 510])
def test_what_has_another_length_is_no_record(length: int) -> None:
    with pytest.raises(Corrupt, match=f"{length} bytes, 255 needed"):
        Record.from_bytes((2 * CODEWORD)[:length])


@pytest.mark.parametrize(("at", "value"), [(8, 2), (9, 1)])
def test_another_version_is_refused_not_misread(at: int, value: int) -> None:
    payload = bytearray(CODEWORD[:191])
    payload[at] = value
    payload[106:110] = crc32c(payload[:106]).to_bytes(4, "little")
    codeword = bytes(reedsolo.RSCodec(64, nsize=255, fcr=0, prim=0x11D, generator=2).encode(payload))
    with pytest.raises(Corrupt, match="this version reads"):
        Record.from_bytes(codeword)


# -- identity and age ------------------------------------------------------------------------------------------------------


def test_a_later_run_comes_after_every_step_of_an_earlier_one() -> None:
    ids = [SnapshotId(2, 1, "aa"), SnapshotId(1, 900, "ff"), SnapshotId(2, 3, "00"), SnapshotId(1, 3, "ff")]
    assert [(id.generation, id.step) for id in sorted(ids)] == [(1, 3), (1, 900), (2, 1), (2, 3)]


def test_runs_of_one_generation_are_distinct() -> None:
    assert SnapshotId(2, 1, "aa") != SnapshotId(2, 1, "ab")
    assert str(SnapshotId(2, 17, RUN)) == "01234567/17"


# -- the commit word -------------------------------------------------------------------------------------------------------


def test_the_nonce_seals_even_with_flipped_bits() -> None:
    rng = random.Random(1)
    for flips in range(65):
        word = RECORD.nonce
        for bit in rng.sample(range(64), flips):
            word ^= 1 << bit
        assert RECORD.sealed_by(word) == (flips <= WORD_TOLERANCE)


def test_nonces_are_far_from_everything_else() -> None:
    """From every number below 2**32 by 16 bits at least, so that 7 flips too many seal nothing."""
    rng = random.Random(2)
    for _ in range(500):
        nonce = new_nonce(rng)
        assert (nonce >> 32).bit_count() == (nonce & 0xFFFFFFFF).bit_count() == 16
        record = dataclasses.replace(RECORD, nonce=nonce)
        for word in (FREE_WORD, OPEN_WORD, nonce & 0xFFFFFFFF):  # the last is the nearest of those numbers
            assert not record.sealed_by(word)
            for bits in (rng.sample(range(64), 7) for _ in range(4)):
                assert not record.sealed_by(word ^ sum(1 << bit for bit in bits))


def test_nonces_differ() -> None:
    rng = random.Random(3)
    nonces = [new_nonce(rng) for _ in range(300)]
    distances = [(a ^ b).bit_count() for i, a in enumerate(nonces) for b in nonces[:i]]
    assert min(distances) > WORD_TOLERANCE
    assert new_nonce() != new_nonce()
