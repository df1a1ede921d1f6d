"""Every way of stepping parameters: trained, captured, trained on, brought back, trained on again, bit for bit the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from holdfast import Checkpointer, Ticket
from holdfast.errors import SnapshotSkipped
from holdfast.tests.hooks.nodes import Node, bits, bits_of_models, bits_of_optimizers
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

Optimizers = Mapping[str, Any]


@dataclass
class Job:
    """A model, what steps it, and one step of training."""

    model: nn.Module
    optimizers: Optimizers
    turn: Callable[[], None]
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    fence: list[Callable[[], None]] = field(
        default_factory=list
    )  # what the loop calls: the optimizer is none of torch's
    rebuilt: Callable[[], None] = lambda: (
        None
    )  # what another life does, before it restores, to have the same parameter groups

    @property
    def models(self) -> Mapping[str, nn.Module]:
        return {"net": self.model, **self.others}

    def bits(self) -> Any:
        return bits_of_models(self.models), bits_of_optimizers(self.optimizers), bits(torch.get_rng_state())


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.2), nn.BatchNorm1d(24), nn.Linear(24, 24))


def backward(model: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0) -> None:
    loss = model(torch.randn(6, 24)).square().mean() * scale
    loss.backward()  # type: ignore[no-untyped-call]


def stepped(model: nn.Module, *optimizers: Any) -> None:
    """One step of each, as in most loops."""
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# -- the jobs ------------------------------------------------------------------------------------------------------------


def plain(make: Callable[[Any], torch.optim.Optimizer]) -> Job:
    model = net()
    optimizer = make(model.parameters())
    return Job(model, {"": optimizer}, lambda: stepped(model, optimizer))


def sparse() -> Job:
    model = nn.Sequential(nn.EmbeddingBag(50, 24, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def turn() -> None:
        model(torch.randint(50, (6, 3))).square().mean().backward()
        optimizer.step()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()

    return Job(model, {"": optimizer}, turn)


def closures() -> Job:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(6, 24)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return Job(model, {"": optimizer}, lambda: optimizer.step(closure))  # type: ignore[no-untyped-call]


def muon_and_adamw() -> Job:
    """Matrices to one, all else to the other."""
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    both = {"muon": torch.optim.Muon(matrices, lr=0.02), "adamw": torch.optim.AdamW(rest)}
    return Job(model, both, lambda: stepped(model, *both.values()))


def scaled(*, overflows: bool) -> Job:
    """A scaler that skips the second step, or none."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    turns = {"count": 0}

    def turn() -> None:
        turns["count"] += 1
        loss = model(torch.randn(6, 24)).square().mean()
        scaler.scale(loss * (float("inf") if overflows and turns["count"] == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Job(model, {"": optimizer}, turn, extras={"scaler": scaler, "turns": turns})


def in_backward(fused: bool) -> Job:
    """An optimizer for each parameter, stepped as soon as its gradient is there."""
    model = net()
    optimizers = {name: torch.optim.AdamW([p], lr=1e-2, fused=fused) for name, p in model.named_parameters()}
    by_parameter = dict(zip(model.parameters(), optimizers.values(), strict=True))

    def step_now(parameter: torch.Tensor) -> None:
        by_parameter[parameter].step()  # type: ignore[index]
        by_parameter[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_now)  # type: ignore[no-untyped-call]
    return Job(model, optimizers, lambda: backward(model))


class Engine:
    """What owns model, optimizer and loop, and writes flat parameters through ``data``: no hooks, no counted writes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.momentum = [torch.zeros_like(p) for p in model.parameters()]

    def step(self) -> None:
        for p, m in zip(self.model.parameters(), self.momentum, strict=True):
            assert p.grad is not None
            m.data.mul_(0.9).add_(p.grad)
            p.data.sub_(0.1 * m.data)
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": [m.clone() for m in self.momentum]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for m, saved in zip(self.momentum, state["momentum"], strict=True):
            m.copy_(saved)


def engine() -> Job:
    model, fence = net(), list[Callable[[], None]]()
    made = Engine(model)

    def turn() -> None:
        backward(model)
        for call in fence:
            call()
        made.step()

    return Job(model, {"engine": made}, turn, fence=fence)


def accumulated() -> Job:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())

    def turn() -> None:
        for _ in range(3):
            backward(model, 1 / 3)
        optimizer.step()
        optimizer.zero_grad()

    return Job(model, {"": optimizer}, turn)


class Checkpointed(nn.Module):
    """Activations are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = net(), net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, x, use_reentrant=False)  # type: ignore[no-any-return]


def checkpointed() -> Job:
    model = Checkpointed()
    optimizer = torch.optim.AdamW(model.parameters())
    return Job(model, {"": optimizer}, lambda: stepped(model, optimizer))


def averaged(*, ema: bool) -> Job:
    """Averaged weights are a model of their own, updated after the step; a scheduler of their learning rate is an extra."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    how = get_ema_multi_avg_fn(0.9) if ema else None  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=how, use_buffers=ema)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)

    def turn() -> None:
        stepped(model, optimizer)
        average.update_parameters(model)
        schedule.step()

    return Job(model, {"": optimizer}, turn, {"average": average}, {"schedule": schedule})


class Adapted(nn.Module):
    """A frozen layer, and a small correction to it, which is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(200, 200).requires_grad_(False)
        self.down, self.up = nn.Linear(200, 2, bias=False), nn.Linear(2, 200, bias=False)
        self.register_buffer("mask", torch.rand(200, 200) > 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.up(self.down(x))
        return out


def adapted(*, all_of_it: bool) -> Job:
    """LoRA: most of the model has no gradients, and no optimizer state. *all_of_it*: the optimizer was given that, too."""
    model = nn.Sequential(nn.Linear(24, 200), Adapted(), nn.Linear(200, 24))
    wanted = [p for p in model.parameters() if all_of_it or p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2)
    return Job(model, {"": optimizer}, lambda: stepped(model, optimizer))


def grown() -> Job:
    """Groups are added on the way: the layers above thaw first."""
    model = net().requires_grad_(False)
    model[3].requires_grad_(True)
    optimizer = torch.optim.AdamW(model[3].parameters())
    turns = {"count": 0}

    def thaw() -> None:
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 1e-4})

    def turn() -> None:
        turns["count"] += 1
        if turns["count"] == 3:
            thaw()
        stepped(model, optimizer)

    return Job(model, {"": optimizer}, turn, extras={"turns": turns}, rebuilt=thaw)


