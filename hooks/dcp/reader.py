"""``holdfast.dcp.Reader``: what ``torch.distributed.checkpoint.load`` reads comes from memory, its group, or a tier.

dcp.load(state, storage_reader=holdfast.dcp.Reader(writer))                              # the newest
dcp.load(state, checkpoint_id="step-1200", storage_reader=holdfast.dcp.Reader(writer))
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ...errors import ConfigError
from ...snapshot.layout import Slice
from ...storage.tiers import Tier
from ..contract import Deadlines
from .numbers import step_of
from .opened import Opened
from .plans import metadata, read_overview, value_of, wanted
from .saves import Saves
from .writer import Writer

_log = logging.getLogger(__name__)


class Reader(StorageReader):
    """Reads a snapshot, the newest one that can be had, into whatever a state dict asks for: other shapes of world and mesh
    are what DCP's planners make of them.

    What was saved by a ``Writer`` comes back whole. Of a snapshot that a ``Checkpointer`` took, tensors can be loaded, under
    the names that it gives them.

    ``checkpoint_id`` says which step is wanted, as for a ``Writer``; without one, it is the newest.
    """

    def __init__(
        self,
        writer: Writer | None = None,
        *,
        tiers: Sequence[Tier] | None = None,
        config: str | Path | None = None,
        job: str | None = None,
        shm: str | None = None,
        agent: str | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            writer: reads through its attachment, and needs no other argument. Without one, every load attaches to the
                agent, collectively, and detaches when it is over; no Writer may be attached meanwhile.
            tiers, config, job, shm, agent: as for ``holdfast.Checkpointer``.
            deadlines: how long waits may take.
        """
        given = deadlines or Deadlines()
        self._writer = writer
        self._attach: Callable[[], Saves] = lambda: Saves(
            tiers=tiers, config=config, job=job, shm=shm, agent=agent, deadlines=replace(given, beat=given.attach)
        )
        self._named: int | None = None
        self._step: int | None = None
        self._saves: Saves | None = None
        self._opened: Opened | None = None
        self._open = ExitStack()  # whatever is open, between two calls of DCP
        self._metadata = Metadata({})
        self._homes: dict[str, int] = {}

    @property
    def step(self) -> int | None:
        """The step that was loaded last; None before the first."""
        return self._step

    def close(self) -> None:
        """Let go of what a load has opened; for one that failed half-way. Every load begins with this, too."""
        self._open.close()
        self._saves = self._opened = None

    # -- what DCP calls, in this order -----------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another load begins. Raises ``ConfigError`` if *checkpoint_id* names no step."""
        self._named = None if checkpoint_id is None else step_of(checkpoint_id)

    def read_metadata(self, *args: Any) -> Metadata:
        """Choose a snapshot, together with all ranks, and say what is in it.

        Raises:
            SnapshotUnknown: there is none, or not of that step.
            SnapshotLost: there is, and it cannot be had; says what is missing.
        """
        self.close()
        named, self._named = self._named, None
        try:
            if self._writer is not None:
                saves = self._writer.saves
            else:
                saves = self._attach()
                Saves.passing.add(self._open)
                self._open.callback(Saves.passing.discard, self._open)
                self._open.callback(saves.close, ended=False)
            with saves.at_work("loading"):
                opened = saves.open(named)
                self._open.callback(opened.close)
                self._homes, paths = read_overview(opened.values(saves.rank % len(opened.layouts)))
            self._metadata = metadata(opened.layouts, self._homes, paths)
        except BaseException:
            self.close()
            raise
        self._saves, self._opened = saves, opened
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: ranks are all alike to Holdfast."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all that *plan* asks for; what it returns is done."""
        if self._saves is None or self._opened is None:
            raise ConfigError("read_data comes after read_metadata, once")
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        values = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        try:
            with self._saves.at_work("loading"):
                self._read_tensors(self._opened, tensors, planner)
                self._read_values(self._opened, values, planner)
            self._step = self._opened.step
        finally:
            self.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_tensors(self, opened: Opened, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        targets = [planner.resolve_tensor(item) for item in items]
        boxes = [wanted(item, self._metadata) for item in items]
        into = [_room(box, target.detach()) for box, target in zip(boxes, targets, strict=True)]
        opened.fill(list(zip(boxes, into, strict=True)))
        for item, target, filled in zip(items, targets, into, strict=True):
            if filled.dtype != target.dtype:
                target.detach().copy_(filled)
            planner.commit_tensor(item, target)

    def _read_values(self, opened: Opened, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Planners take what is no tensor as bytes that ``torch.load`` reads; so that is made here, of verified plain values."""
        for item in items:
            name = item.storage_index.fqn
            stream = io.BytesIO()
            torch.save(value_of(opened.values(self._homes[name]), name), stream)
            stream.seek(0)
            planner.load_bytes(item, stream)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a step."""
        return Writer.validate_checkpoint_id(checkpoint_id)


def _room(box: Slice, target: torch.Tensor) -> torch.Tensor:
    """*target* itself, if it can take the bytes of *box*; else a tensor that can."""
    dtype: torch.dtype = getattr(torch, box.dtype)
    return target if target.dtype == dtype else torch.empty(box.extent, dtype=dtype, device=target.device)
