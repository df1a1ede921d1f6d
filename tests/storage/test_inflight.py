"""Bounds on what is under way, kept through failures and cancellation."""

from __future__ import annotations

import asyncio

import pytest
from holdfast.storage.inflight import Buffers, Room, each


def test_all_are_done_a_few_at_a_time_in_order() -> None:
    begun: list[int] = []
    running = most = 0

    async def work(item: int) -> None:
        nonlocal running, most
        begun.append(item)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    asyncio.run(each(range(10), work, 3))
    assert (begun, most) == (list(range(10)), 3)
    asyncio.run(each([], work, 3))


def test_the_first_failure_ends_all_others_before_it_is_raised() -> None:
    ended: list[int] = []

    async def work(item: int) -> None:
        try:
            await asyncio.sleep(0 if item == 1 else 3600)
        finally:
            if item != 1:
                await asyncio.sleep(0)  # even those that take a while to end
            ended.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        asyncio.run(each(range(9), work, 4))
    assert sorted(ended) == [0, 1, 2, 3]


def test_cancelling_twice_still_waits_for_the_end() -> None:
    ended = 0

    async def work(_: int) -> None:
        nonlocal ended
        try:
            await asyncio.sleep(3600)
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended += 1

    async def main() -> None:
        task = asyncio.create_task(each(range(3), work, 3))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == 3

    asyncio.run(main())


def test_room_is_given_in_turn_and_never_lost() -> None:
    async def main() -> None:
        room, held, order = Room(10), 0, list[int]()

        async def use(nbytes: int) -> None:
            nonlocal held
            async with room.take(nbytes):
                held += min(nbytes, 10)
                assert held <= 10
                order.append(nbytes)
                await asyncio.sleep(0)
                held -= min(nbytes, 10)

        await asyncio.gather(*(use(n) for n in (4, 5, 10, 1, 300, 2, 0)))
        assert order == [4, 5, 10, 1, 300, 2, 0], "first come, first served"
        async with room.take(10):
            waiting = [asyncio.create_task(use(n)) for n in (6, 3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        await asyncio.wait(waiting)
        async with room.take(8):
            served = asyncio.create_task(use(5))
            await asyncio.sleep(0)
        served.cancel()  # it has been served, and not run yet
        await asyncio.wait({served})
        await asyncio.wait_for(use(10), 5.0)

    asyncio.run(main())


def test_buffers_are_used_again_and_bounded() -> None:
    mib = 1 << 20
    buffers = Buffers(10 * mib)
    with buffers.borrow(4 * mib) as first, buffers.borrow(5 * mib) as second:
        assert (len(first), len(second)) == (4 * mib, 5 * mib)
        places = {first.ctypes.data, second.ctypes.data}
    with buffers.borrow(3 * mib) as again:
        assert len(again) == 3 * mib
        assert again.ctypes.data in places
    with buffers.borrow(8 * mib) as large:
        assert len(large) == 8 * mib
    with buffers.borrow(30 * mib) as too_large, buffers.borrow(10) as small:
        assert (len(too_large), len(small)) == (30 * mib, 10)
    with buffers.borrow(10 * mib) as all_of_it:
        assert len(all_of_it) == 10 * mib
