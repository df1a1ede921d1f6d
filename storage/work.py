"""Work in threads that the event loop can call off, without the thread touching its caller's memory ever after."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


class CalledOff(Exception):
    """The loop no longer waits for this work."""


class Work:
    """What a thread and the loop know of one piece of work. The thread calls ``go_on`` and ``memory``.

    A system call on a network file system may hang for as long as its server is away, and nothing can end it. So the
    loop stops waiting, and the thread, should it ever come back, finds out before it does anything that counts.
    """

    def __init__(self) -> None:
        self.beats = 0  # grows as long as the work gets on
        self._lock = threading.Lock()
        self._off = False
        self._touching = False

    def go_on(self) -> None:
        """Say that the work gets on; ends it if it was called off."""
        self._enter(touching=False)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """The caller's memory is read or written inside, and nowhere else."""
        self._enter(touching=True)
        try:
            yield
        finally:
            self._touching = False

    def _enter(self, *, touching: bool) -> None:
        with self._lock:
            if self._off:
                raise CalledOff
            self.beats += 1
            self._touching = touching

    def call_off(self) -> bool:
        """Call it off. True if it is in the caller's memory just now: then it has to be waited for."""
        with self._lock:
            self._off = True
            return self._touching


async def in_thread(pool: Executor, function: Callable[[Work], Result], timeout_s: float) -> Result:
    """Run *function* in *pool*, as long as it gets on at least every *timeout_s*.

    Raises:
        TimeoutError: it did not. It is called off then, as it is when the caller is cancelled; either way the caller's
            memory is not touched any more.
    """
    work = Work()

    def run() -> Result:
        work.go_on()  # it may have been called off while it waited for a thread
        return function(work)

    future = asyncio.get_running_loop().run_in_executor(pool, run)
    try:
        beats = 0
        while not (await asyncio.wait({future}, timeout=timeout_s))[0]:
            if work.beats == beats:
                raise TimeoutError(f"no progress for {timeout_s:g} s")
            beats = work.beats
        return future.result()
    finally:
        if not future.done():
            if work.call_off():
                await _ended(future)
            future.cancel()  # ends it if it still waits for a thread


async def _ended(future: asyncio.Future[Result]) -> None:
    """Wait for *future*, through any number of cancellations: its thread is in memory that somebody else owns."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()  # looked at, so that nobody complains
    if cancelled:
        raise asyncio.CancelledError


async def soon(coroutine: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
    """What *coroutine* returns, if it does so within *timeout_s*; else TimeoutError. It is abandoned then, and not waited
    for, so it must not touch anybody else's memory."""
    task = asyncio.ensure_future(coroutine)
    try:
        if not (await asyncio.wait({task}, timeout=timeout_s))[0]:
            raise TimeoutError(f"no answer for {timeout_s:g} s")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
