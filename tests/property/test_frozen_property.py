"""Whatever is done to frozen tensors: a sealed image holds their bytes, and its checksums are those of all of it."""

from __future__ import annotations

import contextlib
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast.erasure.kernel import crc32c
from holdfast.snapshot import unchanged
from holdfast.snapshot.arena import Slot, place_for
from holdfast.snapshot.capture import Binding, Capture, CpuCopier, bind, rebound
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.record import Record, SnapshotId, new_nonce
from holdfast.snapshot.state import TrainingState
from holdfast.snapshot.unchanged import Unchanged, runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

BLOCK_BYTES = 64 << 10
SLOTS = 2


class Model(nn.Module):
    """Frozen tensors of several sizes (``long`` is several pieces), one that is trained, a large buffer and a small one."""

    large: torch.Tensor
    small: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.randn(280, 1000), requires_grad=False)
        self.trained = nn.Parameter(torch.randn(30, 300))
        self.short = nn.Parameter(torch.randn(7).bfloat16(), requires_grad=False)
        self.middle = nn.Parameter(torch.randn(50, 400), requires_grad=False)
        self.register_buffer("large", torch.randn(20_000))
        self.register_buffer("small", torch.randn(5))


NAMES = ("long", "short", "middle", "large", "trained")
IN_PLACE, SILENTLY, OTHER_STORAGE, OTHER_TENSOR, OTHER_FLAG = range(5)  # what is done to a tensor
SEALED, TORN, GIVEN_UP, UNRECORDED = range(4)  # what becomes of a snapshot


def mutate(model: Model, name: str, how: int) -> None:
    """Change bytes of a tensor, or whether it is trained."""
    tensor = getattr(model, name)
    with torch.no_grad():
        if how == IN_PLACE:
            tensor.view(-1)[-1] += 1  # so little that no sample shows it
        elif how == SILENTLY:
            tensor.data.add_(1)
        elif how == OTHER_STORAGE:
            tensor.data = torch.randn(tensor.shape).to(tensor.dtype)
        elif how == OTHER_TENSOR and isinstance(tensor, nn.Parameter):
            setattr(model, name, nn.Parameter(tensor + 1, requires_grad=tensor.requires_grad))
        elif how == OTHER_FLAG and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(not tensor.requires_grad)


