"""A loader is left at any place of any pass, and another one like it goes on there: same batches, same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from holdfast import Batches
from holdfast.hooks.batches import Followed
from holdfast.snapshot.codec import decode, encode
from holdfast.snapshot.state import from_leaf, to_leaf
from holdfast.snapshot.streams import random_state, set_random_state
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

PASSES = 3


class Rows(Dataset[torch.Tensor]):
    """Rows that are stirred when they are loaded. *loaded* counts them."""

    def __init__(self, stirred: bool = True) -> None:
        self.stirred, self.loaded = stirred, 0

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded += 1
        return torch.tensor([float(index)]) + (torch.rand(1) if self.stirred else 0)


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.rand(10))


class Own:
    """A loader that knows its position, of unknown length."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 5:
            self.at += 1
            yield torch.tensor(self.at)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def _distributed() -> DataLoader[Any]:
    rows = Rows()
    return DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, num_replicas=2, rank=1, seed=3))


def _accelerated() -> Any:
    accelerate = pytest.importorskip("accelerate")
    rows = Rows(stirred=False)
    drawn = RandomSampler(rows, generator=torch.Generator().manual_seed(4))
    return accelerate.Accelerator(cpu=True).prepare(DataLoader(rows, batch_size=2, sampler=drawn))


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Rows(), batch_size=3, shuffle=True),
    "in order": lambda: DataLoader(Rows(), batch_size=4),
    "of its own generator": lambda: DataLoader(
        Rows(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(9)
    ),
    "distributed": _distributed,
    "one by one": lambda: DataLoader(Rows(), batch_size=None, shuffle=True),
    "stream": lambda: DataLoader(Stream(), batch_size=3),
    "list": lambda: [torch.tensor(i) for i in range(4)],
    "own": Own,
    "accelerated": _accelerated,
}


def _batches(kind: str) -> Batches:
    batches = Batches(LOADERS[kind]())
    if kind == "accelerated":
        from holdfast.hooks.accelerate import _rest

        batches.skip_with(_rest)  # as holdfast.accelerated does
    return batches


def _train(batches: Batches, passes: range, leave: int | None = None) -> tuple[list[Any], Any]:
    """What a training loop sees; and, once it has had *leave* batches, all there is to go on from."""
    seen: list[Any] = []
    for number in passes:
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(number)
        for batch in batches:
            seen.append((batches.epoch, batch.flatten().tolist() if batch.ndim else batch.item(), torch.rand(1).item()))
            if len(seen) == leave:
                return seen, (_packed(batches.state_dict()), random_state())
    return seen, None


def _packed(state: dict[str, Any]) -> Any:
    """As it comes back from a snapshot."""
    return decode(encode(state, "state", to_leaf).to_bytes(), from_leaf)


@pytest.mark.parametrize("kind", LOADERS)
def test_it_goes_on_from_any_place(kind: str) -> None:
    torch.manual_seed(1)
    whole, _ = _train(_batches(kind), range(PASSES))
    for place in range(1, len(whole) + 1):
        torch.manual_seed(1)
        seen, (position, random) = _train(_batches(kind), range(PASSES), place)
        torch.manual_seed(100 + place)
        batches = _batches(kind)
        batches.load_state_dict(position)
        set_random_state(random)
        rest, _ = _train(batches, range(batches.epoch, PASSES))
        assert seen + rest == whole, place


def test_what_was_handed_out_is_not_loaded_again() -> None:
    batches = Batches(DataLoader(rows := Rows(), batch_size=2, shuffle=True))
    _, (position, _) = _train(batches, range(1), 4)
    rows.loaded = 0
    other = Batches(DataLoader(rows, batch_size=2, shuffle=True))
    other.load_state_dict(position)
    assert len(list(other)) == 2
    assert rows.loaded == 3


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(), batch_size=2), Own])
def test_who_fetches_ahead_gets_that_batch_again(make: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    followed = Followed(make(), ahead=True)
    iterator = iter(followed)
    batches = [next(iterator) for _ in range(3)]
    torch.manual_seed(2)
    other = Followed(make(), ahead=True)
    other.resume(_packed(followed.position()))
    assert torch.equal(next(iter(other)), batches[-1])


def test_a_position_that_was_not_reached_yet_is_the_one_that_is_said() -> None:
    batches = Batches(DataLoader(Rows(), batch_size=2))
    assert not batches.state_dict()["begun"]
    _, (position, _) = _train(batches, range(1), 2)
    other = Batches(DataLoader(Rows(), batch_size=2))
    other.load_state_dict(position)
    assert other.state_dict() == position


def test_all_else_is_the_loaders_own() -> None:
    batches = Batches(DataLoader(Rows(), batch_size=2))
    assert (len(batches), batches.batch_size) == (6, 2)
    with pytest.raises(AttributeError):
        batches.no_such_name  # noqa: B018
