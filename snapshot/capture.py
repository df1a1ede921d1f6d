"""Copying the live state into a slot: eagerly what may change any moment, lazily what only an optimizer step changes.

Between two optimizer steps parameters and optimizer state stand still (DataStates-LLM, HPDC'24), so they are copied in
the background while the next forward and backward run. Three calls, in order, on the training thread::

    Capture.start    note versions; copy the eager part; begin the lazy copies
    Capture.fence    before anything mutates: wait for the copies (CUDA: make the stream wait)
    Capture.torn     which tensors were touched in between, by their version counters

A tensor that merely gets other storage in between (``p.data = …``) is not torn: what is copied is the storage it had.

Known limit: a write through ``tensor.data`` does not count up the version, so such a write inside the window is not seen.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

import torch

from ..crashpoints import reach
from ..errors import DeadlinePassed
from .arena import Slot
from .layout import Layout, Slice
from .state import Item, Survey

# Larger contiguous tensors are copied by the C library, which streams past the cache: 1.2 times the speed of
# torch's copy on two threads, and nearly twice on one. For small ones a single foreach call saves the round trips.
_STREAM_FROM_BYTES: Final = 1 << 20
_PIECE_BYTES: Final = 64 << 20  # between pieces, the copying thread can be seen to make progress

_version = attrgetter("_version")


class Parts:
    """Rows of live tensors and the byte of the image where each goes, contiguous there and 64-byte aligned."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        self.parts = tuple(parts)
        streamed = [t.nbytes >= _STREAM_FROM_BYTES and t.device.type == "cpu" and t.is_contiguous() for t, _ in parts]
        self.streamed = [part for part, yes in zip(parts, streamed, strict=True) if yes]
        self.small = [part for part, yes in zip(parts, streamed, strict=True) if not yes]
        self.small_tensors = [tensor for tensor, _ in self.small]
        self._views: dict[int, list[torch.Tensor]] = {}

    def views(self, slot: Slot) -> list[torch.Tensor]:
        """Where the small parts go: tensors over the slot's image, made once per slot, since that takes longer than
        filling them."""
        views = self._views.get(slot.inode)
        if views is None:
            views = self._views[slot.inode] = [view_of(slot, tensor, offset) for tensor, offset in self.small]
        return views

    def forget(self, slot: Slot) -> None:
        """Let go of the slot's memory."""
        self._views.pop(slot.inode, None)


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """A layout tied to the live tensors whose bytes it places.

    Attributes:
        text: the layout's text.
        lazy, eager: what is copied when.
        watched, names, addresses: the live tensors behind the lazy copies, and where they lay when bound.
    """

    layout: Layout
    text: bytes
    survey: Survey
    lazy: Parts
    eager: Parts
    watched: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    addresses: tuple[int, ...]


def bind(layout: Layout, survey: Survey, pinned_eager: Iterable[str] = ()) -> Binding:
    """Tie *layout* to the live tensors of *survey*. Names in *pinned_eager* are copied eagerly, whatever they are.

    CPU-resident scalars of a model on another device (AdamW's ``step``) are eager too: their copies cannot be ordered
    with the other device's stream.
    """
    items = {item.slice.name: item for item in survey.items}
    always_eager = frozenset(pinned_eager)
    devices = {item.tensor.device.type for item in survey.items if item.lazy}
    lazy: list[tuple[torch.Tensor, int]] = []
    eager: list[tuple[torch.Tensor, int]] = []
    watched: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for placed in layout.placed:
            item = items[placed.slice.name]
            if placed.slice.nbytes == 0:
                continue
            mixed = len(devices) > 1 and item.tensor.device.type == "cpu"
            is_lazy = item.lazy and not mixed and placed.slice.name not in always_eager
            (lazy if is_lazy else eager).append((_rows(item, placed.slice), placed.offset))
            if is_lazy:
                watched[placed.slice.name] = item.tensor
    tensors = tuple(watched.values())
    return Binding(
        layout, layout.to_text(), survey, Parts(lazy), Parts(eager), tensors, tuple(watched), _addresses(tensors)
    )


def _rows(item: Item, part: Slice) -> torch.Tensor:
    """The live rows that *part* describes, without autograd."""
    local = item.tensor.detach()
    if not part.extent or part.extent == item.slice.extent:
        return local
    return local.narrow(0, part.start[0] - item.slice.start[0], part.extent[0])


def _addresses(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(torch.Tensor.data_ptr, tensors))


