"""Copying the live state into a slot: eagerly what may change any moment, lazily what only an optimizer step changes.

Between two optimizer steps parameters and optimizer state stand still (DataStates-LLM, HPDC'24), so they are copied in
the background while the next forward and backward run. Three calls, in order, on the training thread::

    Capture.start    note versions; copy the eager part; begin the lazy copies
    Capture.fence    before anything mutates: wait for the copies (CUDA: make the stream wait)
    Capture.torn     which tensors were touched in between, by their version counters

A tensor that merely gets other storage in between (``p.data = …``) is not torn: what is copied is the storage it had.

A write through ``tensor.data`` does not count up the version. On the CPU samples, taken before and compared with what was
copied, notice such writes as long as they touch the sampled bytes; on CUDA devices they go unnoticed.
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

import numpy as np
import numpy.typing as npt
import torch

from ..crashpoints import reach
from ..erasure.kernel import crc32c
from ..errors import DeadlinePassed, StateRefused
from .arena import Slot
from .frozen import Filling, Frozen, Part
from .layout import Layout, Slice
from .record import FREE_WORD
from .state import Item, Survey
from .unchanged import Unchanged
from .vectored import WORD_BYTES, Regions, Words, words_of

# Larger contiguous tensors are copied by the C library, which streams past the cache: as fast on one thread as torch's
# copy on two. Smaller ones go all in one call, which saves the round trips.
_STREAM_FROM_BYTES: Final = 1 << 20
_SAMPLE_BYTES: Final = 64
# A cold read costs the training thread more than a microsecond, so that many tensors are sampled per snapshot, others next time.
_SAMPLED_AT_ONCE: Final = 16
# CPU tensors of up to so many bytes are copied at once: looking twice at a version costs more than that.
_TINY_BYTES: Final = 64
_PIECE_BYTES: Final = 64 << 20  # between pieces, the copying thread can be seen to make progress

_version = attrgetter("_version")


class Parts:
    """Rows of live tensors and the byte of the image where each goes, contiguous there and 64-byte aligned.

    Four ways of copying: large contiguous CPU tensors one by one, small ones all in one call, tiny ones all in another, all
    others by torch.
    """

    def __init__(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        plain = [(t, o) for t, o in parts if t.device.type == "cpu" and t.is_contiguous()]
        self._alive = [tensor for tensor, _ in parts]
        self.streamed: list[tuple[int, int, int]] = []
        small: list[tuple[int, int, int]] = []
        tiny: list[tuple[int, int, int]] = []
        for tensor, offset in plain:
            address, nbytes = tensor.data_ptr(), tensor.nbytes
            words = nbytes <= _TINY_BYTES and (address | nbytes) % WORD_BYTES == 0
            kind = self.streamed if nbytes >= _STREAM_FROM_BYTES else tiny if words else small
            kind.append((address, offset, nbytes))
        self._small = Regions([address for address, _, _ in small], [nbytes for _, _, nbytes in small])
        self._small_offsets = np.array([offset for _, offset, _ in small], np.uint64)
        self._tiny = Words([(address, nbytes) for address, _, nbytes in tiny]) if tiny else None
        self._tiny_places = words_of((offset, nbytes) for _, offset, nbytes in tiny)
        self.others = [(t, o) for t, o in parts if t.device.type != "cpu" or not t.is_contiguous()]
        self.other_tensors = [tensor for tensor, _ in self.others]
        self._views: dict[int, list[torch.Tensor]] = {}

    def copy_small(self, image: npt.NDArray[np.uint8]) -> None:
        """Copy all small and tiny parts into *image*."""
        if len(self._small):
            base = np.uint64(image.ctypes.data)
            self._small.moved_to(self._small_offsets + base).copy_from(self._small)
        if self._tiny is not None:
            image.view(np.uint32)[self._tiny_places] = self._tiny.read()

    def views(self, slot: Slot) -> list[torch.Tensor]:
        """Where the others go: tensors over the slot's image, made once per slot, since that takes longer than
        filling them."""
        views = self._views.get(slot.inode)
        if views is None:
            views = self._views[slot.inode] = [view_of(slot, tensor, offset) for tensor, offset in self.others]
        return views

    def forget(self, slot: Slot) -> None:
        """Let go of the slot's memory."""
        self._views.pop(slot.inode, None)


