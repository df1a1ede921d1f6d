"""How the ranks of a job talk to each other: a side group of ``torch.distributed``, or nobody. No pickle."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from ..errors import DeadlinePassed

# gloo gives up on a group whose operation takes longer. Far above any wait of ours, each of which has its own deadline:
# a rank that is merely slow must not break the group.
_GROUP_TIMEOUT_S: Final = 3600.0


class Pending:
    """An operation under way; ``result`` may be asked again after it was late."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], list[list[int]]]) -> None:
        self._works = list(works)
        self._finish = finish

    def result(self, timeout_s: float) -> list[list[int]] | None:
        """One vector per contributor of the answer, or None if it is not there within *timeout_s*."""
        deadline_s = time.monotonic() + timeout_s
        while self._works:
            work = self._works[0]
            if not work.is_completed():
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                try:
                    work.wait(timedelta(seconds=left_s))
                except RuntimeError:
                    if not work.is_completed():
                        return None
                    raise
            else:
                work.wait()
            self._works.pop(0)
        return self._finish()


class Ranks(ABC):
    """Who this process is among the ranks of the job, and how it talks to the others."""

    rank: int
    world: int

    @abstractmethod
    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        """Every rank's *payload*, in rank order. Collective.

        Raises:
            DeadlinePassed: not all ranks came; names *what* was done, and the ranks that did not.
        """

    @abstractmethod
    def reduce_min(self, vector: Sequence[int]) -> Pending:
        """Begin an elementwise minimum over all ranks; the answer is one vector. Collective, never blocks."""

    @abstractmethod
    def exchange(self, vector: Sequence[int]) -> Pending:
        """Begin to gather one int64 vector per rank, all of one length. Collective, never blocks."""

    def close(self) -> None:
        """Leave."""


class Alone(Ranks):
    """A job of one rank."""

    rank = 0
    world = 1

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        return [payload]

    def reduce_min(self, vector: Sequence[int]) -> Pending:
        return Pending([], lambda: [list(vector)])

    def exchange(self, vector: Sequence[int]) -> Pending:
        return Pending([], lambda: [list(vector)])


class Group(Ranks):
    """All ranks of the initialised default process group, on a gloo group of their own.

    A group of their own, because a snapshot must never wait behind the training's collectives, nor they behind it.
    """

    def __init__(self) -> None:
        """Collective over all ranks."""
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=_GROUP_TIMEOUT_S))

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        try:
            # The only operation of gloo that names who is missing.
            dist.monitored_barrier(self._group, timedelta(seconds=timeout_s), wait_all_ranks=True)
        except RuntimeError as error:
            raise DeadlinePassed(f"{what}: not all {self.world} ranks came within {timeout_s:g} s: {error}") from error
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(payload)]), group=self._group)
        longest = max(int(length) for length in lengths)
        if longest == 0:
            return [b""] * self.world
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)]
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, mine, group=self._group)
        return [part[: int(length)].numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]

    def reduce_min(self, vector: Sequence[int]) -> Pending:
        values = torch.tensor(vector, dtype=torch.int64)
        work = dist.all_reduce(values, dist.ReduceOp.MIN, group=self._group, async_op=True)
        return Pending([work], lambda: [values.tolist()])

    def exchange(self, vector: Sequence[int]) -> Pending:
        parts = [torch.zeros(len(vector), dtype=torch.int64) for _ in range(self.world)]
        work = dist.all_gather(parts, torch.tensor(vector, dtype=torch.int64), group=self._group, async_op=True)
        return Pending([work], lambda: [part.tolist() for part in parts])

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group(self._group)


def join() -> Ranks:
    """The ranks of this job: those of the initialised default group, else this process alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return Alone()
