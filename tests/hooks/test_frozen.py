"""A model of which one percent is trained: what its snapshots cost, and that they are right whatever happens to the rest."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from holdfast import Checkpointer
from holdfast.hooks import checkpointer
from holdfast.tests.hooks.nodes import Node, bits_of_models, until
from torch import nn

WIDTH = 512


class Adapted(nn.Module):
    """A frozen matrix and bias, a buffer that never changes, and a small correction, which is trained."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 1, bias=False), nn.Linear(1, WIDTH, bias=False)
        self.register_buffer("mask", torch.rand(WIDTH, WIDTH) > 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.up(self.down(x))
        return out


class Loop:
    """The model, its optimizer, and a step."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(Adapted(), Adapted(), Adapted(), Adapted())
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2)

    @property
    def first(self) -> Adapted:
        module = self.model[0]
        assert isinstance(module, Adapted)
        return module

    def turn(self) -> None:
        self.model(torch.randn(2, WIDTH)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trained_bytes(self) -> int:
        """What changes in a step."""
        state = [t for values in self.optimizer.state.values() for t in values.values()]
        return sum(t.nbytes for t in (*self.trained, *state))


def train(node: Node, ckpt: Checkpointer, loop: Loop, steps: range) -> list[int]:
    """Train with a snapshot of each step, and see that each is right; how much of each was copied."""
    copied = []
    for step in steps:
        loop.turn()
        ticket = ckpt.snapshot(step)
        if ticket.skipped in ("new-layout", "slot-growing"):
            continue
        ckpt.wait(ticket)
        copied.append(ckpt.stats().copied_bytes)
        check(node, ckpt, step)
    return copied


def check(node: Node, ckpt: Checkpointer, step: int) -> None:
    """The sealed image holds the live tensors, and the checksums that were written are those of all its bytes."""
    live = {item.slice.name: item.tensor for item in ckpt._state.survey().items}
    seen = 0
    for slot in node.slots():
        record = slot.sealed_record()
        if record is not None and record.id.step == step:
            for placed in slot.read_layout(record).placed:
                tensor = live[placed.slice.name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                assert np.array_equal(slot.image[placed.offset : placed.end], tensor), placed.slice.name
            checks, _ = slot.read_tables(record)
            assert np.array_equal(checks, slot.checksums(record.image_bytes, record.block_bytes))
            seen += 1
        slot.close()
    assert seen == 1


def test_what_is_trained_is_what_is_copied(shared: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointer, "_REPORT_EVERY_S", 0.0)
    loop = Loop()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        copied = train(shared, ckpt, loop, range(1, 9))
        values_bytes = ckpt.stats().image_bytes - ckpt._binder._binding.layout.values_offset  # type: ignore[union-attr]
        whole = sum(t.nbytes for t in loop.model.state_dict().values()) + loop.trained_bytes() + values_bytes
        assert copied[:3] == pytest.approx([whole] * 3, rel=0.01)
        assert max(copied[3:]) <= 1.1 * (loop.trained_bytes() + values_bytes)
        until(lambda: shared.status().trainers[0].report.step == 8, "the figures")
        assert shared.status().trainers[0].report.copied_bytes == copied[-1]


def test_what_was_left_alone_comes_back(shared: Node) -> None:
    loop = Loop()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        train(shared, ckpt, loop, range(1, 9))
        held = bits_of_models({"": loop.model})
        loop.turn()
        loop.first.base.weight.data.zero_()
        loop.first.mask.zero_()
        assert ckpt.restore() == 8
        assert bits_of_models({"": loop.model}) == held
        train(shared, ckpt, loop, range(9, 11))
    again = Loop()
    with shared.attach(again.model, again.optimizer) as ckpt, torch.no_grad():
        again.first.base.weight.zero_()
        assert ckpt.restore() == 10
        assert bits_of_models({"": again.model}) == bits_of_models({"": loop.model})


def test_writes_of_all_kinds_are_followed(shared: Node, caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        train(shared, ckpt, loop, range(1, 7))
        with torch.no_grad():
            loop.first.base.weight.mul_(2)
            loop.first.mask.logical_not_()
        counted, *_ = train(shared, ckpt, loop, range(7, 13))
        assert counted > loop.first.base.weight.nbytes + loop.first.mask.nbytes
        with caplog.at_level(logging.WARNING, "holdfast.snapshot.frozen"):
            loop.first.base.weight.data.mul_(2)
            loop.first.mask.data.logical_not_()
            train(shared, ckpt, loop, range(13, 16))
        assert {record.getMessage().split(":")[0] for record in caplog.records} == {
            "model.0.base.weight",
            "model.0.mask",
        }
        loop.first.base.weight.requires_grad_(True)
        loop.optimizer.add_param_group({"params": [loop.first.base.weight]})
        train(shared, ckpt, loop, range(16, 20))


def test_whoever_else_touched_the_slots_is_noticed(node: Node) -> None:
    """Another agent goes on with what the slots say; slots that were freed, or filled by others, are filled as a whole."""
    node.start("--idle-exit", "never")
    loop = Loop()
    with node.attach(loop.model, loop.optimizer) as ckpt:
        *_, few = train(node, ckpt, loop, range(1, 7))
        node.stop()
        until(lambda: ckpt._holding.objection() is None, "another agent")
        assert train(node, ckpt, loop, range(7, 9)) == [few, few]
        for slot in node.slots():
            slot.image[:] = 0
            slot.unseal()
            slot.close()
        assert min(train(node, ckpt, loop, range(9, 11))) > 10 * few
        assert train(node, ckpt, loop, range(11, 13)) == [few, few]