class World:
    """One rank's slots, and who writes them: a trainer, and an agent that computes no checksum that it need not."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.state = TrainingState({"": self.model}, {}, {})
        self.slots = [
            Slot.create(place_for(folder, 0, i, image_bytes=2 << 20, table_bytes=64 << 10)) for i in range(SLOTS)
        ]
        self.copier = CpuCopier()
        self.doubted: set[str] = set()
        self.bound = self._bind()
        self.kept_bytes = 0
        self.step = 0

    def close(self) -> None:
        self.copier.close()
        for slot in self.slots:
            slot.close()

    def _bind(self) -> Binding:
        survey = self.state.survey()
        slices = sorted((i.slice for i in survey.items), key=lambda s: s.name == "model.trained")
        return bind(Layout.of(1, slices), survey, (), (), self.doubted)

    def snapshot(self, index: int, outcome: int = SEALED, meanwhile: tuple[str, int] | None = None) -> None:
        """Take one, and see that it is right if it counts. *meanwhile*: what is done to a tensor in its window."""
        if not self.state.unchanged(self.bound.survey) or rebound(self.bound):
            self.bound = self._bind()
        slot, layout = self.slots[index], self.bound.layout
        truth = {p.slice.name: _bytes(self.model, p.slice.name) for p in layout.placed}
        nonce, image_bytes, landed = new_nonce(), layout.values_offset + 100, threading.Event()
        slot.unseal_to_fill()
        slot.image[layout.values_offset : image_bytes] = self.step % 251
        capture = Capture(self.bound, self.copier, self.step)
        capture.start(slot, lambda seconds: landed.set())
        self.step += 1
        capture.fence(60.0)
        assert landed.wait(60.0)
        if meanwhile is not None:
            mutate(self.model, *meanwhile)
        if outcome != UNRECORDED:
            self._record(slot, capture.unchanged(), image_bytes, nonce)
        if capture.torn() or outcome == TORN:
            slot.unseal()
            return
        slot.commit(nonce)
        capture.settled()
        for placed in layout.placed:
            found = slot.image[placed.offset : placed.end].tobytes()
            assert found == truth[placed.slice.name], f"{placed.slice.name} of step {self.step}"
        if outcome == SEALED:
            record = slot.sealed_record()
            assert record is not None
            checks, _ = slot.read_tables(record)
            assert np.array_equal(checks, slot.checksums(image_bytes, BLOCK_BYTES))
        if outcome == GIVEN_UP:
            slot.unseal()

    def _record(self, slot: Slot, unchanged: Unchanged, image_bytes: int, nonce: int) -> None:
        """What the agent does."""
        known = slot.known_checks(unchanged, image_bytes, BLOCK_BYTES)
        checks = slot.checksums(image_bytes, BLOCK_BYTES, None, known)
        self.kept_bytes += 0 if known is None else int(known[0].sum()) * BLOCK_BYTES
        slot.write_tables(checks, b"layout")
        id = SnapshotId(1, self.step, "0" * 32)
        slot.write_record(
            Record(id, -1, 0, 1, 7, image_bytes, slot.place.table_bytes, BLOCK_BYTES, 6, crc32c(checks), crc32c(b"layout"), nonce)
        )  # fmt: skip

    def overwrite(self, index: int) -> None:
        """Somebody else puts an image there that differs in a few bytes, as an agent does that restores an older one."""
        slot, nonce = self.slots[index], new_nonce()
        slot.unseal()
        for placed in self.bound.layout.placed:
            slot.image[placed.end - 1] ^= 0xFF
        self._record(slot, Unchanged(0, ()), slot.image.nbytes // 2, nonce)
        slot.commit(nonce)


def _bytes(model: nn.Module, name: str) -> bytes:
    tensor = getattr(model, name.removeprefix("model."))
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@contextlib.contextmanager
def world() -> Iterator[World]:
    folder = Path(f"/dev/shm/frozen-{uuid.uuid4().hex[:10]}")
    folder.mkdir(mode=0o700)
    made = World(folder)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


often = [IN_PLACE, SILENTLY]
mutations = st.tuples(
    st.sampled_from(NAMES), st.sampled_from([*often, *often, OTHER_STORAGE, OTHER_TENSOR, OTHER_FLAG])
)
rounds = st.tuples(
    st.none() | mutations,  # before
    st.integers(0, 5),  # how many snapshots
    st.integers(0, SLOTS - 1),  # in which slot the first
    st.booleans(),  # and the others in turn, or all there
    st.sampled_from([*[SEALED] * 4, TORN, GIVEN_UP, UNRECORDED]),
    st.none() | mutations.filter(lambda change: change[1] != SILENTLY),  # in the window of the last
    st.sampled_from([*[False] * 4, True]),  # then somebody else writes there
)
Round = tuple[tuple[str, int] | None, int, int, bool, int, tuple[str, int] | None, bool]


@given(still=st.sampled_from([0, 5]), played=st.lists(rounds, max_size=5))
@example(still=5, played=[(("long", IN_PLACE), 3, 1, False, SEALED, None, False)])  # one slot is behind the other
@example(still=5, played=[(("long", IN_PLACE), 5, 0, True, UNRECORDED, None, False)])  # the tables are behind the bytes
@settings(max_examples=60)
def test_a_sealed_image_is_the_truth(still: int, played: list[Round]) -> None:
    with world() as made:
        for step in range(still):  # until it is believed that what is frozen stands still
            made.snapshot(step % SLOTS)
        for before, count, first, turns, outcome, meanwhile, overwritten in played:
            if before is not None:
                mutate(made.model, *before)
            for i in range(count):
                made.snapshot((first + i * turns) % SLOTS, outcome, meanwhile if i == count - 1 else None)
            if overwritten:
                made.overwrite(first)
        made.snapshot(0)
        made.snapshot(1)


def test_what_stands_still_is_neither_copied_nor_checksummed() -> None:
    """Otherwise, the property would hold for want of anything that is left alone."""
    with world() as made:
        for step in range(6):
            made.snapshot(step % SLOTS)
        frozen = made.bound.frozen
        assert frozen is not None
        assert made.kept_bytes > 3 * 0.9 * frozen.nbytes.sum()  # of the fourth, fifth and sixth


def _write_a_little(tensor: torch.Tensor) -> None:
    """Silently, and where no sample of the first turns is."""
    tensor.data.view(-1)[-1] += 1


def test_what_is_trained_is_copied_whatever_its_version_says() -> None:
    """Fused optimizers count no writes."""
    with world() as made:
        for step in range(6):
            made.snapshot(step % SLOTS)
        made.model.long.requires_grad_(True)
        for step in range(4):
            _write_a_little(made.model.long)
            made.snapshot(step % SLOTS)


def test_a_silent_write_that_samples_miss_is_found_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with world() as made:
        for step in range(6):
            made.snapshot(step % SLOTS)
        _write_a_little(made.model.long)
        with pytest.raises(AssertionError, match=r"model\.long of step"):
            made.snapshot(0)
        monkeypatch.setattr(unchanged, "ROUND", 4)
        for step in range(4 * SLOTS):
            with contextlib.suppress(AssertionError):
                made.snapshot(step % SLOTS)
        assert made.doubted == {"model.long"}
        made.snapshot(0)
        made.snapshot(1)


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda r: tuple(sorted(r))), max_size=4)


@given(ranges=ranges.map(sorted), image_bytes=st.integers(0, 40), block_bytes=st.integers(1, 9))
def test_blocks_that_are_unchanged_lie_within_the_ranges(
    ranges: list[tuple[int, int]], image_bytes: int, block_bytes: int
) -> None:
    same = Unchanged(1, tuple(ranges)).blocks(image_bytes, block_bytes)
    inside = {byte for start, end in ranges for byte in range(start, end)}
    for block, claimed in enumerate(same):
        members = range(block * block_bytes, min((block + 1) * block_bytes, image_bytes))
        assert bool(claimed) == inside.issuperset(members)
    assert [i for first, last in runs(same) for i in range(first, last)] == np.flatnonzero(same).tolist()
