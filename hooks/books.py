"""What our calls cost the training thread, and what went wrong in them: counted, logged, and kept from the training loop."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final

from ..agent import wire_pb2 as wire
from ..errors import HoldfastError, SnapshotSkipped
from .contract import Restored, Stats

_log = logging.getLogger(__name__)
_LOG_AGAIN_S: Final = 30.0  # the same trouble is logged at most so often; all of it is counted


class Books:
    """One rank's accounts.

    Attributes:
        stats: what happened so far; the live object.
    """

    def __init__(self, *, strict: bool) -> None:
        """*strict*: trouble is raised instead of being logged."""
        self.stats = Stats()
        self._strict = strict
        self._logged_s: dict[str, float] = {}
        self._stall_s = 0.0
        self._step_began_s = time.monotonic()

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Time spent here is accounted; trouble never reaches the training loop, unless *strict*."""
        return _Guard(self, what)

    def spent(self, seconds: float) -> None:
        """So much more of the training thread's time is ours."""
        self._stall_s += seconds

    def trouble(self, what: str, error: Exception) -> bool:
        """Count it, and log it unless it is to be raised; returns whether it need not be."""
        if not isinstance(error, SnapshotSkipped):  # that one was counted where it was noticed
            self.skip(f"error: {type(error).__name__}")
        if not self._strict:
            self.say(what, error)
        return not self._strict

    def skip(self, reason: str | None) -> None:
        """Count a snapshot that is not taken, or not kept."""
        if reason is not None:
            self.stats.skipped[reason] += 1

    def say(self, what: str, error: Exception) -> None:
        """Log trouble, unless it was logged just now."""
        kind, now_s = f"{what}: {type(error).__name__}", time.monotonic()
        if now_s - self._logged_s.get(kind, -_LOG_AGAIN_S) < _LOG_AGAIN_S:
            return
        self._logged_s[kind] = now_s
        unexpected = not isinstance(error, HoldfastError)
        _log.warning("training goes on without this snapshot (%s): %s", what, error, exc_info=unexpected)

    def end_step(self) -> None:
        """Close the books of one step."""
        self.stats.stall_s.append(self._stall_s)
        self._stall_s = 0.0
        self._step_began_s = time.monotonic()

    def report(self, step: int, watermark: int) -> wire.Report:
        """Figures for ``holdfast status``."""
        stats = self.stats
        return wire.Report(
            step=step,
            watermark=watermark,
            taken=stats.taken,
            skipped=dict(stats.skipped),
            last_stall_s=self.last_stall_s,
            last_copy_s=stats.copy_s,
            image_bytes=stats.image_bytes,
            copied_bytes=stats.copied_bytes,
        )

    @property
    def busy_us(self) -> int:
        """How long the running step has taken so far, in microseconds."""
        return int((time.monotonic() - self._step_began_s) * 1e6)

    @property
    def last_stall_s(self) -> float:
        """What our calls cost the training thread in the last step."""
        return self.stats.stall_s[-1] if self.stats.stall_s else 0.0


def report_restored(restored: Restored, world: int) -> None:
    """Log what a restore did that a user may not expect."""
    if restored.world != world:
        _log.warning("step %d, taken by %d ranks, was restored by %d", restored.step, restored.world, world)
    if restored.fresh_streams:
        _log.warning(
            "ranks %d to %d were not there at step %d: they draw from random streams of their own, and have the extras of "
            "the ranks of their numbers modulo %d",
            restored.fresh_streams[0], restored.fresh_streams[-1], restored.step, restored.world,
        )  # fmt: skip
    for what, names in (
        ("not in the snapshot", restored.missing),
        ("not in the live state", restored.unexpected),
        ("different in the snapshot", restored.mismatched),
    ):
        if names:
            _log.warning("left as they are, %s: %s", what, ", ".join(names[:20]) + (", …" if len(names) > 20 else ""))


class _Guard(AbstractContextManager[None]):
    """``Books.guard``. A class, since a generator costs the training thread three times as much."""

    __slots__ = ("_began_s", "_books", "_what")

    def __init__(self, books: Books, what: str) -> None:
        self._books, self._what = books, what

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._books.spent(time.perf_counter() - self._began_s)
        return isinstance(error, Exception) and self._books.trouble(self._what, error)
