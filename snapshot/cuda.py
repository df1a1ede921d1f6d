"""The lazy copy from CUDA devices: a side stream into page-locked slot memory, captured once as a graph per slot.

The CPU never waits: the copies wait for the end of the step on the device, the fence makes the compute stream wait for
the copies, and a background thread learns when the bytes have landed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .arena import Slot
from .capture import Binding, Copier

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Recorded:
    """The copies of one binding into one slot: a graph, or None where the driver would not capture them."""

    binding: Binding
    graph: torch.cuda.CUDAGraph | None


class CudaCopier(Copier):
    """Copies on one side stream. All lazy tensors lie on the current device."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._landed: torch.cuda.Event | None = None
        self._pool = ThreadPoolExecutor(1, "holdfast-copy")
        self._registered: set[int] = set()
        self._recorded: dict[int, _Recorded] = {}
        self._idle = threading.Event()
        self._idle.set()

    def start(self, binding: Binding, slot: Slot, done: Callable[[float], None]) -> None:
        self._register(slot)
        recorded = self._record(binding, slot)
        self._idle.clear()
        start_s = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if recorded.graph is not None:
                recorded.graph.replay()
            else:
                self._enqueue(binding, slot)
            # A blocking event lets the waiting thread sleep in the driver instead of spinning.
            landed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            landed.record(self._stream)
        self._landed = landed
        self._pool.submit(self._wait, landed, start_s, done)

    def fence(self, timeout_s: float) -> None:
        """Order the compute stream behind the copies. Returns at once: the deadline is the device's own."""
        if self._landed is not None:
            torch.cuda.current_stream().wait_event(self._landed)

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    def forget(self, slot: Slot) -> None:
        self._recorded.pop(slot.inode, None)
        if slot.inode in self._registered:
            self._registered.discard(slot.inode)
            _driver(lambda runtime: runtime.cudaHostUnregister(slot.image.ctypes.data))

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._recorded.clear()

    def _wait(self, landed: torch.cuda.Event, start_s: float, done: Callable[[float], None]) -> None:
        try:
            landed.synchronize()
        finally:
            self._idle.set()
        done(time.perf_counter() - start_s)

    def _register(self, slot: Slot) -> None:
        """Page-lock the slot's image, once: copies into pageable memory would be staged, and would block."""
        if slot.inode not in self._registered:
            _driver(lambda runtime: runtime.cudaHostRegister(slot.image.ctypes.data, slot.image.nbytes, 0))
            self._registered.add(slot.inode)

    def _record(self, binding: Binding, slot: Slot) -> _Recorded:
        """The graph of this binding's copies into this slot; captured when either is new. Addresses are part of it."""
        known = self._recorded.get(slot.inode)
        if known is not None and known.binding is binding:
            return known
        graph = torch.cuda.CUDAGraph()
        recorded = self._recorded[slot.inode] = _Recorded(binding, graph)
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue(binding, slot)
        except RuntimeError as error:
            _log.warning("the copies could not be captured as a CUDA graph, and are enqueued one by one: %s", error)
            recorded.graph = None
        return recorded

    def _enqueue(self, binding: Binding, slot: Slot) -> None:
        parts = binding.lazy
        with torch.no_grad():
            for view, tensor in zip(parts.views(slot), parts.small_tensors, strict=True):
                view.copy_(tensor, non_blocking=True)


def _driver(call: Callable[[Any], Any]) -> None:
    """Call the CUDA runtime. Raises ``RuntimeError`` with its message on failure."""
    torch.cuda.check_error(int(call(torch.cuda.cudart())))  # type: ignore[no-untyped-call]
