"""One copy into a slot: what is copied when, what counts as torn, and that the bytes are right whatever the strides."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from holdfast.errors import DeadlinePassed
from holdfast.snapshot.arena import Slot, place_for
from holdfast.snapshot.capture import Binding, Capture, CpuCopier, bind, copier_for, rebound, view_of
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.partition import share
from holdfast.snapshot.state import TrainingState
from torch import nn


@pytest.fixture
def slot() -> Iterator[Slot]:
    folder = Path(f"/dev/shm/capture-{uuid.uuid4().hex[:10]}")
    folder.mkdir(mode=0o700)
    slot = Slot.create(place_for(folder, 0, 0, image_bytes=24 << 20, table_bytes=4096))
    yield slot
    slot.close()
    shutil.rmtree(folder)


@pytest.fixture
def copier() -> Iterator[CpuCopier]:
    copier = CpuCopier()
    yield copier
    copier.close()


class Mixed(nn.Module):
    buffer: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.randn(1500, 400))  # streamed
        self.big_transposed = nn.Parameter(torch.randn(400, 1500).t())
        self.small = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.bf16 = nn.Parameter(torch.randn(7).bfloat16())
        self.scalar = nn.Parameter(torch.randn(()))
        self.register_buffer("buffer", torch.arange(5))


def bound(model: nn.Module, *, eager: tuple[str, ...] = ()) -> Binding:
    survey = TrainingState({"": model}, {}, {}).survey()
    return bind(Layout.of(1, [item.slice for item in survey.items]), survey, eager)


def same(binding: Binding, slot: Slot) -> bool:
    """Whether the slot holds what the live tensors hold now."""
    live = {item.slice.name: item.tensor for item in binding.survey.items}
    return all(
        torch.equal(view_of(slot, live[p.slice.name], p.offset), live[p.slice.name]) for p in binding.layout.placed
    )


def captured(binding: Binding, slot: Slot, copier: CpuCopier) -> Capture:
    done = threading.Event()
    capture = Capture(binding, copier)
    capture.start(slot, lambda seconds: done.set())
    capture.fence(60.0)
    assert done.wait(60.0)
    return capture


def test_every_byte_lands(slot: Slot, copier: CpuCopier) -> None:
    binding = bound(Mixed())
    capture = captured(binding, slot, copier)
    assert same(binding, slot)
    assert capture.torn() == []
    assert not copier.busy


def test_parameters_are_lazy_and_buffers_eager(slot: Slot, copier: CpuCopier) -> None:
    """The buffer may change as soon as start() has returned."""
    model = Mixed()
    binding = bound(model)
    assert "model.buffer" not in binding.names
    assert set(binding.names) == {f"model.{n}" for n in ("big", "big_transposed", "small")}  # the others are tiny
    wanted = model.buffer.clone()
    capture = Capture(binding, copier)
    capture.start(slot, lambda seconds: None)
    model.buffer += 1
    capture.fence(60.0)
    assert capture.torn() == []
    (placed,) = [p for p in binding.layout.placed if p.slice.name == "model.buffer"]
    assert torch.equal(view_of(slot, wanted, placed.offset), wanted)


MUTATIONS: dict[str, Callable[[Mixed], object]] = {
    "in place": lambda model: model.small.detach().add_(1),
    "view": lambda model: model.small.detach()[1:2].zero_(),
    "load_state_dict": lambda model: model.load_state_dict({"small": torch.zeros(3, 5)}, strict=False),
    "optimizer": lambda model: _one_step(model),
}  # fmt: skip


def _one_step(model: Mixed) -> None:
    model.small.grad = torch.ones_like(model.small)
    torch.optim.SGD([model.small], 0.1).step()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_touched_tensor_is_named(slot: Slot, copier: CpuCopier, mutation: str) -> None:
    model = Mixed()
    capture = captured(bound(model), slot, copier)
    with torch.no_grad():
        MUTATIONS[mutation](model)
    assert capture.torn() == ["model.small"]


def test_a_write_through_data_is_named(slot: Slot, copier: CpuCopier) -> None:
    """It counts up no version; that the copied bytes are not those of the start gives it away."""
    model, go_on = Mixed(), threading.Event()
    copier._work.put(lambda: _wait(go_on))  # the copy does not begin before the write
    capture = Capture(bound(model), copier)
    capture.start(slot, lambda seconds: None)
    model.small.data.zero_()
    go_on.set()
    capture.fence(60.0)
    assert capture.torn() == ["model.small"]


def test_of_many_tensors_each_is_sampled_in_its_turn(slot: Slot, copier: CpuCopier) -> None:
    """A habit of writing through ``.data`` is found within a few snapshots, however many tensors there are."""
    model = nn.ParameterList(torch.zeros(100) for _ in range(70))
    binding, go_on = bound(model), threading.Event()
    named: list[list[str]] = []
    for turn in range(7, 12):
        go_on.clear()
        copier._work.put(lambda: _wait(go_on))
        capture = Capture(binding, copier, turn)
        capture.start(slot, lambda seconds: None)
        for parameter in model:
            parameter.data.add_(1)
        go_on.set()
        capture.fence(60.0)
        named.append(capture.torn())
    assert sorted(name for names in named for name in names) == sorted(f"model.{i}" for i in range(70))


def _wait(event: threading.Event) -> None:
    assert event.wait(60.0)


def test_a_swap_of_storage_inside_the_window_is_harmless(slot: Slot, copier: CpuCopier) -> None:
    """What is copied is the storage that the tensor had."""
    model, go_on = Mixed(), threading.Event()
    wanted = model.small.detach().clone()
    copier._work.put(lambda: _wait(go_on))
    capture = Capture(bound(model), copier)
    capture.start(slot, lambda seconds: None)
    model.small.data = torch.zeros(3, 5, dtype=torch.float64)
    go_on.set()
    capture.fence(60.0)
    assert capture.torn() == []
    (placed,) = [p for p in capture.binding.layout.placed if p.slice.name == "model.small"]
    assert torch.equal(view_of(slot, wanted, placed.offset), wanted)


def test_a_pinned_tensor_is_eager_and_never_torn(slot: Slot, copier: CpuCopier) -> None:
    model = Mixed()
    binding = bound(model, eager=("model.small", "model.big"))
    capture = captured(binding, slot, copier)
    assert same(binding, slot)
    with torch.no_grad():
        model.small.add_(1)
        model.big.add_(1)
    assert capture.torn() == []


@pytest.mark.parametrize("name", ["big", "small", "buffer"])
@pytest.mark.parametrize("eager", [(), ("model.big", "model.small")])
def test_new_storage_is_noticed(name: str, eager: tuple[str, ...]) -> None:
    """Whoever swaps ``.data`` leaves the binding with the old storage: copying that would restore stale bytes."""
    model = Mixed()
    binding = bound(model, eager=eager)
    assert not rebound(binding)
    tensor = getattr(model, name)
    tensor.data = tensor.data.clone()
    assert rebound(binding)


def test_other_strides_over_the_same_storage_are_noticed() -> None:
    model = nn.Module()
    model.square = nn.Parameter(torch.randn(4, 4))
    binding = bound(model)
    model.square.data = model.square.data.t()
    assert rebound(binding)


def test_a_share_of_the_rows_is_copied(slot: Slot, copier: CpuCopier) -> None:
    """Of two replicas, each copies its rows, and together all."""
    model = Mixed()
    survey = TrainingState({"": model}, {}, {}).survey()
    shared = [replace(item.slice, members=(0, 1)) for item in survey.items]
    live = {item.slice.name: item.tensor.detach() for item in survey.items}
    rows: dict[str, int] = dict.fromkeys(live, 0)
    for rank in (0, 1):
        binding = bind(Layout.of(1, share(shared, rank)), survey)
        captured(binding, slot, copier)
        for placed in binding.layout.placed:
            piece, tensor = placed.slice, live[placed.slice.name]
            part = tensor if not piece.extent else tensor[piece.start[0] : piece.start[0] + piece.extent[0]]
            assert torch.equal(view_of(slot, part, placed.offset), part)
            rows[piece.name] += piece.rows
    assert rows == {name: tensor.shape[0] if tensor.ndim else 1 for name, tensor in live.items()}


def test_samples_outlive_the_storage_they_were_taken_from() -> None:
    """A weight that another rank copies gets other storage, and the old is unmapped: sampling it must not kill training."""
    code = """
