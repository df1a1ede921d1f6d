"""The demo's data: real text, dealt out without overlap, and continued exactly from any position."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from holdfast.errors import ConfigError
from holdfast.ops.demo.text import TextLoader, read_corpus
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

CONTEXT, BATCH = 4, 3
BLOCKS = 25
CORPUS = torch.arange(BLOCKS * CONTEXT + 1, dtype=torch.uint8)


def loader(*, rank: int = 0, world: int = 1, seed: int = 1) -> TextLoader:
    return TextLoader(CORPUS, context=CONTEXT, batch=BATCH, seed=seed, rank=rank, world=world)


def blocks_of(inputs: Tensor) -> list[int]:
    """Which blocks of the corpus a batch holds; its bytes count upward, so that the first one says."""
    return [int(row[0]) // CONTEXT for row in inputs]


def test_the_corpus_is_the_standard_library_and_always_the_same() -> None:
    corpus = read_corpus(100_000)
    assert corpus.dtype == torch.uint8
    assert len(corpus) == 100_000
    assert torch.equal(corpus, read_corpus(100_000))
    first = min(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert bytes(corpus.tolist()).startswith(first.read_bytes()[:1000])


def test_a_python_without_sources_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(ConfigError, match="has no standard library sources"):
        read_corpus()


def test_a_text_too_short_for_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="25 blocks of 4 bytes; one global batch needs 27"):
        loader(world=9)


def test_targets_are_one_byte_ahead_of_inputs() -> None:
    inputs, targets = next(loader())
    assert inputs.shape == targets.shape == (BATCH, CONTEXT)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


@given(taken=st.integers(0, 40), world=st.integers(1, 3), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_a_state_taken_anywhere_continues_the_same(taken: int, world: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world - 1))
    original = loader(rank=rank, world=world, seed=seed)
    for _ in range(taken):
        next(original)
    state = json.loads(json.dumps(original.state_dict()))  # plain values: what any snapshot can hold
    other = loader(rank=rank, world=world, seed=0)
    for _ in range(data.draw(st.integers(0, 20))):
        next(other)
    other.load_state_dict(state)
    assert other.state_dict() == original.state_dict()
    for _ in range(2 * BLOCKS // (BATCH * world)):
        assert all(torch.equal(one, two) for one, two in zip(next(original), next(other), strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_are_disjoint_and_cover_an_epoch(world: int) -> None:
    loaders = [loader(rank=rank, world=world) for rank in range(world)]
    batches = BLOCKS // (BATCH * world)
    seen = [block for one in loaders for _ in range(batches) for block in blocks_of(next(one)[0])]
    assert len(seen) == len(set(seen)) == batches * BATCH * world
    assert set(seen) <= set(range(BLOCKS))


def test_the_world_size_changes_who_reads_a_block_but_not_when() -> None:
    alone, pair = loader(world=1), [loader(rank=rank, world=2) for rank in range(2)]
    together = [block for one in pair for block in blocks_of(next(one)[0])]
    assert [block for _ in range(2) for block in blocks_of(next(alone)[0])] == together


def test_every_epoch_and_every_seed_shuffles_anew() -> None:
    def epochs(seed: int) -> list[list[int]]:
        one = loader(seed=seed)
        return [[block for _ in range(BLOCKS // BATCH) for block in blocks_of(next(one)[0])] for _ in range(2)]

    first, second = epochs(seed=1)
    assert first != second
    assert epochs(seed=1) == [first, second]
    assert epochs(seed=2)[0] not in (first, second)
    assert first != sorted(first)


def test_dropout_does_not_change_the_order_of_the_data() -> None:
    one, other = loader(), loader()
    torch.rand(1000)
    for _ in range(BLOCKS):
        assert torch.equal(next(one)[0], next(other)[0])
        torch.rand(7)
