"""From an image back into live tensors: every byte is verified before it is used, windows and strides notwithstanding."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast.agent.arenas import Arenas
from holdfast.agent.budget import measure
from holdfast.agent.protocol import Flight
from holdfast.agent.settings import NodeSettings
from holdfast.errors import Corrupt
from holdfast.snapshot.assembly import assemble
from holdfast.snapshot.capture import Capture, CpuCopier, bind
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.live import SourceImage, apply
from holdfast.snapshot.record import SnapshotId, new_nonce
from holdfast.snapshot.state import Item, TrainingState
from torch import nn

ID = SnapshotId(1, 1, uuid.uuid4().hex)
NONCE = new_nonce()
VALUES = np.arange(1000, dtype=np.uint8)


class Large(nn.Module):
    """33 MB: three windows of four blocks of 4 MiB."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Parameter(torch.randn(100))
        self.wide = nn.Parameter(torch.randn(1000, 5000))
        self.turned = nn.Parameter(torch.randn(3000, 1000).t())
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.last = nn.Parameter(torch.randn(77, 3, dtype=torch.float64))


@pytest.fixture
def image() -> Iterator[tuple[Path, Large]]:
    """A sealed image of a ``Large``, and that."""
    folder = Path(f"/dev/shm/live-{uuid.uuid4().hex[:10]}")
    folder.mkdir(mode=0o700)
    arenas = Arenas(NodeSettings("live", folder, folder / "s", False), "a", None, measure)
    copier, model = CpuCopier(), Large(1)
    try:
        survey = TrainingState({"": model}, {}, {}).survey()
        layout = Layout.of(1, [item.slice for item in survey.items])
        size = layout.values_offset + VALUES.nbytes
        arenas.reserve(0, 1, image_bytes=size, table_bytes=8192)
        slot = arenas.slot(0, 0)
        slot.unseal_to_fill()
        capture = Capture(bind(layout, survey), copier)
        capture.start(slot, lambda seconds: None)
        capture.fence(60.0)
        slot.image[layout.values_offset : size] = VALUES
        sums = arenas.checksum(0, 0, size)
        arenas.write_record(
            0, Flight(NONCE, ID, watermark=-1, layout=1), sums, rank=0, world=1, layout=layout.to_text()
        )
        slot.commit(NONCE)
        yield Path(slot.place.path), model
    finally:
        copier.close()
        arenas.close()
        shutil.rmtree(folder)


def items_of(model: nn.Module) -> tuple[Item, ...]:
    return TrainingState({"": model}, {}, {}).survey().items


def applied(path: Path, model: nn.Module) -> int:
    source = SourceImage(str(path), 0, ID)
    try:
        items = items_of(model)
        return apply(items, assemble([i.slice for i in items], {0: source.layout}, 0), {0: source})
    finally:
        source.close()


def test_everything_comes_back(image: tuple[Path, Large]) -> None:
    path, truth = image
    model = Large(2)
    nbytes = applied(path, model)
    assert nbytes == sum(p.nbytes for p in truth.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))
    assert model.turned.stride() == truth.turned.stride() == (1, 1000)


def test_values_come_back(image: tuple[Path, Large]) -> None:
    source = SourceImage(str(image[0]), 0, ID)
    assert np.array_equal(source.values(), VALUES)
    source.close()


@pytest.mark.parametrize("name", ["first", "wide", "turned", "last"])
def test_a_damaged_block_is_never_used(image: tuple[Path, Large], name: str) -> None:
    """What does not lie in its window is filled or left as it was, never with bytes that were not verified."""
    path, truth = image
    source = SourceImage(str(path), 0, ID)
    placed = next(p for p in source.layout.placed if p.slice.name == f"model.{name}")
    at = source._slot.place.table_bytes + 8192 + placed.end - 5
    source.close()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    model, before = Large(2), dict(Large(2).named_parameters())
    with pytest.raises(Corrupt, match="crc32c"):
        applied(path, model)
    good = dict(truth.named_parameters())
    for key, found in model.named_parameters():
        known = (found == good[key]) | (found == before[key])
        assert bool(known.all()), key


def test_an_image_that_is_another_now(image: tuple[Path, Large]) -> None:
    path, _ = image
    for id, rank in ((SnapshotId(1, 2, ID.run), 0), (SnapshotId(2, 1, ID.run), 0), (ID, 1)):
        with pytest.raises(Corrupt, match="no longer holds"):
            SourceImage(str(path), rank, id)


def test_an_image_that_was_unsealed(image: tuple[Path, Large]) -> None:
    path, _ = image
    source = SourceImage(str(path), 0, ID)
    source._slot.unseal_to_fill()
    source.close()
    with pytest.raises(Corrupt, match="no longer holds"):
        SourceImage(str(path), 0, ID)


def test_files_that_are_no_slots(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        SourceImage(str(tmp_path / "absent"), 0, ID)
    for content in (b"", b"x" * 100, bytes(20_000)):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(Corrupt):
            SourceImage(str(tmp_path / "odd"), 0, ID)
