"""A slot file full of anything: a reader finds a sealed snapshot that is right, or none, and never another exception."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from holdfast.erasure.kernel import crc32c
from holdfast.errors import Corrupt
from holdfast.snapshot.arena import PAGE, Slot, place_for, scan
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import Record, SnapshotId, new_nonce
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYOUT = Layout.of(1, [Slice(f"w{i}", "uint8", (500,), (0,), (500,)) for i in range(4)])
IMAGE_BYTES = LAYOUT.values_offset + 10


@pytest.fixture(scope="module")
def sealed() -> Iterator[tuple[Path, Record, bytes]]:
    """A folder with one sealed slot, its record, and the slot's bytes."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-test-arena-", dir="/dev/shm"))
    slot = Slot.create(place_for(folder, 0, 0, table_bytes=1, image_bytes=IMAGE_BYTES))
    text = LAYOUT.to_text()
    slot.image[:IMAGE_BYTES] = 1
    checks = slot.checksums(IMAGE_BYTES, 1024)
    record = Record(
        SnapshotId(1, 7, "ab" * 16), watermark=6, rank=0, world=1, job=9, image_bytes=IMAGE_BYTES, table_bytes=PAGE,
        block_bytes=1024, layout_bytes=len(text), checks_crc=crc32c(checks), layout_crc=crc32c(text),
        nonce=new_nonce(random.Random(1)),
    )  # fmt: skip
    slot.write_tables(checks, text)
    slot.write_record(record)
    slot.commit(record.nonce)
    slot.close()
    yield folder, record, Path(slot.place.path).read_bytes()
    shutil.rmtree(folder)


def found(folder: Path) -> Record | None:
    """What a restarted agent makes of the folder: the sealed record, read in full, or nothing."""
    (place,), foreign = scan(folder)
    assert foreign == []
    slot = Slot.open(place)
    try:
        record = slot.sealed_record()
        if record is None:
            return None
        checks, _ = slot.read_tables(record)
        layout = slot.read_layout(record)
        assert layout == LAYOUT
        whole = np.array_equal(slot.checksums(record.image_bytes, record.block_bytes), checks)
        assert not whole or (slot.image[:IMAGE_BYTES] == 1).all()
    except Corrupt:
        return None
    finally:
        slot.close()
    return record


@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_anywhere(sealed: tuple[Path, Record, bytes], data: st.DataObject) -> None:
    folder, record, content = sealed
    spoiled = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.sampled_from([0, 0, PAGE, 2 * PAGE, 3 * PAGE]))
        at = start + data.draw(st.integers(0, 300))
        noise = data.draw(st.binary(min_size=1, max_size=40))
        spoiled[at : at + len(noise)] = noise
    (folder / "rank-00000.slot-0").write_bytes(spoiled)
    assert found(folder) in (record, None)


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(2 * PAGE, 5 * PAGE), noise=st.binary(min_size=1, max_size=500), keep=st.booleans())
def test_another_length(sealed: tuple[Path, Record, bytes], length: int, noise: bytes, keep: bool) -> None:
    """Cut off, or longer; of our bytes, or of others'."""
    folder, record, content = sealed
    body = content if keep else noise * (5 * PAGE // len(noise) + 1)
    (folder / "rank-00000.slot-0").write_bytes(body[:length].ljust(length, b"\0"))
    assert found(folder) in (record, None)
