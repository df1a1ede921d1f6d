"""The whole training state goes into an image and comes back, bit for bit, and training goes on bit for bit.

No agent runs here: slots, records, capture and restore are the real ones, and an ``Arenas`` stands in for the agent's
process. What a run needs in addition (fences, beats, layouts that change) is in ``tests/hooks``.
"""

from __future__ import annotations

import math
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from holdfast.agent.arenas import Arenas
from holdfast.agent.budget import measure
from holdfast.agent.protocol import Flight
from holdfast.agent.settings import NodeSettings
from holdfast.errors import LayoutMismatch, StateRefused
from holdfast.hooks.found import Found
from holdfast.hooks.ranks import Alone
from holdfast.hooks.restore import Restorer
from holdfast.snapshot.capture import Capture, CpuCopier, bind
from holdfast.snapshot.codec import encode
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.meshes import mesh_chunk, plain_chunk
from holdfast.snapshot.partition import share
from holdfast.snapshot.record import SnapshotId, new_nonce
from holdfast.snapshot.selection import Selection
from holdfast.snapshot.state import TrainingState, to_leaf
from holdfast.tests.hooks.nodes import bits, bits_of_models, bits_of_optimizers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

RUN = uuid.uuid4().hex
NONCE = new_nonce(random.Random(7))


class Darkroom:
    """Takes a snapshot of a state and puts it back: all of the real path but the sockets."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.arenas = Arenas(NodeSettings("dark", folder, folder / "agent.sock", False), "here", None, measure)
        self._copier = CpuCopier()

    def take(self, state: TrainingState, step: int = 1) -> None:
        survey = state.survey()
        layout = Layout.of(1, share([item.slice for item in survey.items], 0))
        encoded, text = encode(state.values(survey), "state", to_leaf), layout.to_text()
        image_bytes = layout.values_offset + encoded.nbytes
        self.arenas.reserve(0, 1, image_bytes=image_bytes, table_bytes=4096 + len(text))
        slot = self.arenas.slot(0, 0)
        slot.unseal_to_fill()
        encoded.write_into(slot.image[layout.values_offset :])
        capture = Capture(bind(layout, survey), self._copier)
        capture.start(slot, lambda seconds: None)
        capture.fence(60.0)
        assert capture.torn() == []
        sums = self.arenas.checksum(0, 0, image_bytes)
        flight = Flight(NONCE, SnapshotId(1, step, RUN), watermark=-1, layout=1)
        self.arenas.write_record(0, flight, sums, rank=0, world=1, layout=text)
        slot.commit(NONCE)

    def put_back(self, state: TrainingState) -> int | None:
        done = Restorer(state, Alone(), 60.0).newest(Found(tuple(self.arenas.inventory()), ()))
        return done[0].step if done else None

    def close(self) -> None:
        self._copier.close()
        self.arenas.close()


@pytest.fixture
def darkroom() -> Iterator[Darkroom]:
    folder = Path(f"/dev/shm/dark-{uuid.uuid4().hex[:10]}")
    darkroom = Darkroom(folder)
    yield darkroom
    darkroom.close()
    shutil.rmtree(folder)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A default group of this process alone: enough for DDP to wrap a model."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclass
class Training:
    """A small job: what it is made of, and one step of it."""

    models: dict[str, nn.Module]
    optimizers: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    turn: Callable[[], Any] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Any = None,
        extras: Mapping[str, Any] | None = None,
        width: int = 6,
        turn: Callable[[], Any] | None = None,
    ) -> Training:
        if optimizer is None:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

        def step() -> None:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(torch.randn(8, width)).square().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)
            if turn is not None:
                turn()

        return cls({"": model}, {"": optimizer}, dict(extras or {}), step)

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.models, self.optimizers, self.extras)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            assert self.turn is not None
            self.turn()

    def bits(self) -> Any:
        """All that decides how training goes on."""
        return {
            "models": bits_of_models(self.models),
            "optimizers": bits_of_optimizers(self.optimizers),
            "extras": {name: bits(_content(extra)) for name, extra in self.extras.items()},
            "rng": [bits(torch.get_rng_state()), random.getstate(), bits(np.random.get_state(legacy=False))],
        }


def _content(extra: Any) -> Any:
    if isinstance(extra, torch.Generator):
        return extra.get_state()
    if isinstance(extra, random.Random):
        return extra.getstate()
    if isinstance(extra, np.random.RandomState):
        return extra.get_state(legacy=False)
    if isinstance(extra, np.random.Generator):
        return extra.bit_generator.state
    return extra.state_dict() if hasattr(extra, "state_dict") else extra


def make(build: Callable[[], Training], seed: int) -> Training:
    """A freshly built job; another seed gives other weights and other random numbers."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return build()


