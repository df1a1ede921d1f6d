"""Slots in real shared memory: made, sealed in order, adopted, damaged, foreign."""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from holdfast.erasure.kernel import crc32c
from holdfast.errors import BudgetExceeded, Corrupt
from holdfast.snapshot import arena
from holdfast.snapshot.arena import PAGE, Place, Slot, parse_name, place_for, scan
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import FREE_WORD, OPEN_WORD, Record, SnapshotId, new_nonce

BLOCK = 4096
LAYOUT = Layout.of(1, [Slice("w", "uint8", (9000,), (0,), (9000,)), Slice("b", "float32", (), (), ())])
IMAGE_BYTES = LAYOUT.values_offset + 100
ID = SnapshotId(1, 7, "ab" * 16)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="holdfast-test-arena-", dir="/dev/shm"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def place(folder: Path) -> Place:
    return place_for(folder, 3, 1, table_bytes=3000, image_bytes=IMAGE_BYTES)


@pytest.fixture
def slot(place: Place) -> Iterator[Slot]:
    made = Slot.create(place)
    yield made
    made.close()


def record_of(slot: Slot, **changes: Any) -> Record:
    """The record of what lies in the image now, with any layout text but the usual given as *text*."""
    text = changes.pop("text", LAYOUT.to_text())
    checks = slot.checksums(IMAGE_BYTES, BLOCK)
    made = Record(
        ID, watermark=6, rank=3, world=4, job=99, image_bytes=IMAGE_BYTES, table_bytes=slot.place.table_bytes,
        block_bytes=BLOCK, layout_bytes=len(text), checks_crc=crc32c(checks), layout_crc=crc32c(text),
        nonce=new_nonce(random.Random(5)),
    )  # fmt: skip
    return replace(made, **changes)


def seal(slot: Slot, **changes: Any) -> Record:
    """All of a snapshot's way into *slot*, in order; *changes* make its record lie."""
    slot.unseal_to_fill()
    slot.image[:IMAGE_BYTES] = np.random.default_rng(1).integers(0, 256, IMAGE_BYTES, np.uint8)
    record = record_of(slot, **changes)
    slot.write_tables(slot.checksums(IMAGE_BYTES, BLOCK), changes.get("text", LAYOUT.to_text()))
    slot.write_record(record)
    slot.commit(record.nonce)
    return record


def poke(place: Place, offset: int, data: bytes) -> None:
    """Damage, from outside."""
    with open(place.path, "r+b") as file:
        file.seek(offset)
        file.write(data)


# -- places ----------------------------------------------------------------------------------------------------------------


def test_places_are_whole_pages(folder: Path) -> None:
    place = place_for(folder, 3, 1, table_bytes=1, image_bytes=PAGE + 1)
    assert place == Place(str(folder / "rank-00003.slot-1"), 3, 1, PAGE, 2 * PAGE)
    assert place.file_bytes == 5 * PAGE
    assert place.holds(PAGE, 2 * PAGE)
    assert not place.holds(PAGE + 1, 1)
    assert not place.holds(1, 2 * PAGE + 1)


@pytest.mark.parametrize("rank", [0, 7, 99_999, 100_000, 12_345_678])
def test_names_are_read_as_they_are_written(folder: Path, rank: int) -> None:
    place = place_for(folder, rank, 12, table_bytes=1, image_bytes=1)
    assert parse_name(Path(place.path).name) == (rank, 12, False)


def test_cells_have_names_of_their_own(folder: Path) -> None:
    cell = place_for(folder, 3, 1, table_bytes=1, image_bytes=1, parity=True)
    assert Path(cell.path).name == "lane-00003.cell-1"
    assert parse_name(Path(cell.path).name) == (3, 1, True)


@pytest.mark.parametrize("name", ["", "rank-1.slot-0", "rank-00001.slot-", "rank-00001.slot-0.new", "x-rank-00001.slot-0",
                                  "rank-00001.slot-0 ", "rank-00001.slot--1", "rank-00001_slot-0", "agent.sock"])  # fmt: skip
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize("name", ["rank-000001.slot-0", "rank-00001.slot-00", "rank-٠٠٠٠١.slot-0"])
def test_a_slot_has_one_name(name: str) -> None:
    assert parse_name(name) is None


