"""Waiting for work that a cancellation must not cut loose: its threads go on, and others must not overtake them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def ended(work: Collection[asyncio.Future[Any]]) -> None:
    """Return, or raise ``CancelledError`` if that was asked for meanwhile, only when all of *work* is over."""
    cancelled = False
    while running := [future for future in work if not future.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def to_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of *work*, which runs to its end even if whoever waits here is cancelled."""
    task = asyncio.ensure_future(work)
    await ended([task])
    return task.result()