import torch
from torch import nn
from holdfast.snapshot.capture import bind
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.state import TrainingState
model = nn.Module()
model.theirs, model.ours = nn.Parameter(torch.zeros(40_000_000)), nn.Parameter(torch.zeros(4))
survey = TrainingState({"": model}, {}, {}).survey()
layout = Layout.of(1, [item.slice for item in survey.items if item.slice.name == "model.ours"])
binding = bind(layout, survey, (), ["model.ours", "model.theirs"])
model.theirs.data = torch.ones(4)
binding.shared.take(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_fence_has_a_deadline_and_tells_what_failed(slot: Slot) -> None:
    copier = CpuCopier()
    blocked, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        blocked.set()
        assert go_on.wait(60.0)

    copier._work.put(hold)  # the thread is busy with an older copy
    assert blocked.wait(60.0)
    copier.start(bound(Mixed()), slot, lambda: None, lambda seconds: None)
    with pytest.raises(DeadlinePassed, match=r"0\.01 s"):
        copier.fence(0.01)
    assert copier.busy
    go_on.set()
    copier.fence(60.0)
    copier.close()


def test_a_copy_that_fails_is_told_by_the_fence(slot: Slot, copier: CpuCopier) -> None:
    binding = bound(Mixed())
    binding.lazy._views[slot.inode] = [torch.empty(1)] * len(binding.lazy.others)
    done = threading.Event()
    copier.start(binding, slot, lambda: None, lambda seconds: done.set())
    with pytest.raises(RuntimeError):
        copier.fence(60.0)
    assert not done.is_set(), "what did not land must not be announced"


def test_the_copier_fits_the_device() -> None:
    copier = copier_for(TrainingState({"": Mixed()}, {}, {}).survey())
    assert isinstance(copier, CpuCopier)
    copier.close()