def check_round_trip(darkroom: Darkroom, build: Callable[[], Training], before: int = 2, after: int = 3) -> None:
    """Snapshot after *before* steps; restored into freshly built objects, the next *after* steps are the very same."""
    original = make(build, 1)
    original.run(before)
    darkroom.take(original.state, step=before + 1)
    taken = original.bits()
    original.run(after)
    truth = original.bits()
    assert original.turn is None or truth != taken, "a job that changes nothing proves nothing"
    for steps_of_its_own in (0, 1):  # a fresh process, and one that has trained astray
        again = make(build, 2)
        again.run(steps_of_its_own)
        assert darkroom.put_back(again.state) == before + 1
        assert again.bits() == taken
        again.run(after)
        assert again.bits() == truth


# -- models --------------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)), "b": nn.Linear(6, 6)})
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(()))
        self.register_parameter("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [self.inner["a"], self.inner["b"], *self.blocks]:
            x = torch.tanh(block(x))
        return x * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.head.weight = self.embed.weight
        self.shared_twice = nn.ModuleList([norm := nn.LayerNorm(6), norm])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for norm in self.shared_twice:
            x = norm(x)
        out: torch.Tensor = self.head(x)
        return out


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6))
        self[0].requires_grad_(False)


class Buffers(nn.Module):
    """Persistent buffers that the forward changes, and one that is nobody's business."""

    passing: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        out: torch.Tensor = self.norm(self.linear(x)) + self.passing.sum()
        return out


class WithExtraState(nn.Linear):
    """A module with state that is no tensor."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.calls: dict[str, Any] = {"n": 0, "amax": torch.zeros(4)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = {"n": self.calls["n"] + 1, "amax": self.calls["amax"] + x.abs().max()}
        out: torch.Tensor = super().forward(x)
        return out

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


class Kinds(nn.Module):
    """One tensor of every dtype and odd shape, and a single weight that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        for kind in (torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128):
            self.register_buffer(f"as_{str(kind)[6:]}", torch.randn(5, 3).to(kind))
        for kind in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool):
            self.register_buffer(f"as_{str(kind)[6:]}", torch.randint(0, 2, (7,)).to(kind))
        for kind in (torch.uint16, torch.uint32, torch.uint64):
            self.register_buffer(f"as_{str(kind)[6:]}", torch.randint(0, 99, (3,)).to(kind))
        for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
            self.register_buffer(f"as_{str(kind)[6:]}", torch.randn(9, 2).to(kind))
        self.zero_d = nn.Parameter(torch.randn((), dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.no_columns = nn.Parameter(torch.randn(4, 0))
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.channels_last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.strided = nn.Parameter(torch.randn(4, 6)[:, ::2])
        self.parametrized = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd = self.transposed.sum() + self.channels_last.square().sum() + self.strided.sum() + self.zero_d.float()
        out: torch.Tensor = (
            self.linear(x) + odd + self.parametrized.abs().sum() + self.empty.sum() + self.no_columns.sum()
        )
        return out


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.wide = nn.Parameter(torch.randn(300, 1000).t())  # more than a streamed copy's first megabyte

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x.view(-1, 1, 6, 1).expand(-1, -1, -1, 6)).flatten(1) + self.wide[:1, :1]
        return out


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Dropout(0.2), nn.Linear(9, 6))


def _compiled() -> nn.Module:
    return torch.compile(_mlp(), backend="eager")  # type: ignore[return-value]


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))


