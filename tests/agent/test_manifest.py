"""Manifests and the tables of parity cells: what fits together is read back, anything else is ``Corrupt``, nothing else."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from holdfast.agent.guard import Offer
from holdfast.agent.manifest import CellTable, Manifest
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt
from holdfast.snapshot.record import Record, SnapshotId
from hypothesis import given
from hypothesis import strategies as st

ID = SnapshotId(3, 17, "0" * 31 + "7")


def manifest(
    rank: int = 2, image_bytes: int = 150_000, block_bytes: int = 65536, layout: bytes = b"layout"
) -> Manifest:
    """One of an image that exists nowhere."""
    checks = np.arange(-(-image_bytes // block_bytes), dtype=np.uint32) + rank
    return Manifest(
        Record(
            id=ID, watermark=16, rank=rank, world=8, job=99, image_bytes=image_bytes, table_bytes=4096,
            block_bytes=block_bytes, layout_bytes=len(layout), checks_crc=crc32c(checks), layout_crc=crc32c(layout),
            nonce=1234567,
        ),
        checks,
        layout,
    )  # fmt: skip


def same(a: Manifest | None, b: Manifest | None) -> bool:
    if a is None or b is None:
        return a is b
    return (a.record, a.layout, a.checks.tolist()) == (b.record, b.layout, b.checks.tolist())


@pytest.mark.parametrize("image_bytes", [0, 1, 65536, 150_000])
def test_what_fits_together_is_read_back(image_bytes: int) -> None:
    told = manifest(image_bytes=image_bytes)
    found = Manifest.of(told.record.to_bytes(), told.checks.tobytes(), told.layout)
    assert same(found, told)
    assert found.offer(4, 1) == Offer(4, 1, 2, ID, 1234567, image_bytes, 65536, told.record.checks_crc)


def test_parts_that_do_not_fit_are_refused() -> None:
    told = manifest()
    record, checks, layout = told.record.to_bytes(), told.checks.tobytes(), told.layout
    others = [
        (bytes(255), checks, layout),
        (record[:-1], checks, layout),
        (record, checks[:-1], layout),
        (record, checks[:-4], layout),
        (record, checks + bytes(4), layout),
        (record, checks[4:] + checks[:4], layout),
        (record, checks, layout + b" "),
        (record, checks, b""),
        (replace(told.record, block_bytes=0).to_bytes(), b"", layout),
        (replace(told.record, block_bytes=131072).to_bytes(), checks, layout),
    ]
    for parts in others:
        with pytest.raises(Corrupt):
            Manifest.of(*parts)


def test_a_damaged_record_is_repaired_on_the_way() -> None:
    told = manifest()
    record = bytearray(told.record.to_bytes())
    record[40] ^= 0xFF
    assert same(Manifest.of(bytes(record), told.checks.tobytes(), told.layout), told)


# -- tables of cells -----------------------------------------------------------------------------------------------------

TABLE = CellTable((manifest(0), None, manifest(5, 500_000, 131072, b"another layout"), manifest(7, 0)), 3, 2, 2**64 - 1)


def test_a_table_is_read_back() -> None:
    found = CellTable.from_text(TABLE.to_text())
    assert (found.me, found.tolerance, found.key) == (3, 2, 2**64 - 1)
    assert all(map(same, found.manifests, TABLE.manifests))
    assert found.lengths == [150_000, 0, 500_000, 0]
    assert found.ranks == [0, -1, 5, 7]
    assert found.unit == 131072
    assert found.to_text() == TABLE.to_text()


@given(at=st.integers(0, len(TABLE.to_text()) - 1), bit=st.integers(0, 7), end=st.integers(0, len(TABLE.to_text())))
def test_damage_is_corrupt_and_manifests_are_never_other_ones(at: int, bit: int, end: int) -> None:
    """A flip of a number in the head is for the checksum of the whole text to find; whose images they are is not."""
    text = bytearray(TABLE.to_text())
    text[at] ^= 1 << bit
    for damaged in (bytes(text), TABLE.to_text()[:end]):
        with contextlib.suppress(Corrupt):
            found = CellTable.from_text(damaged)
            assert all(one is None or any(same(one, other) for other in TABLE.manifests) for one in found.manifests)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["tolerance", "me", "key", "members", "record", "checks", "layout"]), inner),
                    max_leaves=12), st.binary(max_size=20))  # fmt: skip
def test_nonsense_is_corrupt(head: object, rest: bytes) -> None:
    for text in (json.dumps(head).encode() + b"\n" + rest, rest):
        with contextlib.suppress(Corrupt):
            assert CellTable.from_text(text).manifests == ()


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"members": [{"record": "", "checks": Infinity, "layout": 0}]}', b'{"members": 1e999}']
)
def test_hostile_heads_are_corrupt(text: bytes) -> None:
    with pytest.raises(Corrupt):
        CellTable.from_text(text)


def test_random_bytes_are_corrupt() -> None:
    rng = random.Random(5)
    for length in range(0, 600, 7):
        with pytest.raises(Corrupt):
            CellTable.from_text(rng.randbytes(length))
