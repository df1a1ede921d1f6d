"""Work in threads: the caller's memory is the caller's again when the call has returned, however it did."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from holdfast.storage.work import Work, in_thread, soon


def test_who_is_in_memory_is_waited_for() -> None:
    """Cancelled again and again, too."""
    inside, leave, events = threading.Event(), threading.Event(), []

    def work(work: Work) -> None:
        with work.memory():
            inside.set()
            leave.wait(30)
            events.append("left")
        work.go_on()
        events.append("went on")

    async def play() -> None:
        with ThreadPoolExecutor(1) as pool:
            task = asyncio.ensure_future(in_thread(pool, work, 30))
            await asyncio.to_thread(inside.wait, 30)
            for _ in range(3):
                task.cancel()
                for _ in range(5):
                    await asyncio.sleep(0)
                assert not task.done()
            leave.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert events == ["left"]

    asyncio.run(play())
    assert events == ["left"]


def test_who_hangs_outside_is_not() -> None:
    leave, ended = threading.Event(), []

    def work(work: Work) -> None:
        leave.wait(30)
        try:
            with work.memory():
                ended.append("touched memory")
        finally:
            ended.append("ended")

    async def play() -> None:
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(TimeoutError, match=r"no progress for 0.05 s"):
                await in_thread(pool, work, 0.05)
            with pytest.raises(TimeoutError):  # nor who waits for a thread
                await in_thread(pool, lambda work: ended.append("ran"), 0.05)
            leave.set()

    asyncio.run(play())
    assert ended == ["ended"]


def test_slow_is_not_stuck() -> None:
    """As long as it gets on, it may take longer than the limit."""
    tick = threading.Event()

    def work(work: Work) -> int:
        for _ in range(8):
            tick.wait(0.1)
            work.go_on()
        return 7

    async def play() -> None:
        with ThreadPoolExecutor(1) as pool:
            assert await in_thread(pool, work, 0.3) == 7
            with pytest.raises(ZeroDivisionError):
                await in_thread(pool, lambda work: 1 // 0, 1.0)

    asyncio.run(play())


def test_a_coroutine_is_abandoned_in_time() -> None:
    async def play() -> None:
        with pytest.raises(TimeoutError):
            await soon(asyncio.Event().wait(), 0.01)
        assert await soon(asyncio.sleep(0, "x"), 10) == "x"

    asyncio.run(play())
