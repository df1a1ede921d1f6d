"""One rank and its agent: what a training loop may do between two calls of ``step``, and what comes of it."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from holdfast import Checkpointer, Ticket
from holdfast.errors import ConfigError, LayoutMismatch, SnapshotSkipped, StateRefused, StateUnreachable
from holdfast.hooks import sizing
from holdfast.tests.hooks.nodes import Node, bits, bits_of_models, bits_of_optimizers, until
from torch import nn
from torch.optim.swa_utils import AveragedModel


@dataclass
class Loop:
    """A model, its optimizer, and the parts of a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(cls, seed: int = 1, width: int = 8) -> Loop:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.BatchNorm1d(width))
        return cls(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def backward(self) -> None:
        self.model(torch.randn(4, 8)).square().sum().backward()

    def turn(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def bits(self) -> Any:
        return bits_of_models({"": self.model}), bits_of_optimizers({"": self.optimizer}), bits(torch.get_rng_state())


def sealed(ckpt: Checkpointer, step: int) -> None:
    """Take a snapshot of *step* and see it sealed."""
    ticket = ckpt.snapshot(step)
    assert ticket.skipped is None, ticket
    ckpt.wait(ticket)


def trained(ckpt: Checkpointer, loop: Loop, steps: range) -> None:
    """Train, with every snapshot sealed before the next is due, so that none is skipped for lack of a slot."""
    for step in steps:
        loop.turn()
        sealed(ckpt, step)


def restored(node: Node, like: Loop | None = None, **options: Any) -> tuple[int, Loop]:
    """The step that a new life of the job starts from, and its state."""
    loop = like or Loop.make(seed=99)
    with node.attach(loop.model, loop.optimizer, **options) as ckpt:
        return ckpt.restore() or 0, loop


def _watermark(ckpt: Checkpointer) -> int | None:
    return ckpt.watermark


def _in_flight(ckpt: Checkpointer) -> bool:
    """Whether a window is open."""
    return ckpt._flight is not None


# -- the ordinary life -----------------------------------------------------------------------------------------------


def test_ten_lines_in_a_loop(shared: Node) -> None:
    truth = Loop.make()
    for _ in range(9):
        truth.turn()
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        assert ckpt.restore() is None
        assert ckpt.watermark is None
        trained(ckpt, loop, range(1, 6))
        assert ckpt.stats().taken == 5
        assert not ckpt.stats().skipped
        assert _watermark(ckpt) == 4  # what is sealed at step 5 is known at the next beat
    again = Loop.make(seed=2)
    with shared.attach(again.model, again.optimizer) as ckpt:
        assert ckpt.restore() == 5
        assert ckpt.watermark == 5
        assert again.bits() == loop.bits()
        trained(ckpt, again, range(6, 10))
    assert again.bits() == truth.bits()


def test_another_process_goes_on(node: Node) -> None:
    """Nothing of the first life is left but what lies in shared memory."""
    script = textwrap.dedent(
        """
        import sys, torch, holdfast
        torch.manual_seed(0 if sys.argv[3] == "1" else 7)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5))
        optimizer = torch.optim.AdamW(model.parameters())
        ckpt = holdfast.Checkpointer(model, optimizer, job=sys.argv[1], shm=sys.argv[2])
        start = ckpt.restore() or 0
        for step in range(start + 1, start + 4):
            loss = model(torch.ones(2, 8)).square().sum()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            ckpt.wait(ckpt.snapshot(step))
            print(step, loss.item().hex())
        ckpt.close(ended=False)
        """
    )
    lives = [
        subprocess.run(
            [sys.executable, "-c", script, node.job, str(node.shm), life], capture_output=True, text=True, timeout=120
        )
        for life in "12"
    ]
    assert [life.returncode for life in lives] == [0, 0], lives[1].stderr
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    wanted = []
    for step in range(1, 7):
        loss = model(torch.ones(2, 8)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append(f"{step} {loss.item().hex()}")
    assert (lives[0].stdout + lives[1].stdout).splitlines() == wanted


def test_every_and_snapshot(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer, every=3) as ckpt:
        tickets = []
        for step in range(1, 7):
            loop.turn()
            ticket = ckpt.step(step)
            tickets.append(ticket)
            if ticket is not None:
                ckpt.wait(ticket)
        assert [ticket.step if ticket else None for ticket in tickets] == [None, None, 3, None, None, 6]
        loop.turn()
        extra = ckpt.snapshot(7)
        assert isinstance(extra, Ticket)
        assert extra.skipped is None
    assert restored(shared)[0] == 7


def test_going_back_in_the_middle_of_a_run(shared: Node) -> None:
    """restore() undoes what came after the newest snapshot; steps of the abandoned future are not mixed in."""
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        trained(ckpt, loop, range(1, 4))
        at_three = loop.bits()
        for _ in range(2):
            loop.turn()
        assert ckpt.restore() == 3
        assert loop.bits() == at_three
        trained(ckpt, loop, range(4, 6))
    assert restored(shared)[0] == 5


def test_two_runs_that_reach_the_same_step_are_not_mixed(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        trained(ckpt, loop, range(1, 6))
    second = Loop.make(seed=5)
    with shared.attach(second.model, second.optimizer) as ckpt:  # starts afresh, knowingly
        trained(ckpt, second, range(1, 3))
    step, found = restored(shared)
    assert step == 2, "a later run comes after every step of the run before it"
    assert found.bits() == second.bits()


def test_wait_says_what_cannot_be(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        loop.turn()
        ticket = ckpt.snapshot(1)
        for state in ("protected", "persisted"):
            with pytest.raises(StateUnreachable, match=state):
                ckpt.wait(ticket, state)
        ckpt.wait(ticket)
        loop.turn()
        again = ckpt.snapshot(1)
        assert again.skipped == "step-not-newer"
        with pytest.raises(SnapshotSkipped, match="step-not-newer"):
            ckpt.wait(again)


def test_a_layout_that_agents_could_not_tell_each_other_of(
    shared: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused when it is clear at attach; if only the optimizer's state makes it so long, counted, said, and trained on."""
    loop = Loop.make()
    monkeypatch.setattr(sizing, "LAYOUT_BYTES_LIMIT", 500)
    with pytest.raises(StateRefused, match=r"to list them takes \d{3} bytes, and 500 are the limit"):
        shared.attach(loop.model, loop.optimizer)
    monkeypatch.setattr(sizing, "LAYOUT_BYTES_LIMIT", 1000)
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        for step in (1, 2, 3):
            loop.turn()
            assert ckpt.snapshot(step).skipped == "layout-too-large"
        assert ckpt.stats().skipped == {"layout-too-large": 3}
        assert ckpt.stats().taken == 0
    (line,) = (line for line in caplog.messages if "so many tensors" in line)
    assert "1000 are the limit" in line


def test_arguments_are_checked() -> None:
    for wrong in ({"every": 0}, {"slots": 1}, {"job": "a/b"}):
        with pytest.raises(ConfigError):
            Checkpointer(nn.Linear(1, 1), **wrong)


def test_close_twice_and_step_hooks_are_gone(shared: Node) -> None:
    loop = Loop.make()
    ckpt = shared.attach(loop.model, loop.optimizer)
    trained(ckpt, loop, range(1, 2))
    ckpt.close()
    ckpt.close()
    loop.turn()
    assert not loop.optimizer._optimizer_step_pre_hooks


# -- what a loop may do between two steps --------------------------------------------------------------------------------


def test_gradient_accumulation(shared: Node) -> None:
    """Several step() without an optimizer step: each is a snapshot of its own, fenced by the next."""
    loop = Loop.make()
    loop.turn()  # the optimizer has its state
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        for step in range(1, 9):
            loop.backward()
            if step % 4 == 0:
                loop.optimizer.step()
                loop.optimizer.zero_grad()
            sealed(ckpt, step)
        at_eight = loop.bits()
    step, found = restored(shared)
    assert (step, found.bits()) == (8, at_eight)


def test_several_optimizer_steps_per_step(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        for step in range(1, 5):
            for _ in range(3):
                loop.turn()
            sealed(ckpt, step)
        assert not ckpt.stats().skipped
        at_four = loop.bits()
    step, found = restored(shared)
    assert (step, found.bits()) == (4, at_four)


def test_a_step_that_the_scaler_skips(shared: Node) -> None:
    loop = Loop.make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with shared.attach(loop.model, loop.optimizer, {"scaler": scaler}) as ckpt:
        for step in range(1, 6):
            loop.optimizer.zero_grad()
            loss = loop.model(torch.randn(4, 8)).sum() * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(loop.optimizer)
            scaler.update()
            sealed(ckpt, step)
        assert not ckpt.stats().skipped
        wanted, scale = loop.bits(), scaler.get_scale()
    again = torch.amp.GradScaler("cpu")
    step, found = restored(shared, extras={"scaler": again})
    assert (step, found.bits(), again.get_scale()) == (5, wanted, scale)
    assert scale == 2.0


@pytest.mark.parametrize("first", ["g", "d"])
def test_two_optimizers_fenced_by_whichever_steps_first(shared: Node, first: str) -> None:
    def build(seed: int) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer], Callable[[], None]]:
        torch.manual_seed(seed)
        trunk = nn.Linear(8, 8)
        models: dict[str, nn.Module] = {
            "g": nn.Sequential(trunk, nn.Linear(8, 8)), "d": nn.Sequential(trunk, nn.Linear(8, 1)),
        }  # fmt: skip
        optimizers: dict[str, torch.optim.Optimizer] = {
            "g": torch.optim.AdamW(models["g"].parameters()), "d": torch.optim.SGD(models["d"].parameters(), 0.1, 0.9),
        }  # fmt: skip

        def turn() -> None:
            for name in (first, "d" if first == "g" else "g"):
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                models["d"](models["g"](torch.randn(4, 8))).square().mean().backward()
                optimizers[name].step()

        return models, optimizers, turn

    models, optimizers, turn = build(1)
    with shared.attach(models, optimizers) as ckpt:
        for step in range(1, 4):
            turn()
            wanted = bits_of_models(models), bits_of_optimizers(optimizers)
            ticket = ckpt.snapshot(step)
            ckpt.wait(ticket)
        turn()
        wanted = bits_of_models(models), bits_of_optimizers(optimizers)
        ticket = ckpt.snapshot(4)
        assert _in_flight(ckpt)
        models["d"](models["g"](torch.randn(4, 8))).square().mean().backward()
        optimizers[first].step()
        assert not _in_flight(ckpt), "the first step of any optimizer closes the window"
        ckpt.wait(ticket)
        assert not ckpt.stats().skipped
    models, optimizers, turn = build(2)
    with shared.attach(models, optimizers) as ckpt:
        assert ckpt.restore() == 4
        assert (bits_of_models(models), bits_of_optimizers(optimizers)) == wanted


class Foreign:
    """An optimizer that torch knows nothing of."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.moments = model, [torch.zeros_like(p) for p in model.parameters()]

    def step(self) -> None:
        with torch.no_grad():
            for p, moment in zip(self.model.parameters(), self.moments, strict=True):
                assert p.grad is not None
                moment.mul_(0.9).add_(p.grad)
                p.sub_(moment, alpha=0.01)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = state["moments"]


def test_an_optimizer_that_is_not_torchs(shared: Node) -> None:
    model = Loop.make().model
    optimizer = Foreign(model)
    with shared.attach(model, optimizer) as ckpt:
        for step in range(1, 4):
            model.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            ckpt.fence()
            optimizer.step()
            sealed(ckpt, step)
        assert not ckpt.stats().skipped
        wanted = bits_of_models({"": model}), bits(optimizer.moments)
    model = Loop.make(seed=3).model
    optimizer = Foreign(model)
    with shared.attach(model, optimizer) as ckpt:
        assert ckpt.restore() == 3
    assert (bits_of_models({"": model}), bits(optimizer.moments)) == wanted


# -- torn copies ---------------------------------------------------------------------------------------------------------


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)  # type: ignore[index]


def _load(model: nn.Module) -> None:
    model[0].load_state_dict({name: t + 1 for name, t in model[0].state_dict().items()})  # type: ignore[index]


def _swap(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data * 1.5  # type: ignore[index]


MUTATIONS = {"in place": _in_place, "load_state_dict": _load}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_change_inside_the_window(shared: Node, caplog: pytest.LogCaptureFixture, mutation: str) -> None:
    """The snapshot is discarded and the tensor named; after the second time it is copied eagerly, and all is well."""
    loop, mutate = Loop.make(), MUTATIONS[mutation]
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        loop.turn()
        sealed(ckpt, 1)
        for step in (2, 3):
            loop.turn()
            ticket = ckpt.snapshot(step)
            assert ticket.skipped is None
            with caplog.at_level(logging.WARNING, "holdfast"):
                mutate(loop.model)
                loop.turn()
            with pytest.raises(SnapshotSkipped):
                ckpt.wait(ticket)
            assert ckpt.stats().skipped["torn"] == step - 1
        assert "model.0.weight" in caplog.text
        assert "copied eagerly" in caplog.text
        torn = ckpt.stats().skipped["torn"]
        for step in (4, 5):
            loop.turn()
            wanted = loop.bits()
            ticket = ckpt.snapshot(step)
            assert ticket.skipped is None, ticket
            mutate(loop.model)
            ckpt.wait(ticket)
        assert ckpt.stats().skipped["torn"] == torn
    step_back, found = restored(shared)
    assert (step_back, found.bits()) == (5, wanted)


def test_swapped_storage_is_followed(shared: Node) -> None:
    """``p.data = …`` inside the window, of a lazy tensor, of one that became eager, of a buffer: never stale bytes."""
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        for step in range(1, 9):
            loop.turn()
            if step in (3, 4):
                ckpt.snapshot(step)
                _in_place(loop.model)  # after the second time, this weight is copied eagerly
                loop.optimizer.step()
                continue
            wanted = loop.bits()
            ticket = ckpt.snapshot(step)
            _swap(loop.model)
            loop.model[2].running_mean.data = torch.randn(8)  # type: ignore[index]
            try:
                ckpt.wait(ticket)
                kept = step, wanted
            except SnapshotSkipped:  # until the exchange of storage is known as a habit, it costs the snapshot
                assert step < 8
        skipped = dict(ckpt.stats().skipped)
        assert set(skipped) <= {"torn", "new-layout"}
        assert sum(skipped.values()) <= 4
    step_back, found = restored(shared)
    assert (step_back, found.bits()) == kept


def test_a_torn_copy_costs_only_itself(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        trained(ckpt, loop, range(1, 3))
        wanted = loop.bits()
        loop.turn()
        ckpt.snapshot(3)
        _in_place(loop.model)
    step, found = restored(shared)
    assert (step, found.bits()) == (2, wanted)


def test_strict_raises_what_would_be_logged(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer, strict=True) as ckpt:
        trained(ckpt, loop, range(1, 2))
        loop.turn()
        ckpt.snapshot(2)
        _in_place(loop.model)
        with pytest.raises(SnapshotSkipped, match=r"model\.0\.weight"):
            loop.optimizer.step()
        trained(ckpt, loop, range(3, 5))


def test_an_ema_model_updated_inside_the_window(shared: Node) -> None:
    loop = Loop.make()
    ema = AveragedModel(loop.model)
    with shared.attach({"net": loop.model, "ema": ema}, loop.optimizer) as ckpt:
        kept = []
        for step in range(1, 8):
            loop.turn()
            ticket = ckpt.snapshot(step)
            wanted = bits_of_models({"net": loop.model, "ema": ema})
            ema.update_parameters(loop.model)
            try:
                ckpt.wait(ticket)
                kept.append(step)
            except SnapshotSkipped:
                pass
        # torch's first update copies in place, later ones average in place: both are seen.
        assert ckpt.stats().skipped["torn"] == 2
        assert kept == [3, 4, 5, 6, 7]
    again = Loop.make(seed=4)
    other = AveragedModel(again.model)
    with shared.attach({"net": again.model, "ema": other}, again.optimizer) as ckpt:
        assert ckpt.restore() == 7
    assert bits_of_models({"net": again.model, "ema": other}) == wanted


def test_buffers_may_change_at_any_time(shared: Node) -> None:
    """A forward changes batch-norm buffers inside the window: that is no torn copy, and not in the snapshot either."""
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        for step in range(1, 4):
            loop.turn()
            wanted = loop.bits()
            ticket = ckpt.snapshot(step)
            loop.backward()
            ckpt.wait(ticket)
        assert not ckpt.stats().skipped
    step, found = restored(shared)
    assert (step, found.bits()) == (3, wanted)


# -- layouts that change -------------------------------------------------------------------------------------------------


def _until_taken(ckpt: Checkpointer, loop: Loop, step: int, most: int = 8) -> int:
    """Train on until a snapshot is sealed again; the step it has. The watermark holds meanwhile."""
    kept = ckpt.watermark or -1
    for now in range(step, step + most):
        loop.turn()
        ticket = ckpt.snapshot(now)
        assert (ckpt.watermark or -1) >= kept
        if ticket.skipped is None:
            ckpt.wait(ticket)
            return now
        if ticket.skipped == "slot-growing":
            until(lambda: ckpt._holding.objection() is None, "the slot to have grown")
    raise AssertionError(f"no snapshot in {most} steps: {ckpt.stats().skipped}")


def test_state_that_appears_after_the_first_snapshot(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        sealed(ckpt, 0)  # no optimizer state yet
        at = _until_taken(ckpt, loop, 1)
        assert at <= 3
        assert set(ckpt.stats().skipped) <= {"new-layout", "layout-pending"}
        wanted = loop.bits()
    step, found = restored(shared)
    assert (step, found.bits()) == (at, wanted)


def test_layers_unfrozen_on_the_way(shared: Node) -> None:
    def build(seed: int) -> tuple[Loop, nn.Module]:
        torch.manual_seed(seed)
        body, head = nn.Linear(8, 8), nn.Linear(8, 8)
        body.requires_grad_(False)
        return Loop(nn.Sequential(body, head), torch.optim.AdamW(head.parameters())), body

    def unfreeze(loop: Loop, body: nn.Module) -> None:
        body.requires_grad_(True)
        loop.optimizer.add_param_group({"params": list(body.parameters()), "lr": 1e-4})

    loop, body = build(1)
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        trained(ckpt, loop, range(1, 3))
        unfreeze(loop, body)
        at = _until_taken(ckpt, loop, 3)
        trained(ckpt, loop, range(at + 1, at + 3))
        wanted = loop.bits()
    loop, body = build(2)
    unfreeze(loop, body)
    step, found = restored(shared, loop)
    assert (step, found.bits()) == (at + 2, wanted)


def _grown(loop: Loop) -> None:
    """Add what no slot was made for."""
    wide = nn.Linear(8, 40_000)
    loop.model.append(wide)  # type: ignore[operator]
    loop.optimizer.add_param_group({"params": list(wide.parameters())})


def test_a_model_that_outgrows_its_slots(shared: Node) -> None:
    """Snapshots pause until the agent has made larger slots; the newest complete one is kept all the while."""
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        trained(ckpt, loop, range(1, 4))
        _grown(loop)
        at = _until_taken(ckpt, loop, 4)
        assert "slot-growing" in ckpt.stats().skipped or "slots-busy" in ckpt.stats().skipped
        at = _until_taken(ckpt, loop, at + 1)  # the other slot grows too
        trained(ckpt, loop, range(at + 1, at + 4))
        wanted = loop.bits()
    again = Loop.make(seed=2)
    _grown(again)
    step, found = restored(shared, again)
    assert (step, found.bits()) == (at + 3, wanted)


def test_the_snapshot_before_outlives_the_growing(shared: Node) -> None:
    loop = Loop.make()
    ckpt = shared.attach(loop.model, loop.optimizer)
    trained(ckpt, loop, range(1, 4))
    wanted = loop.bits()
    _grown(loop)
    for step in range(4, 7):  # the layout is renewed, a slot is given up to grow
        loop.turn()
        if ckpt.snapshot(step).skipped is None:
            ckpt._flight = None  # as if the process ended here: no fence, no seal
            break
    ckpt.close(ended=False)
    step_back, found = restored(shared)
    assert (step_back, found.bits()) == (3, wanted)


def test_values_that_keep_growing(shared: Node) -> None:
    """A log that grows at every step by more than a page: slots grow ahead of it, or there would never be a snapshot."""
    loop, log = Loop.make(), {"losses": bytearray(600_000)}
    with shared.attach(loop.model, loop.optimizer, {"log": log}) as ckpt:
        taken = 0
        for step in range(1, 61):
            loop.turn()
            log["losses"] += bytes(50_000)
            ticket = ckpt.snapshot(step)
            if ticket.skipped is None:
                ckpt.wait(ticket)
                taken += 1
            else:
                until(lambda: ckpt._holding.objection() is None, "a slot")
        assert taken >= 30, ckpt.stats().skipped


def test_values_that_outgrow_their_slot_in_one_step(shared: Node) -> None:
    """How long their text is shows on the copying thread: that snapshot is given up, and slots grow for the next."""
    loop, log = Loop.make(), {"note": ""}
    with shared.attach(loop.model, loop.optimizer, {"log": log}) as ckpt:
        trained(ckpt, loop, range(1, 4))
        log["note"] = "x" * ckpt._holding.slots[0].place.image_bytes
        loop.turn()
        ticket = ckpt.snapshot(4)
        with pytest.raises(SnapshotSkipped):
            ckpt.wait(ticket)
        assert ckpt.stats().skipped["slot-growing"] == 1
        at = _until_taken(ckpt, loop, 5, most=20)
        wanted = loop.bits()
    back = {"note": ""}
    step, found = restored(shared, extras={"log": back})
    assert (step, found.bits(), back) == (at, wanted, log)


# -- before training starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [lambda: 1, 3, sys.stdout], ids=["lambda", "int", "file"])
def test_extras_are_refused_at_attach(shared: Node, extra: object) -> None:
    with pytest.raises(StateRefused, match=r"extras\.odd"):
        shared.attach(nn.Linear(1, 1), None, {"odd": extra})


def test_deep_values_are_refused_at_attach(shared: Node) -> None:
    with pytest.raises(StateRefused, match=r"\['fine'\]\['here'\]\[1\]"):
        shared.attach(nn.Linear(1, 1), None, {"fine": {"here": [1, object()]}})


def test_a_sparse_parameter_is_refused_at_attach(shared: Node) -> None:
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    with pytest.raises(StateRefused, match=r"model\.table.*sparse"):
        shared.attach(model)


def test_values_that_turn_bad_later_cost_only_snapshots(shared: Node, caplog: pytest.LogCaptureFixture) -> None:
    loop, extra = Loop.make(), dict[str, Any](a=1)
    with shared.attach(loop.model, loop.optimizer, {"bag": extra}) as ckpt:
        trained(ckpt, loop, range(1, 3))
        extra["bad"] = object()
        loop.turn()
        ticket = ckpt.snapshot(3)
        assert ticket.skipped is not None
        assert "['bag']['bad']" in caplog.text
        assert ckpt.stats().skipped["error: StateRefused"] == 1
        del extra["bad"]
        at = _until_taken(ckpt, loop, 4)
        assert at <= 5
    assert restored(shared, extras={"bag": {}})[0] == at


def test_a_mismatch_leaves_snapshot_and_model_alone(shared: Node) -> None:
    loop = Loop.make()
    with shared.attach(loop.model, loop.optimizer) as ckpt:
        trained(ckpt, loop, range(1, 3))
    wrong = Loop(nn.Linear(5, 5), loop.optimizer)
    wrong.optimizer = torch.optim.AdamW(wrong.model.parameters())
    before = bits_of_models({"": wrong.model})
    with pytest.raises(LayoutMismatch, match=r"model\.weight: in the live state, not in the snapshot"):
        restored(shared, wrong)
    assert bits_of_models({"": wrong.model}) == before
    step, found = restored(shared)
    assert (step, found.bits()) == (2, loop.bits())
