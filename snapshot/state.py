"""The training state, as named tensors and plain values.

Tensors get the names that ``torch.distributed.checkpoint.state_dict`` gives them, whatever wraps the model (DDP,
``torch.compile``, activation checkpointing), under a section::

    model.<fqn>                    parameters and persistent buffers       (model.<name>.<fqn> for several models)
    optim.<fqn>.<key>              tensors of the optimizer's state        (optim.<name>.<fqn>.<key> for several)
    optim.group<g>.param<i>        a parameter that an optimizer trains and no model owns

Everything else is a *value*: hyperparameters, state that is no tensor, extra state of modules, the extras' state, all
random generators. Names, not positions, tie a value to its owner when it comes back.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..errors import Corrupt, LayoutMismatch, StateRefused
from .codec import Raw, Tagged
from .frozen import may_stand_still
from .layout import ITEM_BYTES, Slice, room
from .meshes import mesh_chunk, mesh_replicas, plain_chunk
from .partition import chunk_bytes, gridded
from .selection import ALL, Misfits, Selection, misfits
from .streams import RandomState, python_state, set_python_state, set_random_state
from .values import Hyperparameters, joined

_WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@runtime_checkable
class Stateful(Protocol):
    """Anything that hands out its state and takes it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One tensor of the state on this rank.

    Attributes:
        slice: the whole box that this rank holds. ``members`` are the ranks that should hold the same bytes.
        tensor: the live local tensor; never written by a capture.
        source: the live object itself: the same tensor, or the DTensor whose local part it is.
        lazy: nothing but an optimizer step changes it, so it may be copied during forward and backward.
        frozen: nothing trains it, or ever has, or it is a large buffer: it may never change. Contiguous, in CPU memory.
    """

    slice: Slice
    tensor: torch.Tensor
    source: torch.Tensor
    lazy: bool
    frozen: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """All tensors of the state at one time, and the objects they were found through.

    ``owners`` are the dictionaries in which modules keep their children, parameters and buffers; ``anchors`` is what was
    in them, and in the optimizers. As long as both are the same objects, so are the tensors. ``stateful`` are the modules
    with extra state. ``groups`` are the names of each optimizer's parameters, group by group. ``plain``: some optimizer
    keeps state that is no tensor; ``loose``: some keeps state for all its parameters together. ``size`` as
    ``TrainingState.size``.
    """

    items: tuple[Item, ...]
    owners: tuple[Mapping[str, object], ...]
    anchors: tuple[object, ...]
    stateful: Mapping[str, nn.Module]
    groups: Mapping[str, tuple[str, ...]]
    plain: bool
    loose: bool
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Where a snapshot's tensors go: the items to fill, and the optimizer state that they make up once filled.

    Attributes:
        misfits: what is in the live state and not in the snapshot, or the other way round, or different in both.
        whole: optimizers are to have this state, and no other.
    """

    items: tuple[Item, ...]
    state: tuple[tuple[torch.optim.Optimizer, torch.Tensor, str, torch.Tensor], ...]
    misfits: Misfits
    whole: bool