# -- making ----------------------------------------------------------------------------------------------------------------


def test_a_new_slot_holds_nothing(slot: Slot) -> None:
    assert slot.word == FREE_WORD
    assert slot.sealed_record() is None
    assert slot.image.nbytes == slot.place.image_bytes
    assert not slot.image.any()


def test_a_slot_is_this_users_alone_and_has_its_memory(slot: Slot) -> None:
    found = os.stat(slot.place.path)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == slot.place.file_bytes
    assert found.st_blocks * 512 >= slot.place.file_bytes
    assert found.st_ino == slot.inode
    assert os.listdir(Path(slot.place.path).parent) == ["rank-00003.slot-1"]


def test_making_it_again_makes_another(slot: Slot, place: Place) -> None:
    """Who has the old one mapped keeps the old one."""
    seal(slot)
    again = Slot.create(place)
    assert again.inode != slot.inode
    assert again.sealed_record() is None
    assert slot.sealed_record() is not None
    again.close()


def test_a_file_system_that_is_too_small(folder: Path) -> None:
    place = place_for(folder, 0, 0, table_bytes=1, image_bytes=1 << 50)
    with pytest.raises(
        BudgetExceeded, match=rf"cannot reserve {place.file_bytes} bytes of shared memory.*HOLDFAST_SHM"
    ):
        Slot.create(place)
    assert os.listdir(folder) == []


def test_a_half_made_slot_is_made_anew(place: Place) -> None:
    Path(place.path + ".new").write_bytes(b"left by a crash")
    Slot.create(place).close()
    assert not os.path.exists(place.path + ".new")


def test_another_size_is_not_mapped(slot: Slot, place: Place) -> None:
    with pytest.raises(Corrupt, match=r"bytes, .* expected"):
        Slot.open(replace(place, image_bytes=place.image_bytes + PAGE))


def test_links_are_not_followed(slot: Slot, place: Place, folder: Path) -> None:
    link = folder / "rank-00004.slot-0"
    link.symlink_to(place.path)
    with pytest.raises(Corrupt, match="cannot be opened"):
        Slot.open(replace(place, path=str(link)))


def test_two_mappings_are_one_memory(slot: Slot, place: Place) -> None:
    other = Slot.open(place)
    slot.image[5] = 77
    slot.unseal_to_fill()
    assert other.image[5] == 77
    assert other.word == OPEN_WORD
    other.close()
    assert slot.image[5] == 77


