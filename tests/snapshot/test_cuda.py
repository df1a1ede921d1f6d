"""The copies from a CUDA device: what is ordered behind what, without the CPU ever waiting. Skipped without a device."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.snapshot.arena import Slot, place_for
from holdfast.snapshot.capture import Binding, Capture, Copier, bind, copier_for, view_of
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.state import TrainingState
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

cuda: Any = torch.cuda  # partly untyped
_SPIN_CYCLES = 200_000_000  # a tenth of a second and more, on any device of today


class Mixed(nn.Module):
    buffer: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.randn(1500, 400))
        self.transposed = nn.Parameter(torch.randn(400, 1500).t())
        self.small = nn.Parameter(torch.randn(7).bfloat16())
        self.register_buffer("buffer", torch.arange(1000.0))


@pytest.fixture
def model() -> Mixed:
    return Mixed().cuda()


@pytest.fixture
def copier(model: Mixed) -> Iterator[Copier]:
    copier = copier_for(TrainingState({"": model}, {}, {}).survey())
    yield copier
    copier.close()


@pytest.fixture
def slot(copier: Copier) -> Iterator[Slot]:
    folder = Path(f"/dev/shm/cuda-{uuid.uuid4().hex[:10]}")
    folder.mkdir(mode=0o700)
    slot = Slot.create(place_for(folder, 0, 0, image_bytes=24 << 20, table_bytes=4096))
    copier.prepare(slot)
    yield slot
    copier.forget(slot)
    slot.close()
    shutil.rmtree(folder)


def bound(model: nn.Module) -> Binding:
    survey = TrainingState({"": model}, {}, {}).survey()
    return bind(Layout.of(1, [item.slice for item in survey.items]), survey)


def held(binding: Binding, slot: Slot) -> dict[str, torch.Tensor]:
    """What the slot holds, by name."""
    live = {item.slice.name: item.tensor for item in binding.survey.items}
    return {p.slice.name: view_of(slot, live[p.slice.name].cpu(), p.offset).clone() for p in binding.layout.placed}


def expected(model: Mixed) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def taken(binding: Binding, slot: Slot, copier: Copier) -> Capture:
    landed = threading.Event()
    capture = Capture(binding, copier)
    capture.start(slot, lambda seconds: landed.set())
    capture.fence(60.0)
    assert landed.wait(60.0)
    return capture


def test_every_byte_lands_with_and_without_a_graph(model: Mixed, slot: Slot, copier: Copier) -> None:
    binding = bound(model)
    for _ in range(4):  # from the second on, a graph is replayed
        capture = taken(binding, slot, copier)
        assert capture.torn() == []
        assert agree(held(binding, slot), expected(model))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(2).add_(1)


def test_neither_start_nor_fence_waits_for_the_device(model: Mixed, slot: Slot, copier: Copier) -> None:
    """The device is busy with a long step; all our calls return while it still is."""
    binding = bound(model)
    taken(binding, slot, copier)
    torch.cuda.synchronize()
    end, landed = cuda.Event(), threading.Event()
    cuda._sleep(_SPIN_CYCLES)
    end.record()
    capture = Capture(binding, copier)
    capture.start(slot, lambda seconds: landed.set())
    capture.fence(60.0)
    assert capture.torn() == []
    assert not end.query(), "the CPU waited for the end of the step"
    assert landed.wait(60.0)


def test_what_is_written_before_the_step_ends_is_in_the_copy(model: Mixed, slot: Slot, copier: Copier) -> None:
    """The copy is ordered behind the device's work, though it is asked for long before that ends."""
    binding = bound(model)
    cuda._sleep(_SPIN_CYCLES)
    with torch.no_grad():
        model.big.fill_(7)
        model.buffer.fill_(8)
    taken(binding, slot, copier)
    assert agree(held(binding, slot), expected(model))
    assert torch.equal(model.big.cpu(), torch.full((1500, 400), 7.0))


def test_the_optimizer_waits_for_the_copy_on_the_device(model: Mixed, slot: Slot, copier: Copier) -> None:
    """What the fence lets through is ordered behind the copy: the copy has the old bytes."""
    binding, landed = bound(model), threading.Event()
    wanted = expected(model)
    cuda._sleep(_SPIN_CYCLES)
    capture = Capture(binding, copier)
    capture.start(slot, lambda seconds: landed.set())
    capture.fence(60.0)
    assert capture.torn() == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert landed.wait(60.0)
    assert agree(held(binding, slot), wanted)


def test_buffers_may_change_as_soon_as_start_has_returned(model: Mixed, slot: Slot, copier: Copier) -> None:
    binding, landed = bound(model), threading.Event()
    wanted = expected(model)
    cuda._sleep(_SPIN_CYCLES)
    capture = Capture(binding, copier)
    capture.start(slot, lambda seconds: landed.set())
    model.buffer.zero_()
    capture.fence(60.0)
    assert capture.torn() == []
    assert landed.wait(60.0)
    assert agree(held(binding, slot), wanted)


def test_a_touched_parameter_is_named(model: Mixed, slot: Slot, copier: Copier) -> None:
    capture = taken(bound(model), slot, copier)
    with torch.no_grad():
        model.transposed.add_(1)
    assert capture.torn() == ["model.transposed"]