class TrainingState:
    """What is captured and restored. Holds references to the live objects; owns nothing."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Any],
        extras: Mapping[str, Any],
    ) -> None:
        """Sections are named by the mappings' keys; the key ``""`` stands for the only one of its kind.

        Raises:
            StateRefused: an object whose state cannot be had, with its path.
        """
        self._models = dict(models)
        self.optimizers = {name: o for name, o in optimizers.items() if isinstance(o, torch.optim.Optimizer)}
        foreign = {f"optimizer {name}".strip(): o for name, o in optimizers.items() if name not in self.optimizers}
        self._extras = {**extras, **foreign}
        for name, extra in self._extras.items():
            if _adapter(extra) is None:
                raise StateRefused(
                    f"extras.{name}: {type(extra).__name__} has no state_dict and load_state_dict, and is no dict, list or "
                    f"random generator; what cannot be put back in place cannot be restored (wrap plain values in a dict)"
                )

    @property
    def shuffles(self) -> bool:
        """Whether modules exchange their parameter objects during forward and backward, as FSDP2's do."""
        return any(isinstance(m, FSDPModule) for model in self._models.values() for _, m, _ in _walk(model))

    # -- tensors -----------------------------------------------------------------------------------------------------

    def survey(self) -> Survey:
        """Find every tensor. A full walk: milliseconds; see ``unchanged`` for the check of every step.

        Raises:
            StateRefused: a tensor that cannot be captured, by name.
        """
        for model in self._models.values():
            _reshard(model)
        with torch.no_grad():
            items = [*self._model_items(), *self._optimizer_items()]
        names = [item.slice.name for item in items]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise StateRefused(f"two tensors of the state have the same name: {', '.join(twice[:5])}")
        owners = tuple(
            owner
            for model in self._models.values()
            for _, module, _ in _walk(model)
            for owner in (module._modules, module._parameters, module._buffers)
        )
        plain = not all(isinstance(value, torch.Tensor) for value in self._state_values())
        return Survey(
            tuple(items),
            owners,
            tuple(self._anchors(owners, plain)),
            _stateful_modules(self._models),
            {name: tuple(map(joined, groups)) for name, groups in self._groups().items()},
            plain,
            any(map(_loose_state, self.optimizers.values())),
            self.size(),
        )

    def size(self) -> int:
        """How many parameters the optimizers train, and how many have state: changes when state appears."""
        return sum(
            len(o.state) + sum(len(group["params"]) for group in o.param_groups) for o in self.optimizers.values()
        )

    def unchanged(self, survey: Survey) -> bool:
        """Whether *survey* still finds the very same tensor objects in the same places (about 0.1 µs per tensor)."""
        now = self._anchors(survey.owners, survey.plain)
        return len(now) == len(survey.anchors) and all(map(operator.is_, now, survey.anchors))

    def _anchors(self, owners: Iterable[Mapping[str, object]], plain: bool) -> list[object]:
        """What is in *owners* and in the optimizers. State that is no tensor is left out if *plain* says that there is
        some: it is another object at every step."""
        anchors = list(chain.from_iterable(map(_values, owners)))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                anchors += group["params"]
        anchors += (v for v in self._state_values() if isinstance(v, torch.Tensor)) if plain else self._state_values()
        return anchors

    def _state_values(self) -> Iterator[object]:
        """Every value of every parameter's state in every optimizer."""
        for optimizer in self.optimizers.values():
            yield from chain.from_iterable(map(_values, filter(_is_dict, optimizer.state.values())))

    def _model_items(self) -> Iterator[Item]:
        trained = {id(p) for o in self.optimizers.values() for p, state in o.state.items() if state}
        for name, model in self._models.items():
            prefix = f"model.{name}." if name else "model."
            seen: set[int] = set()
            for fqn, tensor, replicas in _named_tensors(model):
                if id(tensor) not in seen:  # tied: one tensor under several names is kept under the first
                    seen.add(id(tensor))
                    item = _item(prefix + fqn, tensor, replicas, lazy=isinstance(tensor, nn.Parameter))
                    yield replace(item, frozen=id(tensor) not in trained and may_stand_still(tensor, item.tensor))

    def _optimizer_items(self) -> Iterator[Item]:
        for owner in self._owners():
            if owner.orphan:
                yield _item(owner.name, owner.parameter, (), lazy=True)
            for key, value in owner.optimizer.state.get(owner.parameter, {}).items():
                if type(key) is not str or "." in key:
                    raise StateRefused(
                        f"{owner.name}: optimizer state under the key {key!r}; a name without dots is needed"
                    )
                if isinstance(value, torch.Tensor):
                    yield _item(f"{owner.name}.{key}", value, owner.replicas, lazy=True)

    def _owners(self) -> Iterator[_Owner]:
        """Every parameter of every optimizer, under its name."""
        names: dict[int, tuple[str, tuple[int, ...]]] = {}
        for name, model in self._models.items():
            for fqn, tensor, replicas in _named_tensors(model):
                names.setdefault(id(tensor), (f"{name}.{fqn}" if name else fqn, replicas))
        for name, optimizer in self.optimizers.items():
            prefix = f"optim.{name}." if name else "optim."
            for g, group in enumerate(optimizer.param_groups):
                for i, parameter in enumerate(group["params"]):
                    fqn, replicas = names.get(id(parameter), (f"group{g}.param{i}", ()))
                    yield _Owner(name, g, optimizer, parameter, prefix + fqn, replicas, id(parameter) not in names)

    def _groups(self) -> dict[str, list[list[str]]]:
        """The names of each optimizer's parameters, group by group."""
        groups: dict[str, list[list[str]]] = {n: [[] for _ in o.param_groups] for n, o in self.optimizers.items()}
        for owner in self._owners():
            groups[owner.section][owner.group].append(owner.name)
        return groups

    # -- values ------------------------------------------------------------------------------------------------------

    def values(self, survey: Survey) -> dict[str, Any]:
        """Everything that is no tensor of *survey*, as it is now; a tree for ``codec.encode`` with ``to_leaf``."""
        return {**self.own_values(survey), "rng": RandomState().tree()}

    def own_values(self, survey: Survey) -> dict[str, Any]:
        """``values`` but for the global random generators; parts of it are the live objects."""
        return {
            "groups": {
                name: [_options(group, names) for group, names in zip(o.param_groups, survey.groups[name], strict=True)]
                for name, o in self.optimizers.items()
            },
            "state": self._plain_state() if survey.plain else {},
            "loose": {name: _loose_state(o) for name, o in self.optimizers.items()} if survey.loose else {},
            "modules": {key: module.get_extra_state() for key, module in survey.stateful.items()},
            "extras": {name: _adapter_of(extra)[0]() for name, extra in self._extras.items()},
        }

    def _plain_state(self) -> dict[str, dict[str, Any]]:
        """Optimizer state that is no tensor (step counts, histories), by the parameter's name."""
        return {
            owner.name: plain
            for owner in self._owners()
            if (plain := {k: v for k, v in owner.state.items() if not isinstance(v, torch.Tensor)})
        }

    def check_values(self, values: Mapping[str, Any]) -> None:
        """Raise ``LayoutMismatch`` if ``apply_values`` could not apply *values*."""
        _same_names("optimizers", values["groups"], self.optimizers)
        _same_names("extras", values["extras"], self._extras)
        if absent := sorted(_stateful_modules(self._models).keys() - values["modules"].keys()):
            raise LayoutMismatch(f"modules with extra state: {absent} live, not in the snapshot")
        self._hyperparameters(values)

    def lacks(self, values: Mapping[str, Any]) -> bool:
        """Whether *values*, as one rank had them, are not all that this rank needs."""
        try:
            self.check_values(values)
        except LayoutMismatch:
            return True
        return bool(self.foreign_modules(values))

    def foreign_modules(self, values: Mapping[str, Any]) -> list[str]:
        """Modules of which *values* have extra state, and which are not live here; named as a state dict names that."""
        return [_extra_name(key) for key in values["modules"].keys() - _stateful_modules(self._models).keys()]

    def _hyperparameters(self, values: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any] | None]]:
        """For each group of each optimizer, its options; None for one without parameters. Raises ``LayoutMismatch``."""
        found: dict[str, list[Mapping[str, Any] | None]] = {}
        for name, groups in self._groups().items():
            saved = Hyperparameters(f"optimizer {name}".strip(), values["groups"][name], to_leaf)
            found[name] = [saved.of(names) for names in groups]
        return found

    def apply_values(self, values: Mapping[str, Any]) -> None:
        """Put *values* back, after ``install``; random generators last, since putting the rest back may draw from them."""
        self.check_values(values)
        for name, options in self._hyperparameters(values).items():
            for group, its in zip(self.optimizers[name].param_groups, options, strict=True):
                _set_options(group, its or {})
        for name, optimizer in self.optimizers.items():
            optimizer.state.update(values["loose"].get(name, {}))
        self.apply_some(values)
        for name, extra in self._extras.items():
            _adapter_of(extra)[1](values["extras"][name])
        set_random_state(values["rng"])

    def apply_some(self, values: Mapping[str, Any], chosen: Selection = ALL) -> None:
        """Put back what of *values* belongs to the parameters and modules that are *chosen*, as far as it is there."""
        state = {chosen.live_name(name): kept for name, kept in values["state"].items()}
        extra = {chosen.live_name(_extra_name(key)): kept for key, kept in values["modules"].items()}
        for owner in (owner for owner in self._owners() if chosen.wants(owner.name)):
            owner.optimizer.state[owner.parameter].update(state.get(owner.name, {}))
            if not owner.state:
                del owner.optimizer.state[owner.parameter]
        for key, module in _stateful_modules(self._models).items():
            if (name := _extra_name(key)) in extra and chosen.wants(name):
                module.set_extra_state(extra[name])

    # -- coming back -------------------------------------------------------------------------------------------------

    def targets(self, held: Iterable[Slice], selection: Selection = ALL, survey: Survey | None = None) -> Targets:
        """Where each tensor that a snapshot holds goes: live tensors, and new ones for optimizer state not yet there.

        Nothing live is changed.

        Args:
            held: slices of the snapshot, of any rank, under their live names; every tensor at least once.
            selection: what is wanted of them.
            survey: of the live state as it is now, if there is one.
        """
        saved = {piece.name: piece for piece in held if selection.wants(piece.name)}
        live = {item.slice.name: item for item in (survey or self.survey()).items if selection.wants(item.slice.name)}
        owners = {owner.name: owner for owner in self._owners()}
        state_of = {name: owners.get(name.rpartition(".")[0]) for name in [*saved, *live]}
        # Of optimizer state, the snapshot decides what there is; of all else, what is live.
        items = {name: item for name, item in live.items() if state_of[name] is None}
        found = misfits((item.slice for item in items.values()), (p for n, p in saved.items() if state_of[n] is None))
        fitting = {name: item for name, item in items.items() if _same_kind(item, saved.get(name)) is not None}
        unfit = {id(item.source) for name, item in items.items() if name not in fitting}
        state: list[tuple[torch.optim.Optimizer, torch.Tensor, str, torch.Tensor]] = []
        with torch.no_grad():
            for name, piece in saved.items():
                owner = state_of[name]
                if owner is None or id(owner.parameter) in unfit:
                    continue
                fitting[name] = _same_kind(live.get(name), piece) or _fresh_state(name, owner, piece)
                state.append((owner.optimizer, owner.parameter, name.rpartition(".")[2], fitting[name].source))
        return Targets(tuple(fitting.values()), tuple(state), found, selection.whole)

    def install(self, targets: Targets) -> None:
        """Give optimizers the tensor state of the snapshot; of a whole one exactly that: state it did not have is dropped."""
        if targets.whole:
            for optimizer in self.optimizers.values():
                optimizer.state.clear()
        for optimizer, parameter, key, tensor in targets.state:
            optimizer.state[parameter][key] = tensor

    def predicted_bytes(self) -> int:
        """An upper estimate of this rank's share of the tensors, with the state that optimizers will create."""
        slices = gridded([item.slice for item in self.survey().items])
        nbytes = sum(room(piece.nbytes // _copies(piece.members)) for piece in slices)
        # A share is off its fair part by at most a chunk; with the state to come, what is shared is cut less finely.
        nbytes += 4 * max((min(chunk_bytes(p), p.nbytes) for p in slices if p.members), default=0)
        replicas = {id(owner.parameter): _copies(owner.replicas) for owner in self._owners()}
        absent = [o for o in self.optimizers.values() if not o.state]
        return nbytes + sum(_predicted_state_bytes(optimizer, replicas) for optimizer in absent)


def _copies(members: tuple[int, ...]) -> int:
    """Among how many ranks the bytes are shared out."""
    return max(len(members), 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Owner:
    """A parameter that an optimizer trains, in group number *group* of the optimizer called *section*. ``orphan``: no model owns
    it, so the optimizer's section holds its value."""

    section: str
    group: int
    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor
    name: str
    replicas: tuple[int, ...]
    orphan: bool

    @property
    def state(self) -> MutableMapping[str, Any]:
        found: MutableMapping[str, Any] = self.optimizer.state.get(self.parameter, {})
        return found


# -- walking models ------------------------------------------------------------------------------------------------------


def _walk(
    module: nn.Module, prefix: str = "", scope: tuple[tuple[int, ...], str, frozenset[str]] = ((), "", frozenset())
) -> Iterator[tuple[str, nn.Module, tuple[tuple[int, ...], str, frozenset[str]]]]:
    """Every module with its prefix, wrappers skipped; *scope* is the DDP around it: ranks, its prefix, ignored names."""
    if isinstance(module, DistributedDataParallel):
        ranks = tuple(sorted(dist.get_process_group_ranks(module.process_group)))
        scope = (ranks if len(ranks) > 1 else (), prefix, frozenset(module.parameters_to_ignore))
    yield prefix, module, scope
    for name, child in module._modules.items():
        if child is not None:
            hidden = name in _WRAPPERS or (name == "module" and isinstance(module, DistributedDataParallel))
            yield from _walk(child, prefix if hidden else f"{prefix}{name}.", scope)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...]]]:
    """Parameters and persistent buffers with their names and, for parameters, the ranks that hold replicas."""
    seen: set[int] = set()
    for prefix, module, (replicas, root, ignored) in _walk(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fqn = prefix + name
                yield fqn, parameter, () if fqn.removeprefix(root) in ignored else replicas
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer, ()  # DDP's ranks each keep their own buffers


def _stateful_modules(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules with extra state of their own, by the key under which it is kept among the values."""
    return {
        f"{name}:{prefix}": module
        for name, model in models.items()
        for prefix, module, _ in _walk(model)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _extra_name(key: str) -> str:
    """What a state dict calls the extra state of a module, by the key under which it is kept."""
    return f"model.{key.replace(':', '.', 1).removeprefix('.')}_extra_state"


_values = operator.methodcaller("values")


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _reshard(model: nn.Module) -> None:
    """Have FSDP2 modules show their shards: after a forward without backward, the root still shows whole parameters."""
    for _, module, _ in _walk(model):
        if isinstance(module, FSDPModule):
            module.reshard()


# -- one tensor ----------------------------------------------------------------------------------------------------------


def _item(name: str, source: torch.Tensor, replicas: tuple[int, ...], *, lazy: bool) -> Item:
    """Describe one tensor. Raises ``StateRefused`` for a kind that has no plain bytes."""
    if is_lazy(source):
        raise StateRefused(f"{name}: not initialised yet; run one forward pass before the Checkpointer is made")
    shape, start, extent = tuple(source.shape), (0,) * source.ndim, tuple(source.shape)
    local, chunk = source, plain_chunk(shape, replicas)
    if isinstance(source, DTensor):
        if any(placement.is_partial() for placement in source.placements):
            raise StateRefused(f"{name}: a DTensor with pending partial sums {source.placements} cannot be captured")
        replicas, chunk = mesh_replicas(source), mesh_chunk(source)
        local = source.to_local()
        chunks = source.__create_chunk_list__()  # type: ignore[no-untyped-call]
        if len(chunks) != 1:
            raise StateRefused(f"{name}: the local part of this DTensor is {len(chunks)} boxes; one is needed")
        start, extent = tuple(chunks[0].offsets), tuple(chunks[0].sizes)
    local = plain_tensor(name, local)
    if tuple(local.shape) != extent:  # an empty shard may have lost its other dimensions
        local = local.reshape(extent)
    dtype = str(local.dtype).removeprefix("torch.")
    piece = Slice(name, dtype, shape, start, extent, local.device.type, replicas, chunk)
    return Item(piece if piece.on_grid else replace(piece, chunk=None), local, source, lazy)


def plain_tensor(name: str, local: torch.Tensor) -> torch.Tensor:
    """*local* as it is, if it has plain bytes. Raises ``StateRefused``, with its *name* and what it is."""
    dtype = str(local.dtype).removeprefix("torch.")
    plain = type(local) in (torch.Tensor, nn.Parameter, nn.Buffer) and local.layout is torch.strided
    if not plain or dtype not in ITEM_BYTES or local.is_meta:
        raise StateRefused(
            f"{name}: a {type(local).__name__} of dtype {dtype}, layout {local.layout}, device {local.device}; "
            f"plain dense tensors that hold data are needed"
        )
    if any(stride == 0 and length > 1 for stride, length in zip(local.stride(), local.shape, strict=True)):
        raise StateRefused(
            f"{name}: its elements overlap in memory (it was expanded); a contiguous copy can be captured"
        )
    return local


def _same_kind(item: Item | None, piece: Slice | None) -> Item | None:
    """*item*, if its tensor can take the bytes of *piece*'s."""
    fits = item is not None and piece is not None and (item.slice.dtype, item.slice.shape) == (piece.dtype, piece.shape)
    return item if fits else None


def _fresh_state(name: str, owner: _Owner, piece: Slice) -> Item:
    """An empty tensor for optimizer state that is not there yet: like its parameter where the shapes agree."""
    dtype, parameter = getattr(torch, piece.dtype), owner.parameter.detach()
    if tuple(parameter.shape) == piece.shape and piece.shape:
        tensor = torch.empty_like(parameter, dtype=dtype)
    else:
        device = "cpu" if piece.device == "cpu" else parameter.device
        tensor = torch.empty(piece.shape, dtype=dtype, device=device)
    return _item(name, tensor, owner.replicas, lazy=True)


def _predicted_state_bytes(optimizer: torch.optim.Optimizer, copies: Mapping[int, int]) -> int:
    """What one step of a twin of *optimizer* on shapes alone creates; three times the parameters if there can be no twin.

    *copies*: by a parameter's identity, among how many ranks its state is shared out.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    shapes = {id(p): nn.Parameter(torch.empty_like(_local(p), device="meta")) for p in parameters}
    try:
        state = _twin_state(optimizer, shapes)
    except Exception:  # noqa: BLE001 - any optimizer's code may run here, and only an estimate is at stake
        return sum(3 * room(shapes[id(p)].nbytes // copies[id(p)]) for p in parameters)
    return sum(
        room(value.nbytes // copies[id(p)])
        for p in parameters
        for value in state.get(shapes[id(p)], {}).values()
        if isinstance(value, torch.Tensor)
    )


def _twin_state(optimizer: torch.optim.Optimizer, shapes: Mapping[int, nn.Parameter]) -> Mapping[torch.Tensor, Any]:
    """The state that an optimizer of the same kind and options creates for parameters of these shapes."""
    skipped = {"params", "fused", "foreach", "capturable"}  # ways of computing, which have demands on the device
    groups = [
        {
            **{key: value for key, value in group.items() if key not in skipped},
            "params": [shapes[id(p)] for p in group["params"] if id(p) in shapes],
        }
        for group in optimizer.param_groups
    ]
    twin = type(optimizer)([group for group in groups if group["params"]])  # type: ignore[call-arg]
    for parameter in shapes.values():
        parameter.grad = torch.empty_like(parameter)
    twin.step()
    return twin.state


def _local(parameter: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


# -- values --------------------------------------------------------------------------------------------------------------


def _options(group: Mapping[str, Any], names: str) -> dict[str, Any]:
    return {"params": names, "options": {k: v for k, v in group.items() if k != "params"}}


def _set_options(group: MutableMapping[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        live = group.get(key)
        if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
            live.detach().copy_(value)  # captured graphs keep reading the same address
        else:
            group[key] = value


def _loose_state(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """State that an optimizer keeps for all its parameters together, under names of its own."""
    return {key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}


def _same_names(what: str, held: Iterable[str], live: Iterable[str]) -> None:
    if set(held) != set(live):
        raise LayoutMismatch(f"{what}: {sorted(live)} live, {sorted(held)} in the snapshot")


def _adapter_of(extra: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    adapter = _adapter(extra)
    assert adapter is not None  # checked when the state was put together
    return adapter


def _adapter(extra: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to get an extra's state and how to put it back, in place; None if there is no way."""
    if isinstance(extra, Stateful):
        return extra.state_dict, extra.load_state_dict
    if isinstance(extra, torch.Generator):
        return extra.get_state, extra.set_state
    if isinstance(extra, random.Random):
        return lambda: python_state(extra), lambda state: set_python_state(extra, state)
    if isinstance(extra, np.random.RandomState):
        return lambda: extra.get_state(legacy=False), extra.set_state
    if isinstance(extra, np.random.Generator):
        return lambda: extra.bit_generator.state, lambda state: setattr(extra.bit_generator, "state", state)
    if type(extra) is dict:
        return lambda: extra, lambda state: _replace_dict(extra, state)
    if type(extra) is list:
        return lambda: extra, lambda state: extra.__setitem__(slice(None), state)
    return None


def _replace_dict(live: dict[Any, Any], state: Mapping[Any, Any]) -> None:
    live.clear()
    live.update(state)


def to_leaf(value: object) -> Raw | Tagged | None:
    """The codec's hook for what belongs to torch."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:  # it would come back as another tensor than the one that is trained
            return None
        if (
            isinstance(value, DTensor)
            or value.layout is not torch.strided
            or type(value) not in (torch.Tensor, nn.Parameter)
        ):
            return None  # refused by the codec, with its path
        dense = value.detach().cpu().contiguous()
        name = str(dense.dtype).removeprefix("torch.")
        if name not in ITEM_BYTES:
            return None
        return Raw(name, tuple(dense.shape), dense.reshape(-1).view(torch.uint8).numpy())
    if isinstance(value, torch.Size):
        return Tagged("torch.Size", list(value))
    if isinstance(value, torch.dtype):
        return Tagged("torch.dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Tagged("torch.device", str(value))
    return None


def from_leaf(value: Raw | Tagged) -> object:
    """Inverse of ``to_leaf``. Raises ``Corrupt`` for names that torch does not know."""
    if isinstance(value, Raw):
        if value.dtype not in ITEM_BYTES:
            raise Corrupt(f"a tensor of dtype {value.dtype!r} among the values")
        flat = torch.from_numpy(value.data.copy()).view(getattr(torch, value.dtype))
        return flat.reshape(value.shape)
    if value.tag == "torch.Size" and isinstance(value.value, list):
        return torch.Size(value.value)
    if value.tag == "torch.dtype" and value.value in ITEM_BYTES:
        return getattr(torch, str(value.value))
    if value.tag == "torch.device" and isinstance(value.value, str):
        return torch.device(value.value)
    raise Corrupt(f"a value of unknown kind {value.tag!r}")