def _checkpointed() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Linear(6, 6)), nn.Sequential(checkpoint_wrapper(_mlp())))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": _mlp,
    "compiled": _compiled,
    "activation-checkpoint": _checkpointed,
    "nested": Nested,
    "tied": Tied,
    "frozen": Frozen,
    "buffers": Buffers,
    "extra-state": WithExtraState,
    "kinds": Kinds,
    "channels-last": ChannelsLast,
    "weight-norm": _weight_norm,
    "averaged": lambda: AveragedModel(_mlp()),
}


def _first_names(model: nn.Module) -> set[str]:
    """What ``get_model_state_dict`` calls the tensors; of several names of one tensor, the first."""
    with torch.no_grad():
        found = get_model_state_dict(model)
    names: dict[int | str, str] = {}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            names.setdefault(value.data_ptr() if value.numel() and value.ndim else name, name)
    return set(names.values())


def _our_names(model: nn.Module) -> set[str]:
    items = TrainingState({"": model}, {}, {}).survey().items
    return {item.slice.name.removeprefix("model.") for item in items}


@pytest.mark.parametrize("model", MODELS)
def test_names_are_those_of_torch(model: str) -> None:
    built = MODELS[model]()
    assert _our_names(built) == _first_names(built)


@pytest.mark.parametrize("model", ["plain", "tied", "frozen", "buffers", "activation-checkpoint"])
@pytest.mark.parametrize("compiled", ["", "inside", "outside"])
def test_names_survive_ddp(process_group: None, model: str, compiled: str) -> None:
    built = MODELS[model]()
    wanted = _our_names(built)
    if compiled == "inside":
        built = torch.compile(built, backend="eager")  # type: ignore[assignment]
    built = nn.parallel.DistributedDataParallel(built)
    if compiled == "outside":
        built = torch.compile(built, backend="eager")  # type: ignore[assignment]
    assert _our_names(built) == _first_names(built) == wanted


def test_a_child_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert _our_names(model) == {"module.weight", "module.bias"}