def test_prefaulting_changes_nothing(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    before = seal(slot)
    image = slot.image.copy()
    slot.prefault()
    monkeypatch.setattr(arena, "_MADV_POPULATE_WRITE", 12345)  # as on kernels that do not know it
    slot.prefault()
    assert slot.sealed_record() == before
    np.testing.assert_array_equal(slot.image, image)


def test_prefaulting_never_writes(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that takes over prefaults slots that their trainers are filling."""
    monkeypatch.setattr(arena, "_MADV_POPULATE_WRITE", 12345)
    slot._bytes.flags.writeable = False
    slot.prefault()


def test_views_outlive_the_mapping(slot: Slot) -> None:
    view = slot.image[:10]
    slot.close()
    slot.close()
    view[:] = 3
    assert view.sum() == 30


# -- sealing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word_first", [True, False])
def test_nothing_is_sealed_before_the_last_store(slot: Slot, place: Place, word_first: bool) -> None:
    """At each line, another process that looks sees nothing, or (at the end) all. Record and word come in either order."""
    other = Slot.open(place)
    first = seal(slot)
    assert other.sealed_record() == first
    slot.unseal_to_fill()
    assert other.sealed_record() is None
    slot.image.fill(9)
    second = record_of(slot, id=SnapshotId(1, 8, ID.run), nonce=new_nonce(random.Random(6)))
    last: list[Callable[[], object]] = [lambda: slot.write_record(second), lambda: slot.commit(second.nonce)]
    first_of_them, last_of_them = last[::-1] if word_first else last
    for step in (lambda: slot.write_tables(slot.checksums(IMAGE_BYTES, BLOCK), LAYOUT.to_text()), first_of_them):
        step()
        assert other.sealed_record() is None
    last_of_them()
    assert other.sealed_record() == second
    slot.unseal()
    assert other.sealed_record() is None
    other.close()


@pytest.mark.parametrize(
    "lie",
    [
        {"table_bytes": 0}, {"table_bytes": 2 * PAGE}, {"image_bytes": 1 << 40}, {"block_bytes": 0}, {"block_bytes": 1},
        {"layout_bytes": 1 << 20}, {"layout_bytes": PAGE},
    ],
    ids=str,
)  # fmt: skip
def test_lengths_that_do_not_fit_the_slot(slot: Slot, lie: dict[str, int]) -> None:
    """Checked before any of them is used."""
    seal(slot, **lie)
    assert slot.sealed_record() is None


def test_a_word_of_another_record(slot: Slot) -> None:
    seal(slot)
    slot.commit(new_nonce(random.Random(77)))
    assert slot.sealed_record() is None


def test_flipped_bits_in_the_word_change_nothing(slot: Slot) -> None:
    record = seal(slot)
    slot.commit(record.nonce ^ 0b1011)
    assert slot.sealed_record() == record
    for word in (FREE_WORD, OPEN_WORD):
        slot.commit(word ^ 0xF0_0000_0000)
        assert slot.sealed_record() is None


def test_a_damaged_record_is_repaired_where_it_lies(slot: Slot, place: Place) -> None:
    record = seal(slot)
    poke(place, 30, bytes(20))
    assert slot.read_record()[1] > 0
    assert slot.sealed_record() == record
    assert slot.read_record() == (record, 0)


def test_a_record_beyond_repair_counts_as_none(slot: Slot, place: Place) -> None:
    seal(slot)
    poke(place, 0, bytes(80))
    assert slot.sealed_record() is None
    with pytest.raises(Corrupt):
        slot.read_record()


# -- tables ----------------------------------------------------------------------------------------------------------------


def test_tables_come_back_verified(slot: Slot) -> None:
    record = seal(slot)
    checks, text = slot.read_tables(record)
    assert [int(c) for c in checks] == [
        crc32c(slot.image[at : min(at + BLOCK, IMAGE_BYTES)]) for at in range(0, IMAGE_BYTES, BLOCK)
    ]
    assert text == LAYOUT.to_text()
    assert slot.read_layout(record) == LAYOUT


def test_tables_read_are_a_copy(slot: Slot) -> None:
    record = seal(slot)
    checks, _ = slot.read_tables(record)
    before = checks.copy()
    slot.write_tables(np.zeros_like(checks), b"")
    np.testing.assert_array_equal(checks, before)


@pytest.mark.parametrize(("offset", "what"), [(0, "block checksums"), (13, "layout"), (60, "layout")])
def test_one_damaged_byte_in_the_tables_is_told(slot: Slot, place: Place, offset: int, what: str) -> None:
    record = seal(slot)
    at = 2 * PAGE + offset
    poke(place, at, bytes([Path(place.path).read_bytes()[at] ^ 1]))
    with pytest.raises(Corrupt, match=f"{what}.*of ababababab?.*checksum|{what}.*checksum"):
        slot.read_tables(record)


def test_tables_that_do_not_fit(slot: Slot) -> None:
    """Nothing of them is written."""
    record = seal(slot)
    with pytest.raises(BudgetExceeded, match="tables of 4105 bytes, 4096 reserved"):
        slot.write_tables(np.zeros(2, np.uint32), bytes(4097))
    assert slot.read_tables(record)[1] == LAYOUT.to_text()


def test_a_layout_longer_than_its_image(slot: Slot) -> None:
    longer = Layout.of(1, [Slice("w", "uint8", (IMAGE_BYTES + 1,), (0,), (IMAGE_BYTES + 1,))])
    with pytest.raises(Corrupt, match="longer than its image"):
        slot.read_layout(seal(slot, text=longer.to_text()))


def test_a_layout_that_is_none(slot: Slot) -> None:
    with pytest.raises(Corrupt, match="unreadable layout"):
        slot.read_layout(seal(slot, text=b"{}"))


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, IMAGE_BYTES])
def test_checksums_of_any_length(slot: Slot, nbytes: int) -> None:
    seal(slot)
    expected = [crc32c(slot.image[at : min(at + BLOCK, nbytes)]) for at in range(0, nbytes, BLOCK)]
    assert slot.checksums(nbytes, BLOCK).tolist() == expected
    with ThreadPoolExecutor(2) as pool:
        assert slot.checksums(nbytes, BLOCK, pool).tolist() == expected


def test_every_flipped_bit_shows_in_its_block(slot: Slot) -> None:
    seal(slot)
    whole, rng = slot.checksums(IMAGE_BYTES, BLOCK), random.Random(3)
    for at in [0, BLOCK - 1, BLOCK, IMAGE_BYTES - 1, *rng.sample(range(IMAGE_BYTES), 20)]:
        bit = 1 << rng.randrange(8)
        slot.image[at] ^= bit
        assert np.flatnonzero(slot.checksums(IMAGE_BYTES, BLOCK) != whole).tolist() == [at // BLOCK]
        slot.image[at] ^= bit


# -- finding them again ----------------------------------------------------------------------------------------------------


def test_a_sealed_slot_is_found_as_it_was_made(slot: Slot, place: Place, folder: Path) -> None:
    record = seal(slot)
    assert scan(folder) == ([place], [])
    found = Slot.open(scan(folder)[0][0])
    assert found.sealed_record() == record
    assert found.read_layout(record) == LAYOUT
    found.close()


def test_a_slot_without_a_record_is_all_image(slot: Slot, place: Place, folder: Path) -> None:
    assert scan(folder) == ([replace(place, table_bytes=0, image_bytes=place.image_bytes + place.table_bytes)], [])


@pytest.mark.parametrize("lie", [1, PAGE + 1, 1 << 40, 2**64 - PAGE])
def test_a_record_that_lies_about_its_tables(slot: Slot, place: Place, folder: Path, lie: int) -> None:
    seal(slot, table_bytes=lie)
    (found,), foreign = scan(folder)
    assert (found.table_bytes, found.file_bytes, foreign) == (0, place.file_bytes, [])
    again = Slot.open(found)
    assert again.sealed_record() is None
    again.close()


def test_slots_are_found_in_order(folder: Path) -> None:
    wanted = [place_for(folder, rank, index, table_bytes=1, image_bytes=1) for rank in (0, 2) for index in (0, 1)]
    for place in wanted[::-1]:
        Slot.create(place).close()
    assert [(p.rank, p.index) for p in scan(folder)[0]] == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_half_made_slots_are_removed(slot: Slot, folder: Path) -> None:
    (folder / "rank-00000.slot-0.new").write_bytes(bytes(100))
    (folder / "notes.new").write_bytes(b"somebody's")
    assert [p.rank for p in scan(folder)[0]] == [3]
    assert sorted(os.listdir(folder)) == ["notes.new", "rank-00003.slot-1"]


def test_foreign_files_are_named_and_left_alone(slot: Slot, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "rank-00000.slot-0").write_bytes(bytes(2 * PAGE - 1))  # too short to be a slot
    (folder / "rank-00000.slot-1").mkdir()
    (folder / "rank-00000.slot-1.new").mkdir()
    (folder / "rank-00000.slot-2").symlink_to(slot.place.path)
    os.mkfifo(folder / "rank-00000.slot-3")
    (folder / "agent.log").write_text("one of ours")
    before = sorted(os.listdir(folder))
    places, foreign = scan(folder)
    assert [p.path for p in places] == [slot.place.path]
    assert foreign == ["notes.txt", *(f"rank-00000.slot-{s}" for s in ("0", "1", "1.new", "2", "3"))]
    assert sorted(os.listdir(folder)) == before


def test_an_empty_folder(folder: Path) -> None:
    assert scan(folder) == ([], [])
