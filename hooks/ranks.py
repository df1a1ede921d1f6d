"""How the ranks of a job talk to each other: a side group of ``torch.distributed``, or nobody. No pickle."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..errors import DeadlinePassed, PeerFailed

# gloo gives up on a group whose operation takes longer. Far above any wait of ours, each of which has its own deadline:
# a rank that is merely slow must not break the group.
_GROUP_TIMEOUT_S: Final = 3600.0
Answer = TypeVar("Answer")


class Pending(Generic[Answer]):
    """An operation under way; ``result`` may be asked again after it was late."""

    def __init__(self, work: Any, finish: Callable[[], Answer]) -> None:
        """*work* is torch's handle, None if there is nothing to wait for."""
        self.work = work
        self.finish = finish

    def result(self, timeout_s: float) -> Answer | None:
        """The answer, or None if it is not there within *timeout_s*. Raises ``RuntimeError`` if the operation failed."""
        if self.work is None:
            return self.finish()
        if self.work.is_completed():
            self.work.wait()  # this only raises what went wrong
            return self.finish()
        if timeout_s <= 0:
            return None
        try:
            self.work.wait(timedelta(seconds=max(timeout_s, 0.001)))  # what rounds to 0 ms waits without end
        except RuntimeError:
            if not self.work.is_completed():
                return None
            raise
        return self.finish()


class Ranks(ABC):
    """Who this process is among the ranks of the job, and how it talks to the others."""

    rank: int
    world: int

    @abstractmethod
    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        """Every rank's *payload*, in rank order. Collective.

        Raises:
            DeadlinePassed: not all ranks came; names *what* was done, and the ranks that did not.
            PeerFailed: a rank went away in the middle of it.
        """

    @abstractmethod
    def reduce_min(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        """Begin an elementwise minimum over all ranks; the answer is one vector. Collective, never blocks."""

    @abstractmethod
    def exchange(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        """Begin to gather one int64 vector per rank, all of one length. Collective, never blocks."""

    def close(self) -> None:
        """Leave."""


class Alone(Ranks):
    """A job of one rank."""

    rank = 0
    world = 1

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        return [payload]

    def reduce_min(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        return Pending(None, lambda: [list(vector)])

    def exchange(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        return Pending(None, lambda: [list(vector)])


class Group(Ranks):
    """All ranks of the initialised default process group, on a gloo group of their own.

    A group of their own, because a snapshot must never wait behind the training's collectives, nor they behind it.
    """

    def __init__(self) -> None:
        """Collective over all ranks."""
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_GROUP_TIMEOUT_S))
        self._minimum = dist.AllreduceOptions()
        self._minimum.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        try:
            # The only operation of gloo that names who is missing.
            dist.monitored_barrier(self._group, timedelta(seconds=timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise DeadlinePassed(f"{what}: not all {self.world} ranks came within {timeout_s:g} s: {error}") from error
        deadline_s = time.monotonic() + timeout_s
        lengths = [int(n) for n in self._await(self._all_gather(torch.tensor([len(payload)])), what, deadline_s)]
        mine = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        mine[: len(payload)] = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
        parts = self._await(self._all_gather(mine), what, deadline_s)
        return [part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]

    def reduce_min(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        values = torch.from_numpy(np.array(vector, np.int64))  # torch.tensor takes thrice as long
        # The group's own method: what torch.distributed.all_reduce wraps around it costs the training thread 0.1 ms.
        return Pending(self._group.allreduce([values], self._minimum), lambda: [values.tolist()])

    def exchange(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        pending = self._all_gather(torch.tensor(vector, dtype=torch.int64))
        return Pending(pending.work, lambda: [part.tolist() for part in pending.finish()])

    def _all_gather(self, mine: torch.Tensor) -> Pending[list[torch.Tensor]]:
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        return Pending(dist.all_gather(parts, mine, group=self._group, async_op=True), lambda: parts)

    def _await(self, pending: Pending[list[torch.Tensor]], what: str, deadline_s: float) -> list[torch.Tensor]:
        try:
            parts = pending.result(deadline_s - time.monotonic())
        except RuntimeError as error:
            raise PeerFailed(f"{what}: another rank went away: {error}") from error
        if parts is None:
            raise DeadlinePassed(f"{what}: not all {self.world} ranks answered in time")
        return parts

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group(self._group)


def join() -> Ranks:
    """The ranks of this job: those of the initialised default group, else this process alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return Alone()