def test_several_models_are_told_apart() -> None:
    state = TrainingState({"g": nn.Linear(1, 1), "d": nn.Linear(1, 1)}, {}, {})
    assert {item.slice.name for item in state.survey().items} == {
        "model.g.weight", "model.g.bias", "model.d.weight", "model.d.bias",
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_models_come_back(darkroom: Darkroom, model: str) -> None:
    width = 6
    # A compiled wrapper is not run: what is captured does not depend on it, and compiling takes seconds.
    check_round_trip(darkroom, lambda: Training.of(_uncompiled(MODELS[model]()), width=width))


def _uncompiled(model: nn.Module) -> nn.Module:
    if hasattr(model, "_orig_mod"):
        model.forward = model._orig_mod.forward  # type: ignore[union-attr]
    return model


def test_ddp_comes_back(darkroom: Darkroom, process_group: None) -> None:
    check_round_trip(darkroom, lambda: Training.of(nn.parallel.DistributedDataParallel(Buffers())))


def test_a_snapshot_of_one_wrapper_restores_into_another(darkroom: Darkroom, process_group: None) -> None:
    """Names do not depend on what wraps the model, so neither does the snapshot."""
    original = make(lambda: Training.of(nn.parallel.DistributedDataParallel(_mlp())), 1)
    original.run(2)
    darkroom.take(original.state, step=2)
    again = make(lambda: Training.of(_compiled()), 2)
    assert darkroom.put_back(again.state) == 2
    wanted = get_model_state_dict(original.models[""])
    assert bits(get_model_state_dict(again.models[""])) == bits(wanted)


def test_non_persistent_buffers_are_left_alone(darkroom: Darkroom) -> None:
    original = make(lambda: Training.of(Buffers()), 1)
    darkroom.take(original.state)
    again = make(lambda: Training.of(Buffers()), 2)
    model = again.models[""]
    assert isinstance(model, Buffers)
    model.passing.fill_(7.0)
    darkroom.put_back(again.state)
    assert model.passing.tolist() == [7.0] * 3


def test_strides_and_addresses_survive(darkroom: Darkroom) -> None:
    """A restore fills the live tensors: whoever holds them (optimizers, captured graphs) sees the restored values."""
    original = make(lambda: Training.of(Kinds()), 1)
    original.run(1)
    darkroom.take(original.state)
    again = make(lambda: Training.of(Kinds()), 2)
    again.run(1)
    tensors = [*again.models[""].state_dict(keep_vars=True).values()]
    places = [(t.data_ptr(), t.stride(), t._version) for t in tensors]
    darkroom.put_back(again.state)
    found = [*again.models[""].state_dict(keep_vars=True).values()]
    assert all(a is b for a, b in zip(tensors, found, strict=True))
    assert [(t.data_ptr(), t.stride()) for t in found] == [place[:2] for place in places]
    assert all(t._version > place[2] for t, place in zip(found, places, strict=True)), "autograd must notice"


# -- optimizers ----------------------------------------------------------------------------------------------------------


class Odd(torch.optim.Optimizer):
    """Keeps plain values, a list of tensors and a nested dict beside its tensors."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "schedule": (1, "x", None), "weights": torch.tensor([0.5, 2.0])})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["calls"] = state.get("calls", 0) + 1
                state["history"] = [*state.get("history", [])[-2:], p.grad.clone()]
                state["nested"] = {"norms": {"l2": p.grad.norm(), "n": state["calls"]}}
                state["mean_of_grads"] = sum(state["history"]) / len(state["history"])
                p.sub_(state["mean_of_grads"], alpha=group["lr"])


class Global(torch.optim.SGD):
    """State under a key that is no parameter, as torch's own ``state_dict`` allows."""

    def step(self, closure: Any = None) -> Any:
        counters = self.state.setdefault("counters", {"steps": 0, "mean": torch.zeros(())})  # type: ignore[call-overload]
        counters["steps"] += 1
        counters["mean"] = counters["mean"] + counters["steps"]
        return super().step(closure)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adam-groups": lambda p: torch.optim.Adam(
        cast(Any, [{"params": p[:1], "lr": 1e-1}, {"params": p[1:], "betas": (0.5, 0.6)}])
    ),
    "adam-named": lambda p: torch.optim.Adam(cast(Any, [(f"n{i}", x) for i, x in enumerate(p)])),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "odd": Odd,
    "global": lambda p: Global(p, lr=1e-2, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_come_back(darkroom: Darkroom, optimizer: str) -> None:
    def build() -> Training:
        model = _mlp()
        return Training.of(model, OPTIMIZERS[optimizer](list(model.parameters())))

    check_round_trip(darkroom, build)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "lbfgs"])
def test_an_optimizer_without_state_yet_comes_back_without(darkroom: Darkroom, optimizer: str) -> None:
    """State that the optimizer did not have then is dropped."""

    def build() -> Training:
        model = _mlp()
        return Training.of(model, OPTIMIZERS[optimizer](list(model.parameters())))

    check_round_trip(darkroom, build, before=0)


def test_parameters_that_no_model_owns(darkroom: Darkroom) -> None:
    """Like the temperature of soft actor-critic: only its optimizer knows it."""

    def build() -> Training:
        model, alpha = _mlp(), torch.randn(3, requires_grad=True)
        optimizers = {"net": torch.optim.Adam(model.parameters()), "alpha": torch.optim.Adam([alpha], lr=0.1)}

        def turn() -> None:
            loss = (model(torch.randn(4, 6)) * alpha.exp().sum()).square().mean()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()

        training = Training({"": model}, optimizers, turn=turn)
        training.alpha = alpha  # type: ignore[attr-defined]
        return training

    check_round_trip(darkroom, build)
    again = make(build, 3)
    darkroom.put_back(again.state)
    assert "optim.alpha.group0.param0" in {item.slice.name for item in again.state.survey().items}


def test_two_optimizers_that_share_parameters(darkroom: Darkroom) -> None:
    def build() -> Training:
        g, d, shared = nn.Linear(6, 6), nn.Linear(6, 1), nn.Linear(6, 6)
        generator, critic = nn.Sequential(g, shared), nn.Sequential(shared, d)
        optimizers = {
            "g": torch.optim.AdamW(generator.parameters(), lr=1e-2),
            "d": torch.optim.SGD(critic.parameters(), lr=1e-2, momentum=0.9),
        }

        def turn() -> None:
            for name, sign in (("d", 1), ("g", -1)):
                for optimizer in optimizers.values():
                    optimizer.zero_grad()
                (sign * critic(generator(torch.randn(4, 6))).mean()).backward()
                optimizers[name].step()

        return Training({"g": generator, "d": critic}, optimizers, turn=turn)

    check_round_trip(darkroom, build)


