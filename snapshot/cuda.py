"""The lazy copy from CUDA devices: a side stream into page-locked slot memory, captured once as a graph per slot.

The CPU never waits: the copies wait for the end of the step on the device, the fence makes the compute stream wait for
the copies, and a background thread learns when the bytes have landed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from .arena import Slot
from .capture import Binding, Copier

_log = logging.getLogger(__name__)
_CLOSE_S: Final = 10.0


# A graph is captured for a binding that has been used so often: capturing synchronises the device, and optimizers that
# replace their state at every step would pay it each time.
_CAPTURE_AFTER: Final = 2


@dataclass(slots=True)
class _Recorded:
    """The copies of one binding into one slot: how often they were made, and their graph once there is one."""

    binding: Binding
    uses: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class CudaCopier(Copier):
    """Copies on one side stream of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._landed: torch.cuda.Event | None = None
        self._registered: set[int] = set()
        self._recorded: dict[int, _Recorded] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="holdfast-copy", daemon=True)
        self._thread.start()

    def prepare(self, slot: Slot) -> None:
        """Page-lock the slot's image: copies into pageable memory would be staged, and would block."""
        if slot.inode not in self._registered:
            with torch.cuda.device(self._device):
                _driver(lambda runtime: runtime.cudaHostRegister(slot.image.ctypes.data, slot.image.nbytes, 0))
            self._registered.add(slot.inode)

    def start(self, binding: Binding, slot: Slot, after: Callable[[], None], done: Callable[[float], None]) -> None:
        self.prepare(slot)
        recorded = self._record(binding, slot)
        start_s = time.perf_counter()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                if recorded.graph is not None:
                    recorded.graph.replay()
                else:
                    self._enqueue(binding, slot)
                # A blocking event lets the waiting thread sleep in the driver instead of spinning.
                landed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                landed.record(self._stream)
        self._landed = landed
        self._work.put(lambda: self._wait(landed, after, start_s, done))

    def fence(self, timeout_s: float) -> None:
        """Order the compute stream behind the copies. Returns at once; to be called on every stream that mutates."""
        if self._landed is not None:
            torch.cuda.current_stream(self._device).wait_event(self._landed)

    @property
    def busy(self) -> bool:
        """Never: the side stream keeps copies in order, and the CPU runs ahead of it by design."""
        return False

    def forget(self, slot: Slot) -> None:
        self._stream.synchronize()
        self._recorded.pop(slot.inode, None)
        if slot.inode in self._registered:
            self._registered.discard(slot.inode)
            _driver(lambda runtime: runtime.cudaHostUnregister(slot.image.ctypes.data))

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(_CLOSE_S)
        self._recorded.clear()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _wait(
        self, landed: torch.cuda.Event, after: Callable[[], None], start_s: float, done: Callable[[float], None]
    ) -> None:
        try:
            landed.synchronize()
            after()
        except RuntimeError:
            _log.exception("the copy from %s failed; its snapshot is never recorded", self._device)
            return
        done(time.perf_counter() - start_s)

    def _record(self, binding: Binding, slot: Slot) -> _Recorded:
        """The copies of this binding into this slot; captured as a graph, addresses and all, once that pays."""
        recorded = self._recorded.get(slot.inode)
        if recorded is None or recorded.binding is not binding:
            recorded = self._recorded[slot.inode] = _Recorded(binding)
        recorded.uses += 1
        if recorded.uses == _CAPTURE_AFTER:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._enqueue(binding, slot)
                recorded.graph = graph
            except RuntimeError as error:
                _log.warning("the copies could not be captured as a CUDA graph, and are enqueued one by one: %s", error)
        return recorded

    def _enqueue(self, binding: Binding, slot: Slot) -> None:
        with torch.no_grad():
            for view, tensor in zip(binding.lazy.views(slot), binding.lazy.other_tensors, strict=True):
                view.copy_(tensor, non_blocking=True)


def _driver(call: Callable[[Any], Any]) -> None:
    """Call the CUDA runtime. Raises ``RuntimeError`` with its message on failure."""
    torch.cuda.check_error(int(call(torch.cuda.cudart())))  # type: ignore[no-untyped-call]