class Samples:
    """A few bytes from the middle of each of many tensors: cheap to take, and telling when something has been changed.

    Writes through ``tensor.data`` do not count up versions; swapping averaged weights in and out is written that way. With
    more than ``_SAMPLED_AT_ONCE`` tensors, each *turn* (any number that grows with the snapshots) samples its share of them.
    """

    def __init__(self, pieces: Sequence[tuple[str, int, int, int]], alive: Sequence[torch.Tensor]) -> None:
        """*pieces*: name, address of the tensor's bytes, byte in the image (or 0), number of bytes. *alive*: their tensors,
        whose storage of now is kept, whatever they get later."""
        self._alive = [tensor.detach() for tensor in alive]
        turns = -(-len(pieces) // _SAMPLED_AT_ONCE)
        self._shares = [_Share.of(pieces[turn::turns]) for turn in range(turns)]

    def take(self, turn: int) -> npt.NDArray[np.uint8] | None:
        """The samples as they are in the live tensors; ``uint8[tensors, 64]``, short ones padded with zeros, borrowed until
        the next call. None if there is nothing to sample."""
        share = self._share(turn)
        if share is None:
            return None
        share.into.copy_from(share.sources)
        return share.taken

    def altered(self, turn: int, base: int) -> list[str]:
        """The tensors whose samples in the image at address *base* are not what *turn* took."""
        share = self._share(turn)
        if share is None:
            return []
        copied = np.zeros_like(share.taken)
        places = _rows_of(copied)
        share.into.moved_to(places).copy_from(share.sources.moved_to(share.offsets + np.uint64(base)))
        return [share.names[row] for row in np.flatnonzero((copied != share.taken).any(axis=1))]

    def _share(self, turn: int) -> _Share | None:
        return self._shares[turn % len(self._shares)] if self._shares else None


@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """The tensors that one turn samples: their names, where the sampled bytes lie, where in the image, where they go."""

    names: list[str]
    sources: Regions
    offsets: npt.NDArray[np.uint64]
    taken: npt.NDArray[np.uint8]
    into: Regions

    @classmethod
    def of(cls, pieces: Sequence[tuple[str, int, int, int]]) -> _Share:
        middles = [max(nbytes - _SAMPLE_BYTES, 0) // 2 for _, _, _, nbytes in pieces]
        sources = Regions(
            [address + middle for (_, address, _, _), middle in zip(pieces, middles, strict=True)],
            [min(nbytes, _SAMPLE_BYTES) for _, _, _, nbytes in pieces],
        )
        offsets = np.array([p[2] + middle for p, middle in zip(pieces, middles, strict=True)], np.uint64)
        taken = np.zeros((len(pieces), _SAMPLE_BYTES), np.uint8)
        return cls([name for name, *_ in pieces], sources, offsets, taken, sources.moved_to(_rows_of(taken)))


def _rows_of(table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The address of each row."""
    return np.uint64(table.ctypes.data) + np.arange(len(table), dtype=np.uint64) * np.uint64(table.strides[0])


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """A layout tied to the live tensors whose bytes it places.

    Attributes:
        text: the layout's text.
        lazy, eager: what is copied when.
        staged: eager tensors on a CUDA device, and their copies there, which are among what is copied lazily.
        watched, names: the live tensors behind the lazy copies.
        places: where all live tensors lay when bound, and how.
        samples: of what is copied lazily here (CPU). shared: of what all ranks hold alike, whoever copies it.
        frozen: what need not be copied each time; in none of the others but the samples. None if there is nothing.
    """

    layout: Layout
    text: bytes
    survey: Survey
    lazy: Parts
    eager: Parts
    staged: tuple[list[torch.Tensor], list[torch.Tensor]]
    watched: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]
    samples: Samples
    shared: Samples
    frozen: Frozen | None


def bind(
    layout: Layout,
    survey: Survey,
    pinned_eager: Iterable[str] = (),
    shared: Iterable[str] = (),
    doubted: set[str] | None = None,
) -> Binding:
    """Tie *layout* to the live tensors of *survey*. Names in *pinned_eager* are copied eagerly, whatever they are; those in
    *doubted*, which grows, every time.

    Tiny CPU tensors (AdamW's ``step``) are eager, and so are all CPU tensors of a model on another device: their copies
    cannot be ordered with that device's stream. Eager tensors on the device are copied there, in the order of its stream:
    waiting for their bytes would be waiting for the step to end. *shared* names what all ranks hold alike.
    """
    items = {item.slice.name: item for item in survey.items}
    always_eager = frozenset(pinned_eager)
    devices = {item.tensor.device.type for item in survey.items if item.lazy}
    lazy: list[tuple[torch.Tensor, int]] = []
    eager: list[tuple[torch.Tensor, int]] = []
    staged: list[tuple[torch.Tensor, int]] = []
    frozen: list[Part] = []
    watched: dict[str, torch.Tensor] = {}
    doubted = set() if doubted is None else doubted
    copied_always = always_eager | doubted
    with torch.no_grad():
        for place, placed in enumerate(p for p in layout.placed if p.slice.nbytes):
            item = items[placed.slice.name]
            if item.frozen and placed.slice.name not in copied_always:
                now = not item.lazy or len(devices) > 1
                rows = _rows(item, placed.slice)
                frozen.append(Part(placed.slice.name, item.tensor, item.source, rows, placed.offset, place, now))
                continue
            small = item.tensor.device.type == "cpu" and (len(devices) > 1 or item.tensor.nbytes <= _TINY_BYTES)
            is_lazy = item.lazy and not small and placed.slice.name not in always_eager
            on_device = "cuda" in devices and item.tensor.device.type == "cuda"
            kind = lazy if is_lazy else staged if on_device else eager
            kind.append((_rows(item, placed.slice), placed.offset))
            if is_lazy:
                watched[placed.slice.name] = item.tensor
        copies = [torch.empty_like(tensor) for tensor, _ in staged]
    sampled = [
        *zip(watched, lazy, strict=True),
        *((part.name, (part.rows, part.offset)) for part in frozen if not part.eager),
    ]
    pieces = [(name, t.data_ptr(), offset, t.nbytes) for name, (t, offset) in sampled if _sampled(t)]
    alike = [(name, t.data_ptr(), 0, t.nbytes) for name in shared if _sampled(t := items[name].tensor)]
    return Binding(
        layout,
        layout.to_text(),
        survey,
        Parts([*lazy, *((copy, offset) for copy, (_, offset) in zip(copies, staged, strict=True))]),
        Parts(eager),
        ([tensor for tensor, _ in staged], copies),
        tuple(watched.values()),
        tuple(watched),
        _places(survey),
        Samples(pieces, [tensor for _, (tensor, _) in sampled]),
        Samples(alike, [items[name].tensor for name in shared]),
        Frozen(frozen, doubted) if frozen else None,
    )


def _sampled(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes > 0


def _rows(item: Item, part: Slice) -> torch.Tensor:
    """The live rows that *part* describes, without autograd."""
    local = item.tensor.detach()
    if not part.extent or part.extent == item.slice.extent:
        return local
    return local.narrow(0, part.start[0] - item.slice.start[0], part.extent[0])


def _places(survey: Survey) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((item.tensor.data_ptr(), item.tensor.stride()) for item in survey.items)


def rebound(binding: Binding) -> bool:
    """Whether some live tensor got other storage or strides (``p.data = …``), so that the binding would copy the old."""
    return _places(binding.survey) != binding.places


class Copier(ABC):
    """Copies the lazy part of a binding into a slot, in the background. One copy at a time."""

    @abstractmethod
    def start(self, binding: Binding, slot: Slot, after: Callable[[], None], done: Callable[[float], None]) -> None:
        """Begin. Once every byte has landed, on another thread, *after* is called before the fence lets anyone pass, then
        *done* with the seconds it took. Of what is frozen nothing is copied here."""

    @abstractmethod
    def fence(self, timeout_s: float) -> None:
        """Return when the live tensors may be mutated. Raises ``DeadlinePassed``; then the copy is torn."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a copy is under way."""

    def prepare(self, slot: Slot) -> None:
        """*slot* is mapped, and will be copied into. Takes its time."""

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

    def start(self, binding: Binding, slot: Slot, after: Callable[[], None], done: Callable[[float], None]) -> None:
        self._landed.clear()
        self._error = None
        self._work.put(lambda: self._copy(binding, slot, after, done))

    def fence(self, timeout_s: float) -> None:
        if not (self._landed.is_set() or self._landed.wait(timeout_s)):
            raise DeadlinePassed(f"the copy into the slot did not end within {timeout_s:g} s")
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def busy(self) -> bool:
        return not self._landed.is_set()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # it holds the tensors, which may be gone before there is more to do

    def _copy(self, binding: Binding, slot: Slot, after: Callable[[], None], done: Callable[[float], None]) -> None:
        start_s = time.perf_counter()
        try:
            copy_now(binding.lazy, slot, inside=lambda: reach("capture.inside-copy"))
            after()
            reach("capture.copied")
        except Exception as error:  # noqa: BLE001 - told by the fence; without "done" the agent never records the image
            self._error = error
            return
        finally:
            self._landed.set()
        done(time.perf_counter() - start_s)


def copy_now(parts: Parts, slot: Slot, inside: Callable[[], None] = lambda: None) -> None:
    """Copy every part into the slot's image, on this thread, without the GIL. *inside* is called half-way."""
    image = slot.image  # keeps the mapping alive, whatever becomes of the slot
    base = int(image.ctypes.data) if parts.streamed else 0
    for source, offset, nbytes in parts.streamed:
        for piece in range(0, nbytes, _PIECE_BYTES):
            ctypes.memmove(base + offset + piece, source + piece, min(_PIECE_BYTES, nbytes - piece))
    inside()
    parts.copy_small(image)
    if parts.others:
        with torch.no_grad():
            torch._foreach_copy_(parts.views(slot), parts.other_tensors)


def view_of(slot: Slot, like: torch.Tensor, offset: int) -> torch.Tensor:
    """The bytes at *offset* of the slot's image, as a tensor of the shape and dtype of *like*, row-major."""
    flat = torch.from_numpy(slot.image[offset : offset + like.nbytes])
    return flat.view(like.dtype).view(like.shape)


@dataclass(slots=True)
class Capture:
    """One snapshot's copy, from ``start`` to the verdict of ``torn``."""

    binding: Binding
    copier: Copier
    turn: int = 0  # of the samples
    still_true: Callable[[], bool] = lambda: True  # whether the binding names the tensors that train
    restructured: bool = False
    versions: list[int] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    digest: int | None = None  # of the samples of what all ranks hold alike
    filling: Filling | None = None  # with what is frozen

    def start(self, slot: Slot, done: Callable[[float], None]) -> None:
        """Copy the eager tensors now and begin with the lazy ones. The slot must be open already."""
        self.versions = list(map(_version, self.binding.watched))
        self.binding.samples.take(self.turn)
        alike = self.binding.shared.take(self.turn)
        if alike is not None:
            self.digest = crc32c(alike)
        copy_now(self.binding.eager, slot)
        if self.binding.frozen is not None:
            self.filling = self.binding.frozen.begin(slot)
        live, copies = self.binding.staged
        if live:
            torch._foreach_copy_(copies, live)  # behind the fence of the snapshot before, which read these copies
        self.copier.start(self.binding, slot, lambda: self._compare(slot), lambda seconds: self._landed(seconds, done))

    def _landed(self, seconds: float, done: Callable[[float], None]) -> None:
        """On the copying thread, while others train already."""
        if self.filling is not None:
            self.filling.prove()
        done(seconds)

    def _compare(self, slot: Slot) -> None:
        """On the copying thread: what was copied must be what was there at the start, and what trains."""
        if self.filling is not None:
            self.filling.copy_lazily()
        image = slot.image
        self.altered = self.binding.samples.altered(self.turn, int(image.ctypes.data))
        self.restructured = not self.still_true()

    def fence(self, timeout_s: float) -> None:
        """Wait until the optimizer may mutate what is being copied. Raises ``DeadlinePassed``."""
        self.copier.fence(timeout_s)

    def torn(self) -> list[str]:
        """The tensors that were mutated since ``start``. Call after ``fence``, on the training thread.

        Only there is the answer certain: an operation bumps a version after it has written, so a version read on another
        thread can miss a write that is under way.
        """
        versions = list(map(_version, self.binding.watched))
        torn = {*self.altered, *(self.filling.torn() if self.filling is not None else ())}
        if versions != self.versions:
            pairs = zip(self.binding.names, versions, self.versions, strict=True)
            torn |= {name for name, now, before in pairs if now != before}
        return sorted(torn)

    def settled(self) -> None:
        """The slot is committed: what lies there now is what the next filling of it may leave alone."""
        if self.filling is not None:
            self.filling.settled()

    def unchanged(self) -> Unchanged:
        """Which bytes of the image are as the filling of this slot before has left them. Once all has landed."""
        return self.filling.unchanged() if self.filling is not None else Unchanged(FREE_WORD, ())


def copier_for(survey: Survey) -> Copier:
    """The copier that fits where the lazy tensors live. Raises ``StateRefused`` if that is several CUDA devices."""
    devices = {item.tensor.device for item in survey.items if item.lazy and item.tensor.device.type == "cuda"}
    if not devices:
        return CpuCopier()
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise StateRefused(f"parameters and optimizer state lie on {names}; one device per rank can be captured")
    from .cuda import CudaCopier

    return CudaCopier(devices.pop())