def test_a_scheduler_changes_the_groups(darkroom: Darkroom) -> None:
    def build() -> Training:
        model = _mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20)
        return Training.of(model, optimizer, {"scheduler": scheduler}, turn=scheduler.step)

    check_round_trip(darkroom, build)


def test_groups_added_and_frozen_on_the_way(darkroom: Darkroom) -> None:
    def build() -> Training:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        optimizer = torch.optim.AdamW(model[1].parameters(), lr=1e-2)
        optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 1e-4, "weight_decay": 0.0})
        return Training.of(model, optimizer)

    check_round_trip(darkroom, build)


# -- extras --------------------------------------------------------------------------------------------------------------


class Counter:
    """The least that counts as stateful."""

    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def _with_extras() -> Training:
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)  # type: ignore[no-untyped-call]
    seed = int(torch.randint(0, 1 << 30, ()).item())
    extras: dict[str, Any] = {
        "ema": ema,
        "counter": Counter(),
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        "plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2),
        "generator": torch.Generator().manual_seed(seed),
        "numpy": np.random.default_rng(seed),
        "mersenne": np.random.RandomState(seed),
        "python": random.Random(seed),
        "values": {"best": float("inf"), "seen": [1, 2, 3], "at": (0, "x"), 5: torch.zeros(3, dtype=torch.bfloat16)},
        "log": [0.5],
    }

    def turn() -> None:
        optimizer.zero_grad()
        noise = torch.randn(4, 6, generator=extras["generator"]) + float(extras["numpy"].normal())
        loss = model(noise + extras["mersenne"].uniform() + extras["python"].random()).square().mean()
        extras["scaler"].scale(loss).backward()
        extras["scaler"].step(optimizer)
        extras["scaler"].update()
        extras["scheduler"].step()
        extras["plateau"].step(loss.item())
        ema.update_parameters(model)
        extras["counter"].n += 1
        extras["values"]["best"] = min(extras["values"]["best"], loss.item())
        extras["values"][5] = extras["values"][5] + 1
        extras["log"].append(random.random() + float(np.random.rand()))

    return Training({"": model}, {"": optimizer}, extras, turn)


def test_extras_come_back(darkroom: Darkroom) -> None:
    check_round_trip(darkroom, _with_extras)


def test_dicts_and_lists_come_back_in_place(darkroom: Darkroom) -> None:
    original = make(_with_extras, 1)
    original.run(2)
    darkroom.take(original.state)
    again = make(_with_extras, 2)
    values, log = again.extras["values"], again.extras["log"]
    values["not there then"] = 1
    darkroom.put_back(again.state)
    assert bits(values) == bits(original.extras["values"])
    assert log == original.extras["log"]


def test_an_ema_as_a_second_model(darkroom: Darkroom) -> None:
    def build() -> Training:
        training = Training.of(_mlp())
        model = training.models[""]
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
        inner = training.turn
        assert inner is not None

        def turn() -> None:
            inner()
            ema.update_parameters(model)

        return Training({"net": model, "ema": ema}, training.optimizers, turn=turn)

    check_round_trip(darkroom, build)


# -- refusals ------------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor that promises more than bytes."""


def _model_with(name: str, tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (_model_with("sparse", torch.eye(3).to_sparse()), "model.inner.sparse"),
        (_model_with("special", torch.ones(2).as_subclass(Subclass)), "model.inner.special"),
        (_model_with("hollow", torch.empty(3, device="meta")), "model.inner.hollow"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), "model.1.weight"),
        (_model_with("spread", torch.ones(1, 3).expand(4, 3)), "model.inner.spread"),
    ],
    ids=["sparse", "subclass", "meta", "uninitialized", "overlapping"],
)
def test_tensors_without_plain_bytes_are_refused(model: nn.Module, path: str) -> None:
    with pytest.raises(StateRefused, match=path):
        TrainingState({"": model}, {}, {}).survey()


