"""Tensors that nothing trains (the base of a LoRA model, large buffers): copied a few times, then left alone in their slots.

A slot that is filled again still holds what its last filling left. A frozen tensor stays as it lies if its version is the one
that was copied into this very slot, by a filling that was sealed, and that nobody has touched since. But a version counts only
what torch sees: a write through ``tensor.data``, through a raw pointer or by a foreign kernel raises none. So a version alone
is not believed:

* A tensor stays only after it was copied several times under one version, and had the same bytes each time.
* A few bytes of each tensor that stays, elsewhere each time, are compared with those in the slot.
* A small share of what could stay is copied all the same, in turn, so that everything is looked at in full now and then.

Whoever is caught is copied at every snapshot from then on, and named in the log. What can go unnoticed, for up to
``unchanged.ROUND`` fillings of a slot, is a silent write to part of a tensor that had stood still before.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ..erasure.kernel import crc32c_at
from .arena import Slot
from .record import FREE_WORD, OPEN_WORD
from .unchanged import Mask, Unchanged, due, runs
from .vectored import Regions

_log = logging.getLogger(__name__)
_PIECE_BYTES: Final = 1 << 20  # what is looked at in full at a time
_PROOFS: Final = 2  # how often bytes must have been found the same before their version is believed
_NEVER: Final = -1 << 40  # so many proofs has what was written silently
_SAMPLE_BYTES: Final = 64
_LARGE_BUFFER_BYTES: Final = 64 << 10  # smaller ones are copied sooner than their versions are looked at
_STRIDE: Final = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly, however many there are

_version = attrgetter("_version")
_trained = attrgetter("requires_grad")

Versions = npt.NDArray[np.int64]


def may_stand_still(source: torch.Tensor, local: torch.Tensor) -> bool:
    """Whether to look out for a parameter or buffer of a model, *local* on this rank, to stand still for good."""
    large = isinstance(source, torch.nn.Parameter) or local.nbytes >= _LARGE_BUFFER_BYTES
    return large and not source.requires_grad and local.device.type == "cpu" and local.is_contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One frozen tensor in CPU memory, or the rows of it that this rank copies.

    Attributes:
        live: the tensor whose version counts. source: as the model has it, which is trained or not.
        rows: what is copied: contiguous, without autograd. It keeps the storage of now alive, so that the same address
            means the same storage.
        offset, place: byte in the image, and index in the layout.
        eager: it may change during forward and backward, so it is copied at once.
    """

    name: str
    live: torch.Tensor
    source: torch.Tensor
    rows: torch.Tensor
    offset: int
    place: int
    eager: bool


