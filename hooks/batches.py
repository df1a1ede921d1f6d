"""A data loader that knows its position, and finds it again: the same batches, in the same order, from the next one on.

torch's loaders do not remember how far they are, and draw the order of a shuffled pass from a random generator when the
pass begins. So what is kept is the state of all generators at that moment, and the number of batches handed out since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..snapshot.codec import decode, encode
from ..snapshot.state import Stateful, from_leaf, to_leaf
from ..snapshot.streams import random_state, set_random_state

Skip = Callable[[Any, int], Iterator[Any]]
"""Given a loader and a number, an iterator of its next pass that stands after so many batches. Whatever it draws at random
to get there must be drawn when it is made."""


class Followed:
    """Wraps a loader: goes through it as ever, knows its position, and finds it again. All else is the loader's own.

    A plain ``torch.utils.data.DataLoader`` skips what was handed out without loading it; any other loader is gone through
    again. A loader with ``state_dict`` and ``load_state_dict`` of its own is left to find its position itself.

    Attributes:
        epoch: number of the pass that is under way, or that begins next after a restore; the first is 0.
    """

    epoch: int

    def __init__(self, loader: Any, *, ahead: bool = False) -> None:
        """
        Args:
            loader: any iterable; DataLoaders with samplers, generators and workers included.
            ahead: whoever goes through it has always fetched one batch more than it has used, which must come again.
        """
        self.epoch = 0
        self._loader, self._ahead = loader, ahead
        self._skip: Skip = _skip
        self._own = loader if isinstance(loader, Stateful) else None
        self._behind: Any = None  # what a loader with a state of its own said before the last batch
        self._drawn = 0
        self._begun = False
        self._start = b""
        self._resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            self.epoch += self._begun
            self._drawn = 0
            self._start = self._capture()
            iterator = iter(self._loader)
        else:
            iterator = self._again(resumed)
        self._begun, self._behind = True, None
        return self._hand_out(iterator)

    def _hand_out(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while self.go_on():
            if self._own is not None and self._ahead:
                self._behind = self._own.state_dict()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._drawn += 1
            yield batch

    def go_on(self) -> bool:
        """Called before each batch is fetched; the pass ends if it says no. For subclasses."""
        return True

    def _again(self, resumed: dict[str, Any]) -> Iterator[Any]:
        """The pass that *resumed* was in, from where it was. Draws nothing from the generators as they are now."""
        self.epoch, self._drawn, self._start = resumed["epoch"], resumed["drawn"], resumed["start"]
        if self._own is not None:
            return iter(self._loader)
        now = random_state()
        self._set(self._start)
        iterator = self._skip(self._loader, self._drawn)
        set_random_state(now)
        for generator, state in zip(_generators(self._loader), resumed["generators"], strict=False):
            generator.set_state(state)
        return iterator

    def skip_with(self, skip: Skip) -> None:
        """Skip batches in this way from now on, and ask the loader for no state of its own."""
        self._skip, self._own = skip, None

    # -- the position ------------------------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """Where it stands, in plain values and tensors; of fixed size but for what a loader of its own says."""
        if self._resumed is not None:
            return self._resumed
        own, drawn = None, self._drawn
        if self._own is not None:
            own = self._own.state_dict() if self._behind is None else self._behind
        elif self._ahead and drawn:
            drawn -= 1
        return {
            "epoch": self.epoch,
            "begun": self._begun,
            "drawn": drawn,
            "start": self._start,
            "generators": [generator.get_state() for generator in _generators(self._loader)],
            "own": own,
        }

    def resume(self, position: dict[str, Any]) -> None:
        """Begin the next pass there."""
        self.epoch, self._resumed = position["epoch"], position if position["begun"] else None
        if self._own is not None and position["own"] is not None:
            self._own.load_state_dict(position["own"])

    def _capture(self) -> bytes:
        """The state of everything that may decide on the order of a pass, as bytes that hold nothing to be executed."""
        tree = {
            "random": random_state(),
            "generators": [generator.get_state() for generator in _generators(self._loader)],
            "epochs": [_epoch(sampler) for sampler in _samplers(self._loader)],
        }
        return encode(tree, "start of a pass", to_leaf).to_bytes()

    def _set(self, start: bytes) -> None:
        """Inverse of ``_capture``. Raises ``Corrupt``."""
        tree: Any = decode(start, from_leaf)
        set_random_state(tree["random"])
        for generator, state in zip(_generators(self._loader), tree["generators"], strict=False):
            generator.set_state(state)
        for sampler, epoch in zip(_samplers(self._loader), tree["epochs"], strict=False):
            if epoch is not None:
                sampler.set_epoch(epoch)


class Batches(Followed):
    """A loader that may lie among the ``extras`` of a ``Checkpointer``::

        batches = holdfast.Batches(DataLoader(dataset, batch_size=32, shuffle=True))
        ckpt = holdfast.Checkpointer(model, optimizer, {"batches": batches})
        step = ckpt.restore() or 0
        for epoch in range(batches.epoch, epochs):
            for batch in batches:
                ...

    After a restore the first pass hands out what is left of the one that was interrupted, which may be nothing.
    """

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as ``position``."""
        return self.position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next pass there, as ``resume``."""
        self.resume(state)


# -- what a loader is made of --------------------------------------------------------------------------------------------


def _parts(loader: Any) -> list[Any]:
    """The loader and all samplers in it, each once: samplers may lie in batch samplers, and those in others."""
    found: list[Any] = []
    open_ = [loader]
    while open_:
        part = open_.pop(0)
        if part is not None and all(part is not other for other in found):
            found.append(part)
            open_ += [getattr(part, "batch_sampler", None), getattr(part, "sampler", None)]
    return found


def _generators(loader: Any) -> list[torch.Generator]:
    """Random generators of the loader's own, each once."""
    found = [getattr(part, "generator", None) for part in _parts(loader)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _samplers(loader: Any) -> list[Any]:
    """What is told the number of the pass."""
    return [part for part in _parts(loader) if callable(getattr(part, "set_epoch", None))]


def _epoch(sampler: Any) -> int | None:
    """The number of the pass that *sampler* was told last, if it says so."""
    for name in ("epoch", "iteration"):
        number = getattr(sampler, name, None)
        if type(number) is int:
            return number
    return None


# -- skipping ------------------------------------------------------------------------------------------------------------

_KEPT: Final = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "pin_memory_device", "in_order",
)  # fmt: skip


class _Rest:
    """What a sampler yields, from some place on; for one pass.

    A sampler may draw its order when it is asked for the first time, and a loader draws a seed for its workers before it
    asks. So the place is found when the loader asks, or else by ``find``.
    """

    def __init__(self, sampler: Iterable[Any], count: int) -> None:
        self._sampler, self._count = sampler, count
        self._iterator: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        self._iterator = iter(self._sampler)
        return self

    def __next__(self) -> Any:
        self.find()
        return next(self._iterator)

    def find(self) -> None:
        for _ in islice(self._iterator, self._count):
            pass
        self._count = 0


def _skip(loader: Any, count: int) -> Iterator[Any]:
    if not count or type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        again: Iterator[Any] = iter(loader)
        for _ in islice(again, count):
            pass
        return again
    kept: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT}
    batched = loader.batch_sampler
    rest = _Rest(loader.sampler if batched is None else batched, count)
    kept |= {"batch_size": None, "sampler": rest} if batched is None else {"batch_sampler": rest}
    iterator = iter(DataLoader(loader.dataset, **kept))
    rest.find()
    return iterator
