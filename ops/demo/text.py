"""Real text that every machine has, and a loader over it that can be stopped and continued at any batch.

The text is the Python standard library's own source. The loader cuts it into blocks, shuffles them anew in every
epoch, and deals each global batch out to the ranks in equal, disjoint parts.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from ...errors import ConfigError

CORPUS_BYTES: Final = 2 << 20
_NOT_THE_LIBRARY: Final = frozenset({"__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"})


def read_corpus(limit_bytes: int = CORPUS_BYTES) -> Tensor:
    """The first *limit_bytes* of the standard library's ``.py`` files, in the order of their sorted paths.

    Returns:
        ``uint8[n]``, ``n <= limit_bytes``; the same on every rank that runs the same Python.

    Raises:
        ConfigError: this Python came without the sources of its standard library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in _sources(folder):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if not text:
        raise ConfigError(f"no .py files in {folder}: this Python has no standard library sources to train on")
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


def _sources(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_THE_LIBRARY)
        yield from (Path(here, name) for name in sorted(files) if name.endswith(".py"))


class TextLoader:
    """Endless ``(inputs, targets)`` batches of one rank, both ``int64[batch, context]``; targets are one byte ahead.

    The order of blocks in an epoch follows from (seed, epoch) alone, so that the state is three integers: ``epoch``,
    ``position`` (blocks that all ranks together have consumed in this epoch) and ``seed``. The last blocks of an
    epoch, too few for a global batch, are left out. State of one world size continues in another.
    """

    def __init__(self, corpus: Tensor, *, context: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """*corpus* is ``uint8[n]``, read, never modified. Raises ``ConfigError`` if it has no whole global batch."""
        self._corpus = corpus
        self._context, self._batch, self._rank, self._world = context, batch, rank, world
        self._blocks = (len(corpus) - 1) // context
        if self._blocks < batch * world:
            raise ConfigError(
                f"the text has {self._blocks} blocks of {context} bytes; one global batch needs {batch * world}"
            )
        self._epoch, self._position, self._seed = 0, 0, seed
        self._order = self._shuffled()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._position + self._batch * self._world > self._blocks:
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        first = self._position + self._rank * self._batch
        starts = self._order[first : first + self._batch] * self._context
        self._position += self._batch * self._world
        text = self._corpus[starts[:, None] + torch.arange(self._context + 1)].long()
        return text[:, :-1], text[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands, before the next batch. The same on every rank."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where *state* was taken: the next batch is the one that would have been next there."""
        self._epoch, self._position, self._seed = int(state["epoch"]), int(state["position"]), int(state["seed"])
        self._order = self._shuffled()

    def _shuffled(self) -> Tensor:
        # Its own generator: the order of the data must not depend on how much dropout was drawn before.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._epoch) % (1 << 63))
        return torch.randperm(self._blocks, generator=generator)