def test_unsupported_extras_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for extra in (lambda: 1, file, 3, "text", 1.5, None, {1}, object()):
            with pytest.raises(StateRefused, match=r"extras\.bad"):
                TrainingState({}, {}, {"fine": {}, "bad": extra})


@pytest.mark.parametrize("value", [lambda: 1, object(), torch.eye(2).to_sparse(), torch.ones(2).as_subclass(Subclass)])
def test_values_that_need_pickle_are_refused(value: object) -> None:
    state = TrainingState({}, {}, {"box": {"deep": [1, {"x": value}]}})
    with pytest.raises(StateRefused, match=r"state\['extras'\]\['box'\]\['deep'\]\[1\]\['x'\]"):
        encode(state.values(state.survey()), "state", to_leaf)


def test_a_trained_parameter_among_the_values_is_refused() -> None:
    """It would come back as another tensor, which its optimizer does not know and that needs no gradient."""
    state = TrainingState({}, {}, {"sac": {"log_alpha": torch.zeros(1, requires_grad=True)}})
    with pytest.raises(StateRefused, match=r"\['log_alpha'\]"):
        encode(state.values(state.survey()), "state", to_leaf)


@pytest.mark.parametrize("key", ["mean.of.grads", 7])
def test_optimizer_state_whose_key_makes_no_name_is_refused(key: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight][key] = torch.zeros(1)
    with pytest.raises(StateRefused, match=r"optim\.weight"):
        TrainingState({"": model}, {"": optimizer}, {}).survey()


def test_two_tensors_of_one_name_are_refused() -> None:
    a, b = nn.Module(), nn.Module()
    a.b = nn.Module()
    a.b.register_buffer("x", torch.ones(1))
    b.register_buffer("x", torch.ones(1))
    with pytest.raises(StateRefused, match=r"model\.a\.b\.x"):
        TrainingState({"a": a, "a.b": b}, {}, {}).survey()


# -- layouts that do not match -------------------------------------------------------------------------------------------


def _small(first: int = 6, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(6, first), *[nn.Linear(first, first) for _ in range(layers - 1)]).to(dtype)


def _adam(model: nn.Module, groups: int = 1) -> Any:
    parameters = list(model.parameters())
    return torch.optim.Adam([{"params": parameters[g::groups]} for g in range(groups)])


class Silent(nn.Module):
    """Nothing but extra state."""

    def get_extra_state(self) -> Any:
        return {"x": 1}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _job(model: nn.Module, groups: int = 1, **extras: Any) -> Training:
    return Training.of(model, _adam(model, groups), extras or {"kept": {"a": 1}})