def rebound(binding: Binding) -> bool:
    """Whether some live tensor got other storage (``p.data = …``), so that the binding would copy the old one."""
    return _addresses(binding.watched) != binding.addresses


class Copier(ABC):
    """Copies the lazy part of a binding into a slot, in the background. One copy at a time."""

    @abstractmethod
    def start(self, binding: Binding, slot: Slot, done: Callable[[float], None]) -> None:
        """Begin. *done* is called on another thread, with the seconds it took, once every byte has landed."""

    @abstractmethod
    def fence(self, timeout_s: float) -> None:
        """Return when the live tensors may be mutated. Raises ``DeadlinePassed``; then the copy is torn."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a copy is under way."""

    def forget(self, slot: Slot) -> None:
        """*slot* is about to be unmapped. Nothing is being copied into it."""

    def close(self) -> None:
        """End the background work; the copy under way is finished first."""


class CpuCopier(Copier):
    """A background thread; neither of the two ways in which it copies holds the GIL."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._landed = threading.Event()
        self._landed.set()
        # A bare queue: handing over work costs the training thread a tenth of what an executor's future does.
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="holdfast-copy", daemon=True)
        self._thread.start()

    def start(self, binding: Binding, slot: Slot, done: Callable[[float], None]) -> None:
        self._landed.clear()
        self._error = None
        self._work.put(lambda: self._copy(binding, slot, done))

    def fence(self, timeout_s: float) -> None:
        if not self._landed.wait(timeout_s):
            raise DeadlinePassed(f"the copy into the slot did not end within {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    @property
    def busy(self) -> bool:
        return not self._landed.is_set()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _copy(self, binding: Binding, slot: Slot, done: Callable[[float], None]) -> None:
        start_s = time.perf_counter()
        try:
            copy_now(binding.lazy, slot, inside=lambda: reach("capture.inside-copy"))
            reach("capture.copied")
        except Exception as error:  # noqa: BLE001 - told by the fence; without "done" the agent never records the image
            self._error = error
            return
        finally:
            self._landed.set()
        done(time.perf_counter() - start_s)


def copy_now(parts: Parts, slot: Slot, inside: Callable[[], None] = lambda: None) -> None:
    """Copy every part into the slot's image, on this thread, without the GIL. *inside* is called half-way."""
    base = slot.image.ctypes.data
    for tensor, offset in parts.streamed:
        source = tensor.data_ptr()
        for piece in range(0, tensor.nbytes, _PIECE_BYTES):
            ctypes.memmove(base + offset + piece, source + piece, min(_PIECE_BYTES, tensor.nbytes - piece))
    inside()
    if parts.small:
        with torch.no_grad():
            torch._foreach_copy_(parts.views(slot), parts.small_tensors)


def view_of(slot: Slot, like: torch.Tensor, offset: int) -> torch.Tensor:
    """The bytes at *offset* of the slot's image, as a tensor of the shape and dtype of *like*, row-major."""
    flat = torch.from_numpy(slot.image[offset : offset + like.nbytes])
    return flat.view(like.dtype).view(like.shape)


@dataclass(slots=True)
class Capture:
    """One snapshot's copy, from ``start`` to the verdict of ``torn``."""

    binding: Binding
    copier: Copier
    versions: list[int] = field(default_factory=list)

    def start(self, slot: Slot, done: Callable[[float], None]) -> None:
        """Copy the eager tensors now and begin with the lazy ones. The slot must be open for this step already."""
        self.versions = list(map(_version, self.binding.watched))
        copy_now(self.binding.eager, slot)
        self.copier.start(self.binding, slot, done)

    def fence(self, timeout_s: float) -> None:
        """Wait until the optimizer may mutate what is being copied. Raises ``DeadlinePassed``."""
        self.copier.fence(timeout_s)

    def torn(self) -> list[str]:
        """The tensors that were mutated since ``start``. Call after ``fence``, on the training thread.

        Only there is the answer certain: an operation bumps a version after it has written, so a version read on another
        thread can miss a write that is under way.
        """
        versions = list(map(_version, self.binding.watched))
        if versions == self.versions:
            return []
        pairs = zip(self.binding.names, versions, self.versions, strict=True)
        return [name for name, now, before in pairs if now != before]


def copier_for(survey: Survey) -> Copier:
    """The copier that fits where the lazy tensors live."""
    if any(item.lazy and item.tensor.device.type == "cuda" for item in survey.items):
        from .cuda import CudaCopier

        return CudaCopier()
    return CpuCopier()
