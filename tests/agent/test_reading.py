"""Reading images that agents hold: verified; from the next copy where one is not sound; never what came after."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from holdfast.agent.manifest import Manifest
from holdfast.agent.peers import Peers
from holdfast.agent.reading import Copy, HeldImage, MappedSlot, open_image
from holdfast.agent.settings import job_hash
from holdfast.erasure.kernel import crc32c
from holdfast.errors import AgentUnreachable, Corrupt, HoldfastError, SourceGone
from holdfast.snapshot.arena import Slot, place_for
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import Record, SnapshotId, block_bytes_for, new_nonce
from hypothesis import given, settings
from hypothesis import strategies as st

Bytes = npt.NDArray[np.uint8]
ID = SnapshotId(1, 5, "a" * 32)
BLOCK = 1 << 16
ROWS = 5000
LAYOUT = Layout.of(
    1,
    [
        Slice("w", "float32", (ROWS, 16), (0, 0), (ROWS, 16)),
        Slice("b", "int8", (7,), (0,), (7,)),
        Slice("s", "int64", (), (), ()),
    ],
)
IMAGE = np.random.default_rng(7).integers(0, 256, LAYOUT.values_offset + 33, np.uint8)


def slot(folder: Path, *, index: int = 0, id: SnapshotId = ID, image: Bytes = IMAGE, sealed: bool = True) -> Slot:
    """A slot that holds a snapshot, as its trainer and agent leave it."""
    text, block = LAYOUT.to_text(), block_bytes_for(image.nbytes)
    place = place_for(folder, 3, index, table_bytes=len(text) + 4096, image_bytes=image.nbytes)
    made = Slot.create(place)
    made.image[: image.nbytes] = image
    checks = made.checksums(image.nbytes, block)
    made.write_tables(checks, text)
    nonce = new_nonce()
    sums = (crc32c(checks), crc32c(text))
    record = Record(
        id, -1, 3, 4, job_hash("job"), image.nbytes, place.table_bytes, block, len(text), *sums, nonce
    )  # fmt: skip
    made.write_record(record)
    if sealed:
        made.commit(nonce)
    return made


def copy_of(made: Slot, **other: object) -> Copy:
    record, _ = made.read_record()
    fields = {
        "agent": "n0",
        "address": "",
        "path": made.place.path,
        "rank": 3,
        "checks_crc": record.checks_crc,
        "local": True,
    }
    return Copy(**(fields | other))  # type: ignore[arg-type]


def opened(*copies: Copy, id: SnapshotId = ID, notes: list[str] | None = None) -> HeldImage:
    async def go() -> HeldImage:
        return await open_image(id, copies, Peers("job", "me", None), None, (notes if notes is not None else []).append)

    return asyncio.run(go())


def values(image: HeldImage) -> bytes:
    return asyncio.run(image.read_values())


def rows(image: HeldImage, index: int, first: int = 0, count: int | None = None) -> bytes:
    piece = LAYOUT.placed[index].slice
    wanted = piece.rows - first if count is None else count
    out = np.empty(wanted * (piece.nbytes // piece.rows), np.uint8)
    asyncio.run(image.read_slice(index, out, first, count))
    return out.tobytes()


def expected(index: int, first: int, count: int) -> bytes:
    placed = LAYOUT.placed[index]
    width = placed.slice.nbytes // placed.slice.rows
    return IMAGE[placed.offset + first * width :][: count * width].tobytes()


def test_a_mapped_slot_is_read_and_never_written(tmp_path: Path) -> None:
    made = slot(tmp_path)
    before = Path(made.place.path).read_bytes()
    os.chmod(made.place.path, 0o400)
    image = opened(copy_of(made))
    assert image.layout == LAYOUT
    assert rows(image, 0) == expected(0, 0, ROWS)
    assert rows(image, 1, 2, 3) == expected(1, 2, 3)
    assert rows(image, 2) == expected(2, 0, 1)
    assert values(image) == IMAGE[LAYOUT.values_offset :].tobytes()
    image.close()
    image.close()
    assert Path(made.place.path).read_bytes() == before


def test_what_is_no_such_slot_is_not_opened(tmp_path: Path) -> None:
    made = slot(tmp_path)
    right = copy_of(made)
    link = tmp_path / "rank-00003.slot-1"
    link.symlink_to(made.place.path)
    stranger = tmp_path / "passwd"
    stranger.write_bytes(Path(made.place.path).read_bytes())
    short = tmp_path / "rank-00003.slot-7"
    short.write_bytes(Path(made.place.path).read_bytes()[:9000])
    for copy in (
        copy_of(made, path=str(stranger)), copy_of(made, path=str(link)), copy_of(made, path=str(short)),
        copy_of(made, path=str(tmp_path / "rank-00003.slot-9")), copy_of(made, rank=2), copy_of(made, checks_crc=1),
        copy_of(slot(tmp_path, index=2, sealed=False)),
    ):  # fmt: skip
        with pytest.raises(HoldfastError):
            opened(copy)
    with pytest.raises(SourceGone):
        opened(right, id=SnapshotId(1, 6, ID.run))
    assert opened(right).record.id == ID


def test_a_slot_that_is_filled_anew_is_gone(tmp_path: Path) -> None:
    """Even if the new bytes happen to be the old ones: they may change at any moment."""
    made = slot(tmp_path)
    image = opened(copy_of(made))
    assert rows(image, 1) == expected(1, 0, 7)
    made.unseal_to_fill()
    with pytest.raises(SourceGone, match="no longer holds"):
        rows(image, 0)
    other = slot(tmp_path, id=SnapshotId(1, 6, ID.run))  # a new file of that name: what is mapped is the old one
    with pytest.raises(SourceGone):
        MappedSlot(copy_of(other, checks_crc=copy_of(other).checks_crc), ID)


def test_a_damaged_block_is_taken_from_the_next_copy(tmp_path: Path) -> None:
    copies = []
    for name, at in (("a", 5), ("b", 3 * BLOCK), ("c", 5)):
        (tmp_path / name).mkdir()
        made = slot(tmp_path / name)
        made.image[at] ^= 1
        copies.append(copy_of(made, agent=name))
    notes: list[str] = []
    image = opened(*copies[:2], notes=notes)
    image._ahead_bytes = BLOCK
    assert rows(image, 0, 0, 10) == expected(0, 0, 10)
    assert rows(image, 0, 3 * 1024, 10) == expected(0, 3 * 1024, 10)
    assert image.damaged == [(f"agent a, {copies[0].path}", 0)]
    assert len(notes) == 1
    with pytest.raises(Corrupt, match="1 blocks of aaaaaaaa/5 of rank 3 do not match their checksum: 0"):
        rows(opened(copies[0], copies[2]), 0, 0, 1)


class Fake:
    """A copy that does as it is told."""

    def __init__(self, manifest: Manifest, error: HoldfastError | None = None) -> None:
        self.manifest, self.error = manifest, error
        self.asked: list[tuple[int, int]] = []

    async def read(self, out: Bytes, start: int) -> None:
        self.asked.append((start, out.nbytes))
        if self.error is not None:
            raise self.error
        out[:] = IMAGE[start : start + out.nbytes]

    def close(self) -> None:
        pass


def manifest(folder: Path) -> Manifest:
    made = slot(folder)
    record, _ = made.read_record()
    checks, text = made.read_tables(record)
    return Manifest.of(record.to_bytes(), checks.tobytes(), text)


def test_a_copy_that_cannot_be_reached_is_gone_around(tmp_path: Path) -> None:
    said = manifest(tmp_path)
    away, there = Fake(said, AgentUnreachable("away")), Fake(said)
    notes: list[str] = []
    image = HeldImage([away, there], ["agent a", "b"], notes.append)
    assert rows(image, 1) == expected(1, 0, 7)
    assert notes == ["agent a: away"]
    with pytest.raises(AgentUnreachable):
        rows(HeldImage([away], ["a"]), 1)


def test_small_reads_are_served_from_what_was_read_ahead(tmp_path: Path) -> None:
    fake = Fake(manifest(tmp_path))
    image = HeldImage([fake], ["a"])
    for row in range(0, ROWS, 97):
        assert rows(image, 0, row, 1) == expected(0, row, 1)
    assert fake.asked == [(0, IMAGE.nbytes)]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(data=st.data())
def test_any_read_gives_these_bytes_and_keeps_little(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    fake = Fake(_manifest(tmp_path_factory))
    ahead = data.draw(st.sampled_from([0, BLOCK, 3 * BLOCK, 1 << 24]))
    image = HeldImage([fake], ["a"], ahead_bytes=ahead)
    for _ in range(4):
        start = data.draw(st.integers(0, IMAGE.nbytes))
        count = data.draw(st.integers(0, IMAGE.nbytes - start))
        out = np.full(count, 0x5A, np.uint8)
        asyncio.run(image.read(start, out))
        assert np.array_equal(out, IMAGE[start : start + count])
        assert image._window.nbytes <= max(ahead, BLOCK)
    assert all(start % BLOCK == 0 for start, _ in fake.asked)
    with pytest.raises(ValueError, match="of an image of"):
        asyncio.run(image.read(IMAGE.nbytes, np.empty(1, np.uint8)))


_MADE: list[Manifest] = []


def _manifest(factory: pytest.TempPathFactory) -> Manifest:
    if not _MADE:
        _MADE.append(manifest(factory.mktemp("slot")))
    return _MADE[0]