OTHERS: dict[str, tuple[Callable[[], Training], list[str]]] = {
    "larger layer": (
        lambda: _job(_small(7)),
        [r"model\.0\.weight: float32\[7, 6\] live, float32\[6, 6\] in the snapshot", r"model\.1\.bias"],
    ),
    "removed layer": (lambda: _job(_small(layers=1)), [r"model\.1\.weight: in the snapshot, not in the live state"]),
    "added layer": (lambda: _job(_small(layers=3)), [r"model\.2\.bias: in the live state, not in the snapshot"]),
    "other dtype": (lambda: _job(_small(dtype=torch.float64)), [r"model\.0\.weight: float64.* live, float32"]),
    "other extras": (lambda: _job(_small(), other={"a": 1}), [r"extras: \['other'\] live, \['kept'\]"]),
    "no extras": (lambda: Training.of(model := _small(), _adam(model)), [r"extras: \[\] live, \['kept'\]"]),
    "no optimizer": (
        lambda: Training({"": _small()}, {}, {"kept": {}}, turn=lambda: None),
        [r"optim\.0\.weight\.exp_avg|optimizers: \[\] live"],
    ),
    "other optimizer": (
        lambda: Training.of(model := _small(), {"o": _adam(model)}["o"], {"kept": {}, "more": []}),
        [r"extras: \['kept', 'more'\] live"],
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("trained", [0, 1])
def test_a_snapshot_of_something_else_changes_nothing(darkroom: Darkroom, other: str, trained: int) -> None:
    original = make(lambda: _job(_small()), 1)
    original.run(2)
    darkroom.take(original.state)
    build, messages = OTHERS[other]
    again = make(build, 2)
    if other != "other dtype":
        again.run(trained)
    before = again.bits()
    with pytest.raises(LayoutMismatch) as caught:
        darkroom.put_back(again.state)
    for message in messages:
        assert re.search(message, str(caught.value))
    assert again.bits() == before


def test_groups_may_be_cut_and_ordered_in_another_way(darkroom: Darkroom) -> None:
    """Options go with the parameters' names, as the state does."""
    original = make(lambda: _job(_small(), 2), 1)
    original.optimizers[""].param_groups[1]["lr"] = 0.25
    original.run(2)
    darkroom.take(original.state)
    again = make(lambda: _job(_small(), 2), 2)
    again.optimizers[""].param_groups.reverse()
    darkroom.put_back(again.state)
    assert [group["lr"] for group in again.optimizers[""].param_groups] == [0.25, 0.001]
    parameters = zip(original.models[""].parameters(), again.models[""].parameters(), strict=True)
    for old, new in parameters:
        assert torch.equal(original.optimizers[""].state[old]["exp_avg"], again.optimizers[""].state[new]["exp_avg"])


def test_one_group_cannot_have_the_options_of_two(darkroom: Darkroom) -> None:
    original = make(lambda: _job(_small(), 2), 1)
    original.optimizers[""].param_groups[1]["lr"] = 0.25
    original.run(1)
    darkroom.take(original.state)
    again = make(lambda: _job(_small()), 2)
    before = again.bits()
    with pytest.raises(LayoutMismatch, match=r"optim\.0\.weight and optim\.0\.bias are in one group now"):
        darkroom.put_back(again.state)
    assert again.bits() == before


@pytest.mark.parametrize("which", ["snapshot", "live"])
def test_extra_state_of_a_module_that_is_not_there(darkroom: Darkroom, which: str) -> None:
    """Such a module has no tensors by which one could notice; still it is noticed before anything is changed."""
    bare, full = (lambda: _job(_small())), (lambda: _job(nn.Sequential(*_small().children(), Silent())))
    original = make(full if which == "snapshot" else bare, 1)
    original.run(1)
    darkroom.take(original.state)
    again = make(bare if which == "snapshot" else full, 2)
    before = again.bits()
    with pytest.raises(LayoutMismatch, match=r"extra.state"):
        darkroom.put_back(again.state)
    assert again.bits() == before


def test_a_renaming_reaches_what_is_no_tensor() -> None:
    """Extra state of modules, and optimizer state like counts, go with the tensors that they belong to."""
    first, second = Silent(), Silent()
    told: dict[int, Any] = {}
    for module in (first, second):
        module.set_extra_state = partial(told.__setitem__, id(module))  # type: ignore[method-assign]
    line = nn.Linear(2, 2)
    model = nn.ModuleDict({"old": first, "new": second, "line": line})
    optimizer = torch.optim.SGD(line.parameters())
    state = TrainingState({"": model}, {"": optimizer}, {})
    values = {"state": {"optim.was.weight": {"turns": 3}}, "modules": {":old.": "a", ":other.": "b"}}
    rename = {"model.old.": "model.new.", "optim.was.": "optim.line."}
    state.apply_some(values, Selection(only=("model.new.*", "optim.*"), rename=rename))
    assert told == {id(second): "a"}
    assert optimizer.state[line.weight] == {"turns": 3}
    assert line.bias not in optimizer.state


# -- surveys -------------------------------------------------------------------------------------------------------------


def test_a_survey_holds_until_something_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainingState({"": model}, {"": optimizer}, {})
    survey = state.survey()
    model(torch.randn(3, 2)).sum().backward()
    assert state.unchanged(survey)
    optimizer.step()
    assert not state.unchanged(survey), "optimizer state appeared"
    survey = state.survey()
    optimizer.step()
    assert state.unchanged(survey)
    model[1].running_mean = torch.ones(2)
    assert not state.unchanged(survey), "a buffer was replaced"
    survey = state.survey()
    model.append(nn.Linear(2, 2))
    assert not state.unchanged(survey), "a layer was added"
    survey = state.survey()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert not state.unchanged(survey), "a group was added"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-amsgrad", "sgd-momentum", "adagrad", "rmsprop", "radam"])
def test_memory_is_predicted_before_the_first_step(optimizer: str) -> None:
    """Slots are made before the optimizer has state; they must be large enough for it, and not much larger."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    state = TrainingState({"": model}, {"": made}, {})
    predicted = state.predicted_bytes()
    model(torch.randn(2, 64)).sum().backward()
    made.step()
    needed = Layout.of(1, [item.slice for item in state.survey().items]).values_offset
    assert needed <= predicted <= 1.1 * needed


def test_memory_is_predicted_for_an_optimizer_that_cannot_be_twinned() -> None:
    model = _mlp()
    state = TrainingState({"": model}, {"": Odd(list(model.parameters()))}, {})
    assert state.predicted_bytes() > sum(p.nbytes for p in model.parameters())


def test_a_job_of_one_rank_has_all_its_tensors_on_grids() -> None:
    """Each is one box; a scalar is one without dimensions, and sizes of 0 count as 1."""
    model = nn.BatchNorm1d(3)
    model.register_buffer("nothing", torch.empty(0, 2))
    found = {item.slice.name: item.slice.chunk for item in TrainingState({"": model}, {}, {}).survey().items}
    assert found == {
        "model.weight": (3,), "model.bias": (3,), "model.running_mean": (3,), "model.running_var": (3,),
        "model.num_batches_tracked": (), "model.nothing": (1, 2),
    }  # fmt: skip


@dataclass(eq=False)
class _Mesh:
    """What is asked of a device mesh, without a process group."""

    mesh: torch.Tensor
    shape: tuple[int, ...]


@pytest.mark.parametrize(
    ("mesh", "placements", "shape", "expected"),
    [
        ((4,), [Shard(0)], (10, 3), (3, 3)), ((4,), [Shard(1)], (10, 3), (10, 1)), ((4,), [Replicate()], (10, 3), (10, 3)),
        ((4,), [Shard(0)], (2, 3), (1, 3)), ((4,), [Shard(0)], (0, 3), (1, 3)),
        ((2, 2), [Replicate(), Shard(0)], (7,), (4,)), ((2, 2), [Shard(0), Shard(1)], (5, 7), (3, 4)),
        ((2, 2), [Shard(0), Shard(0)], (8,), (2,)), ((2, 2), [Shard(0), Shard(0)], (7,), None),
        ((2, 2), [Shard(0), Shard(0)], (6,), None), ((1, 4), [Shard(0), Shard(0)], (7,), (2,)),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], (8, 3), (2, 3)),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], (6, 3), None),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(1)], (8, 4), None),
        ((2,), [Shard(0)], (8,), None),
    ],
    ids=str,
)  # fmt: skip
def test_the_grid_of_a_dtensor(
    monkeypatch: pytest.MonkeyPatch,
    mesh: tuple[int, ...],
    placements: list[Any],
    shape: tuple[int, ...],
    expected: tuple[int, ...] | None,
) -> None:
    """In a world of four ranks; the last mesh has only two of them."""
    monkeypatch.setattr("holdfast.snapshot.meshes._world", lambda: 4)
    ranks = _Mesh(torch.arange(math.prod(mesh)).reshape(mesh), mesh)
    tensor: Any = SimpleNamespace(device_mesh=ranks, placements=placements, shape=shape)
    assert mesh_chunk(tensor) == expected


@pytest.mark.parametrize(("replicas", "expected"), [((), None), ((0, 1), None), ((0, 1, 2, 3), (3, 2))])
def test_the_grid_of_a_plain_tensor(
    monkeypatch: pytest.MonkeyPatch, replicas: tuple[int, ...], expected: tuple[int, ...] | None
) -> None:
    """Replicated over all four ranks, or not on any grid: two groups may hold different tensors of one name."""
    monkeypatch.setattr("holdfast.snapshot.meshes._world", lambda: 4)
    assert plain_chunk((3, 2), replicas) == expected