def adversaries() -> Job:
    """Two models that take turns, each frozen while the other learns, stepped by kernels that count no writes."""
    one, two = net(), net()
    both = {
        "one": torch.optim.AdamW(one.parameters(), fused=True),
        "two": torch.optim.AdamW(two.parameters(), fused=True),
    }

    def turn() -> None:
        for learns, waits, optimizer in ((one, two, both["one"]), (two, one, both["two"])):
            learns.requires_grad_(True)
            waits.requires_grad_(False)
            learns(waits(torch.randn(6, 24))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return Job(one, both, turn, {"two": two})


def compiled() -> Job:
    """Model and step are compiled, by a backend that needs no compiler."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    fast = torch.compile(model, backend="eager")
    step = torch.compile(optimizer.step, backend="eager")

    def turn() -> None:
        backward(fast)
        step()
        optimizer.zero_grad()

    return Job(model, {"": optimizer}, turn)


TORCH: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd fused": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adamw foreach": partial(torch.optim.AdamW, foreach=True),
    "adamw one by one": partial(torch.optim.AdamW, foreach=False, amsgrad=True),
    "adamw fused": partial(torch.optim.AdamW, fused=True),
    "adamw, its rate a tensor": partial(torch.optim.AdamW, lr=torch.tensor(1e-3), fused=True),
    "adagrad": torch.optim.Adagrad,
    "adagrad fused": partial(torch.optim.Adagrad, fused=True),
    "nadam": torch.optim.NAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
}
JOBS: Mapping[str, Callable[[], Job]] = {
    **{name: partial(plain, make) for name, make in TORCH.items()},
    "sparse": sparse,
    "closures": closures,
    "muon and adamw": muon_and_adamw,
    "scaled": partial(scaled, overflows=False),
    "scaled, with an overflow": partial(scaled, overflows=True),
    "in backward": partial(in_backward, fused=False),
    "in backward, fused": partial(in_backward, fused=True),
    "an engine of its own": engine,
    "accumulated": accumulated,
    "activation checkpointing": checkpointed,
    "averaged (SWA)": partial(averaged, ema=False),
    "averaged (EMA)": partial(averaged, ema=True),
    "adapted": partial(adapted, all_of_it=False),
    "adapted, all given to the optimizer": partial(adapted, all_of_it=True),
    "groups added later": grown,
    "adversaries": adversaries,
    "compiled": compiled,
}


def is_open(ckpt: Checkpointer) -> bool:
    """Whether a window is."""
    return ckpt._flight is not None


def train(job: Job, ckpt: Checkpointer | None, steps: range) -> None:
    """Train, with a snapshot of every other step, whose window the next step closes; that of the last is open."""
    ticket: Ticket | None = None
    for step in steps:
        job.turn()
        if ckpt is None:
            continue
        assert not is_open(ckpt), "nothing has fenced"
        if ticket is not None and ticket.skipped is None:
            with contextlib.suppress(SnapshotSkipped):  # optimizers that exchange their tensors are found out
                ckpt.wait(ticket)
        ticket = ckpt.step(step)


@pytest.mark.parametrize("make", JOBS.values(), ids=JOBS.keys())
def test_it_goes_on_bit_for_bit(shared: Node, make: Callable[[], Job]) -> None:
    torch.manual_seed(1)
    job = make()
    with shared.attach(job.models, job.optimizers, job.extras, every=2) as ckpt:
        job.fence.append(ckpt.fence)
        train(job, ckpt, range(1, 9))
        held = job.bits()
        assert is_open(ckpt)
        train(job, None, range(9, 12))
        assert not is_open(ckpt)
        assert ckpt.stats().skipped.keys() <= {"new-layout", "layout-pending"}
        wanted = job.bits()
    torch.manual_seed(2)
    again = make()
    again.rebuilt()
    with shared.attach(again.models, again.optimizers, again.extras) as ckpt:
        assert ckpt.restore() == 8
        assert again.bits() == held
    train(again, None, range(9, 12))
    assert again.bits() == wanted


def test_the_beat_begins_with_the_last_of_many_fences(shared: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this rank tells the others is what it knows when backward has ended, not when it has begun."""
    torch.manual_seed(1)
    job = in_backward(fused=False)
    with shared.attach(job.models, job.optimizers, every=2) as ckpt:
        train(job, ckpt, range(1, 5))
        fences, began = 0, []
        fenced, start = ckpt._pulse.fenced, ckpt._pulse.start

        def counted() -> bool:
            nonlocal fences
            fences += 1
            return fenced()

        def noted(standing: Any) -> None:
            began.append(fences)
            start(standing)

        monkeypatch.setattr(ckpt._pulse, "fenced", counted)
        monkeypatch.setattr(ckpt._pulse, "start", noted)
        job.turn()
        assert began == [len(job.optimizers)]
