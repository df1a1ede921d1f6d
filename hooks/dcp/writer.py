"""``holdfast.dcp.Writer``: what ``torch.distributed.checkpoint.save`` and ``async_save`` write goes into Holdfast's memory.

writer = holdfast.dcp.Writer(tiers=[holdfast.Tier("s3://bucket/run7", every="30m")])
...
dcp.save(state, checkpoint_id=f"step-{step}", storage_writer=writer)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ...errors import ConfigError, StateUnreachable
from ...storage.tiers import Tier
from ..contract import Deadlines, State, Stats
from .numbers import step_of
from .plans import Delta, Overview, planned, with_overviews
from .saves import Saves


class Writer(StorageWriter):
    """Every save is a snapshot of Holdfast: held by the agents, protected by the group, spilled to the tiers that are due.

    One Writer serves all saves of a process. With ``torch.distributed`` initialised, constructing it is collective over all
    ranks, and all of them save together. It may be used from another thread than it was made in, as ``async_save`` does; one
    save at a time.

    ``checkpoint_id`` says which step a save is: the last number in its last part, such as 1200 of ``"step-1200"`` or
    ``"/ckpts/run7/step_001200"``. Without one, saves are numbered on from the newest that the job had. Steps must grow.
    """

    def __init__(
        self,
        *,
        wait: State | None = None,
        slots: int | None = None,
        protect: str | None = None,
        tiers: Sequence[Tier] | None = None,
        config: str | Path | None = None,
        job: str | None = None,
        shm: str | None = None,
        agent: str | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Attach this rank to its node's agent. Memory is reserved by the first save, and grows with the state.

        Args:
            wait: what holds of a save on all ranks before it returns: ``"sealed"`` (it outlives the trainers),
                ``"protected"`` (and the loss of nodes) or ``"persisted"`` (in the nearest tier). By default protected, or
                sealed where there are no other nodes. Tiers are written in the background, each when it is due.
            slots, protect, tiers, config, job, shm, agent: as for ``holdfast.Checkpointer``.
            deadlines: how long waits may take. ``spill`` is that of a whole save; ``beat`` does not matter here.

        Raises:
            StateUnreachable: there is nothing to protect with, or no tier, and *wait* asks for it.
            ConfigError, AgentError, PeerFailed: as for ``holdfast.Checkpointer``.
        """
        given = deadlines or Deadlines()
        self.saves = Saves(
            slots=slots, protect=protect, tiers=tiers, config=config, job=job, shm=shm, agent=agent,
            deadlines=replace(given, beat=given.attach),  # no step is skipped because some rank is late
        )  # fmt: skip
        self._wait: State = wait or ("sealed" if self.saves.alone else "protected")
        self._named: int | None = None
        self._plans = Delta([])
        self._step = self.saves.newest_step
        if (trouble := self.saves.cannot_become(self._wait)) is not None:
            self.saves.close(ended=False)
            raise StateUnreachable(trouble)

    @property
    def step(self) -> int:
        """The step of the last save; before the first one, of the newest snapshot that the job has, or 0 if there is none."""
        return self._step

    def stats(self) -> Stats:
        """What happened so far; the live object, not a copy."""
        return self.saves.stats()

    def close(self, *, ended: bool = True) -> None:
        """Detach. Without it the end of the process does, as a crash would: the agent then keeps the snapshots for longer.

        Args:
            ended: the job is done, so the agent may give the memory back after its idle time.
        """
        self.saves.close(ended=ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(ended=kind is None)

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a Writer belongs to the process that is attached to the agent; AsyncCheckpointerType.PROCESS, which sends it "
            "to another one, cannot be had: AsyncCheckpointerType.THREAD, the default of async_save, can"
        )

    # -- what DCP calls, in this order -----------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another save begins. Raises ``ConfigError`` if *checkpoint_id* names no step."""
        self._named = None if checkpoint_id is None else step_of(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: ranks are all alike to Holdfast."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: add to each rank's plan what it must know of the others'."""
        if len(plans) != self.saves.world:
            raise ConfigError(
                f"{len(plans)} of {self.saves.world} ranks save; all must, together: neither a process_group of some ranks "
                f"nor no_dist or use_collectives=False can be had"
            )
        return with_overviews(self._plans.whole(plans))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Take the snapshot, and wait for it. What it returns is done, and holds nothing: layouts tell a reader all."""
        named, self._named = self._named, None
        step = self._step + 1 if named is None else named
        with self.saves.at_work(f"saving step {step}"):
            overview = plan.storage_data
            if not isinstance(overview, Overview) or overview.rank != self.saves.rank:
                raise ConfigError(
                    "this plan is not of this rank; the process_group numbers ranks otherwise than the job"
                )
            self.saves.save(step, lambda: planned(plan, planner), self._wait)
        self._step = step
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after ``write_data`` has succeeded on all ranks: then everything is done already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a step."""
        try:
            step_of(checkpoint_id)
        except ConfigError:
            return False
        return True
