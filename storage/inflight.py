"""Several operations at a time, within a bound on their number and on the bytes that they hold."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import BudgetExceeded

Item = TypeVar("Item")

# Below this, what the allocator keeps is as good.
_SMALL_BYTES: Final = 1 << 20


async def each(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], at_once: int) -> None:
    """Call *work* for each of *items*, in their order, at most *at_once* at a time.

    The first failure cancels the rest and is raised. Whatever ends this, no call is under way any more when it does: the
    caller may let go of the memory that they use.
    """
    source = iter(items)

    async def worker() -> None:
        for item in source:
            await work(item)

    tasks = [asyncio.create_task(worker()) for _ in range(at_once)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await _ended(tasks)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Return when all have ended, however often this is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain of it: the first one is raised already
    if cancelled is not None:
        raise cancelled


class Room:
    """So many bytes, of which each operation takes what it needs, and waits for its turn if they are not there.

    One that needs more than there are gets all of them: it runs alone, rather than never.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = self._free = nbytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[None]:
        """Hold *nbytes* while the block runs. First come, first served."""
        need = min(nbytes, self._nbytes)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((need, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            served = turn.done() and not turn.cancelled()  # and cancelled before it could run
            self._give(need if served else 0)
            raise
        try:
            yield
        finally:
            self._give(need)

    def _give(self, nbytes: int) -> None:
        self._free += nbytes
        self._serve()

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            need, turn = self._waiting.popleft()
            if not turn.done():  # else: cancelled while it waited
                self._free -= need
                turn.set_result(None)


def fresh(nbytes: int) -> npt.NDArray[np.uint8]:
    """``uint8[nbytes]``, holding anything; BudgetExceeded where there is no such memory: what others wrote says how long."""
    try:
        return np.empty(nbytes, np.uint8)
    except (MemoryError, ValueError) as error:
        raise BudgetExceeded(f"{nbytes} bytes of memory are wanted at once, and there are not so many") from error


class Buffers:
    """Memory that is used again and again: touching fresh pages takes longer than to read into those that are there.

    Together they are no more than *nbytes*, as long as no more is borrowed at one time.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._held = 0  # borrowed or free
        self._free: list[npt.NDArray[np.uint8]] = []

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """``uint8[nbytes]``, holding anything, until the block ends."""
        if nbytes < _SMALL_BYTES:
            yield fresh(nbytes)
            return
        fits = [i for i, free in enumerate(self._free) if len(free) >= nbytes]
        if fits:
            whole = self._free.pop(min(fits, key=lambda i: len(self._free[i])))
        else:
            while self._free and self._held + nbytes > self._nbytes:
                self._held -= len(self._free.pop())
            whole = fresh(nbytes)
            self._held += nbytes
        try:
            yield whole[:nbytes]
        finally:
            if self._held <= self._nbytes:
                self._free.append(whole)
            else:
                self._held -= len(whole)