class Frozen:
    """The frozen tensors of one binding, and what is known of their bytes in each slot.

    Belongs to the training thread, but for what a ``Filling`` does on the copying thread.

    Attributes:
        names, live: of the tensors. eager: ``bool[tensors]``, as in ``Part``.
        owner, offset, nbytes, source: of each piece of at most ``_PIECE_BYTES``: index of its tensor, byte in the image,
            length, address.
        follows: whether a piece comes right after the one before it in the image, with nothing but a gap in between.
        versions, proofs: of each tensor: under which version its bytes were looked at, and how often they were the same.
        checks: crc32c of each piece, under that version.
    """

    def __init__(self, parts: Sequence[Part], doubted: set[str]) -> None:
        """*doubted*: names of tensors that were written silently; grows."""
        self.names = tuple(part.name for part in parts)
        self.live = tuple(part.live for part in parts)
        self.eager = np.array([part.eager for part in parts], np.bool_)
        self._doubted = doubted
        self._alive = [part.rows for part in parts]
        self._sources = tuple(part.source for part in parts)
        cuts = [(t, at) for t, part in enumerate(parts) for at in range(0, part.rows.nbytes, _PIECE_BYTES)]
        self.owner = np.array([t for t, _ in cuts], np.intp)
        self.nbytes = np.array([min(_PIECE_BYTES, parts[t].rows.nbytes - at) for t, at in cuts], np.int64)
        self.offset = np.array([parts[t].offset + at for t, at in cuts], np.int64)
        self.source = np.array([parts[t].rows.data_ptr() + at for t, at in cuts], np.int64)
        places = np.array([part.place for part in parts], np.intp)[self.owner]
        self.follows = np.diff(places, prepend=-2) <= 1
        self._lock = threading.Lock()
        self.versions = np.full(len(parts), -1, np.int64)
        self.proofs = np.zeros(len(parts), np.int64)
        self.checks = np.zeros(len(cuts), np.uint32)
        self._probes = {eager: _Probe.of(parts, eager) for eager in (False, True)}
        self._held: dict[
            int, tuple[int, Versions]
        ] = {}  # by slot: nonce of its last filling, and which versions it has
        self._turns: dict[int, int] = {}  # by slot: how often it was filled

    def begin(self, slot: Slot) -> Filling:
        """Decide what is copied into *slot*, which is open; copy what must be copied at once."""
        now = np.fromiter(map(_version, self.live), np.int64, len(self.live))
        nonce, held = self._held.pop(slot.inode, (FREE_WORD, self.versions))
        turn = self._turns[slot.inode] = self._turns.get(slot.inode, -1) + 1
        stays = np.zeros(len(now), np.bool_)
        if nonce == slot.before and nonce not in (FREE_WORD, OPEN_WORD):
            with self._lock:
                stays = (held == now) & (self.versions == now) & (self.proofs >= _PROOFS)
            stays &= ~np.fromiter(map(_trained, self._sources), np.bool_, len(now))
        copied = ~stays[self.owner]
        copied[due(len(copied), turn)] = True
        filling = Filling(self, slot, turn, now, stays, copied, slot.before)
        filling.copy_at_once()
        return filling

    def settled(self, slot: Slot, versions: Versions) -> None:
        """What was copied into *slot* is exact, and its commit word says so."""
        self._held[slot.inode] = slot.word, versions

    def changed(self, filling: Filling, *, eager: bool) -> list[int]:
        """The tensors that should stay as they lie, and do not: by a sample of each, or all eager ones."""
        wrong = [t for t in self._probes[eager].differing(filling.turn, filling.base) if filling.stays[t]]
        # Who counts a write now has been written since the filling began: what lies in the slot is of before, and right.
        return [t for t in wrong if self.live[t]._version == filling.versions[t]]

    def look(
        self, versions: Versions, pieces: npt.NDArray[np.intp], found: npt.NDArray[np.uint32], whole: Mask
    ) -> None:
        """Compare the checksums of *pieces* with those of before. *whole*: the tensors of which these are all pieces."""
        owners = self.owner[pieces]
        with self._lock:
            same = self.versions == versions
            wrong = np.unique(owners[same[owners] & (self.checks[pieces] != found)])
            self.checks[pieces] = found
            self.proofs[whole] = np.where(same[whole], self.proofs[whole] + 1, np.minimum(self.proofs[whole], 0))
            self.versions[whole] = versions[whole]
        self.doubt(wrong.tolist())

    def doubt(self, tensors: Sequence[int]) -> None:
        """These have other bytes under the same version."""
        with self._lock:
            self.proofs[list(tensors)] = _NEVER
        fresh = sorted({self.names[t] for t in tensors} - self._doubted)
        if fresh:
            self._doubted.update(fresh)
            more = f" and {len(fresh) - 5} more" if len(fresh) > 5 else ""
            _log.warning(
                "%s%s: written although nothing trains it and torch counted no write (through .data, or by a foreign kernel?); "
                "snapshots taken since may hold what was there before; from now on it is copied every time",
                ", ".join(fresh[:5]), more,
            )  # fmt: skip


