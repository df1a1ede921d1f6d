"""Records under any damage: up to 32 bytes are repaired exactly; beyond that there is the right record or none."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from holdfast.errors import Corrupt
from holdfast.snapshot.record import RECORD_BYTES, Record, SnapshotId, new_nonce
from hypothesis import given, settings
from hypothesis import strategies as st

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
ids = st.builds(SnapshotId, u64, i64, st.uuids().map(lambda uuid: uuid.hex))
records = st.builds(
    Record, ids, watermark=i64, rank=u32, world=u32, job=u64, image_bytes=u64, table_bytes=u64, block_bytes=u32,
    layout_bytes=u32, checks_crc=u32, layout_crc=u32, nonce=u64,
)  # fmt: skip
PROVEN_BYTES = 110  # of the codeword: what its own checksum covers, and that checksum


def damaged(codeword: bytes, seed: int, count: int, *, inside: int = RECORD_BYTES) -> bytes:
    """*count* bytes among the first *inside* changed to something else."""
    rng = random.Random(seed)
    out = bytearray(codeword)
    for at in rng.sample(range(inside), count):
        out[at] ^= rng.randrange(1, 256)
    return bytes(out)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(records, st.integers(0, 32), st.integers(0, 2**32))
def test_up_to_32_bytes_are_repaired_exactly(record: Record, count: int, seed: int) -> None:
    codeword = record.to_bytes()
    spoiled = damaged(codeword, seed, count)
    untouched = spoiled[:PROVEN_BYTES] == codeword[:PROVEN_BYTES]
    assert Record.from_bytes(spoiled) == (record, 0 if untouched else count)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(records, st.integers(33, RECORD_BYTES), st.integers(0, 2**32))
def test_more_never_gives_a_wrong_record(record: Record, count: int, seed: int) -> None:
    codeword = record.to_bytes()
    spoiled = damaged(codeword, seed, count)
    try:
        found, _ = Record.from_bytes(spoiled)
    except Corrupt:
        assert spoiled[:PROVEN_BYTES] != codeword[:PROVEN_BYTES]
    else:
        assert found == record


@settings(derandomize=True, deadline=None, max_examples=40)
@given(records, st.integers(33, PROVEN_BYTES), st.integers(0, 2**32))
def test_more_where_it_matters_is_told(record: Record, count: int, seed: int) -> None:
    with pytest.raises(Corrupt):
        Record.from_bytes(damaged(record.to_bytes(), seed, count, inside=PROVEN_BYTES))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), st.booleans())
def test_any_bytes_are_no_record(noise: bytes, magic: bool) -> None:
    with pytest.raises(Corrupt):
        Record.from_bytes(b"HOLDFAST" + noise[8:] if magic else noise)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(records, st.integers(0, RECORD_BYTES), st.integers(1, 100))
def test_a_write_that_was_cut_off(old: Record, cut: int, steps: int) -> None:
    """The agent dies while it writes the next record over the last: one of the two is read, or none, never a mixture."""
    later = (old.id.step + steps) % 2**62
    new = replace(old, id=replace(old.id, step=later), checks_crc=old.layout_crc, nonce=new_nonce(random.Random(steps)))
    try:
        found, _ = Record.from_bytes(new.to_bytes()[:cut] + old.to_bytes()[cut:])
    except Corrupt:
        return
    assert found in (old, new)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.integers(0, 2**32), st.integers(0, 64))
def test_a_word_counts_within_its_tolerance(seed: int, flips_seed: int, flips: int) -> None:
    nonce = new_nonce(random.Random(seed))
    word = nonce ^ sum(1 << bit for bit in random.Random(flips_seed).sample(range(64), flips))
    sealed = Record(SnapshotId(1, 1, "0" * 32), -1, 0, 1, 0, 0, 0, 1, 0, 0, 0, nonce).sealed_by(word)
    assert sealed == (flips <= 8)
    assert not sealed or word >= 1 << 32
