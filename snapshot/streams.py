"""The state of random generators: captured, put back, and made anew for ranks that there were not before."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

_ROOM_BYTES: Final = 16 << 10


class RandomState:
    """The state of every global random generator of this process, as it was when this was made; drawn from none of them.

    All of it is this object's own, so it may be made into values later, on any thread: that takes as long again.
    """

    __slots__ = ("_cuda", "_numpy", "_python", "_torch")

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)
        self._torch = torch.default_generator.get_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]

    @property
    def nbytes(self) -> int:
        """More than its arrays take, encoded."""
        return _ROOM_BYTES + 2 * sum(state.nbytes for state in self._cuda)

    def tree(self) -> dict[str, Any]:
        """As ``codec.encode`` and ``set_random_state`` take it."""
        return {
            "python": _python_tree(self._python),
            "numpy": self._numpy,
            "torch": self._torch.numpy(),
            "cuda": self._cuda,
        }


def random_state() -> dict[str, Any]:
    """The state of every global random generator now, for ``set_random_state``."""
    return RandomState().tree()


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what ``RandomState.tree`` returned. CUDA devices beyond those that were captured keep their streams."""
    set_python_state(random, state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.from_numpy(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(generator, device)


def python_state(source: Any) -> list[Any]:
    """The state of a ``random.Random``, or of the module itself."""
    return _python_tree(source.getstate())


def _python_tree(state: tuple[Any, ...]) -> list[Any]:
    version, words, gauss = state
    return [version, np.frombuffer(array("I", words), np.uint32), gauss]


def set_python_state(source: Any, state: Sequence[Any]) -> None:
    """Put back what ``python_state`` returned."""
    version, words, gauss = state
    source.setstate((version, tuple(words.tolist()), gauss))


def stream_digests(state: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each part of ``RandomState.tree``: where all ranks say the same, they draw the same numbers."""
    return {part: hashlib.blake2b(_bits(value), digest_size=16).hexdigest() for part, value in state.items()}


def fresh_streams(state: Mapping[str, Any], parts: Sequence[str], purpose: str) -> dict[str, Any]:
    """*state*, with streams of their own for these *parts*: seeded with the SHA-256 of *purpose* and the part's name.

    Args:
        state: as ``RandomState.tree`` returns it, of some rank.
        parts: keys of it.
        purpose: text that tells this rank, and this restore, from any other.
    """
    made = dict(state)
    for part in parts:
        seed = int.from_bytes(hashlib.sha256(f"{purpose}/{part}".encode()).digest()[:8], "little")
        if part == "python":
            made[part] = python_state(random.Random(seed))  # noqa: S311 - nothing secret is drawn from it
        elif part == "numpy":
            made[part] = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).get_state(legacy=False)
        elif part == "torch":
            made[part] = torch.Generator().manual_seed(seed).get_state().numpy()
        else:
            made[part] = [_reseeded(held, seed + device) for device, held in enumerate(state[part])]
    return made


def _reseeded(held: torch.Tensor, seed: int) -> torch.Tensor:
    """A CUDA generator's state with another seed, from its beginning. The layout is torch's: seed, then offset, 8 bytes each."""
    words = torch.zeros_like(held)
    words[:8] = torch.from_numpy(np.array([seed & (1 << 63) - 1], np.int64).view(np.uint8))
    return words


def _bits(value: Any) -> bytes:
    """All that tells one generator's state from another's."""
    if isinstance(value, torch.Tensor):
        return bytes(value.numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, Mapping):
        return b"".join(f"{key}:".encode() + _bits(value[key]) for key in sorted(value))
    if isinstance(value, list | tuple):
        return b"".join(_bits(one) + b"," for one in value)
    return repr(value).encode()