@dataclass(slots=True, eq=False)
class Filling:
    """One filling of a slot with frozen tensors.

    Attributes:
        turn: how often this slot was filled before.
        versions: of all tensors, when it began.
        stays: ``bool[tensors]``, which lie in the slot already.
        copied: ``bool[pieces]``, which are copied: all of the others, and a share of these.
        since: nonce of the filling that left there what stays.
    """

    frozen: Frozen
    slot: Slot
    turn: int
    versions: Versions
    stays: Mask
    copied: Mask
    since: int
    _lazy: set[int] = field(default_factory=set)  # tensors that were copied while others train
    _image: npt.NDArray[np.uint8] = field(init=False)  # keeps the mapping alive, whatever becomes of the slot

    def __post_init__(self) -> None:
        self._image = self.slot.image

    @property
    def base(self) -> int:
        """Address of the image."""
        return int(self._image.ctypes.data)

    def copy_at_once(self) -> None:
        """On the training thread: what may change as soon as the next step begins."""
        if self.frozen.eager.any():
            self._copy(self.copied & self.frozen.eager[self.frozen.owner])
            self._copy_again(self.frozen.changed(self, eager=True))

    def copy_lazily(self) -> None:
        """On the copying thread: the rest; and what is found not to be what it should be."""
        lazily = self.copied & ~self.frozen.eager[self.frozen.owner]
        self._lazy.update(self.frozen.owner[lazily].tolist())
        self._copy(lazily)
        wrong = self.frozen.changed(self, eager=False)
        self._lazy.update(wrong)
        self._copy_again(wrong)

    def _copy_again(self, wrong: Sequence[int]) -> None:
        if wrong:
            again = np.isin(self.frozen.owner, wrong)
            self.stays[wrong] = False
            self.copied |= again
            self._copy(again)
            self.frozen.doubt(wrong)

    def _copy(self, pieces: Mask) -> None:
        """Copy these, without the GIL."""
        frozen, base = self.frozen, self.base
        for piece in np.flatnonzero(pieces).tolist():
            to, source, nbytes = frozen.offset[piece], frozen.source[piece], frozen.nbytes[piece]
            ctypes.memmove(base + int(to), int(source), int(nbytes))

    def prove(self) -> None:
        """On the copying thread, once all has landed: is what was copied again what it was before?"""
        pieces, base = np.flatnonzero(self.copied), self.base
        where = zip(self.frozen.offset[pieces].tolist(), self.frozen.nbytes[pieces].tolist(), strict=True)
        found = np.fromiter((crc32c_at(base + at, nbytes) for at, nbytes in where), np.uint32, len(pieces))
        self.frozen.look(self.versions, pieces, found, ~self.stays)

    def torn(self) -> list[str]:
        """On the training thread: the tensors that were mutated while they were being copied."""
        frozen = self.frozen
        return [frozen.names[t] for t in self._lazy if frozen.live[t]._version != self.versions[t]]

    def settled(self) -> None:
        """The copy was exact, and the slot is committed."""
        self.frozen.settled(self.slot, self.versions)

    def unchanged(self) -> Unchanged:
        """Which bytes of the image are as the filling before has left them, gaps between them included."""
        frozen, ranges = self.frozen, []
        for first, last in runs(~self.copied):
            cuts = [first, *(first + 1 + np.flatnonzero(~frozen.follows[first + 1 : last])).tolist(), last]
            ends = frozen.offset + frozen.nbytes
            ranges += [(int(frozen.offset[a]), int(ends[b - 1])) for a, b in pairwise(cuts)]
        return Unchanged(self.since, tuple(ranges))


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """Where a few bytes of each of some tensors are compared with those in a slot."""

    tensors: list[int]
    sources: Regions
    offsets: npt.NDArray[np.uint64]
    room: npt.NDArray[np.int64]  # how far into the tensor a sample may begin

    @classmethod
    def of(cls, parts: Sequence[Part], eager: bool) -> _Probe:
        mine = [t for t, part in enumerate(parts) if part.eager == eager]
        sizes = [parts[t].rows.nbytes for t in mine]
        return cls(
            mine,
            Regions([parts[t].rows.data_ptr() for t in mine], [min(size, _SAMPLE_BYTES) for size in sizes]),
            np.array([parts[t].offset for t in mine], np.uint64),
            np.array([max(size - _SAMPLE_BYTES, 0) for size in sizes], np.int64),
        )

    def differing(self, turn: int, base: int) -> list[int]:
        """The tensors whose sample of this turn is not what lies in the image at address *base*."""
        if not self.tensors:
            return []
        at = (self.room * ((turn + 1) * _STRIDE % 1.0)).astype(np.uint64)
        tables = np.zeros((2, len(self.tensors), _SAMPLE_BYTES), np.uint8)
        rows = [
            np.uint64(table.ctypes.data) + np.arange(len(table), dtype=np.uint64) * np.uint64(_SAMPLE_BYTES)
            for table in tables
        ]
        places = (self.sources.pieces[:, 0] + at, self.offsets + np.uint64(base) + at)
        for row, place in zip(rows, places, strict=True):
            self.sources.moved_to(row).copy_from(self.sources.moved_to(place))
        return [self.tensors[i] for i in np.flatnonzero((tables[0] != tables[1]).any(axis=1))]
