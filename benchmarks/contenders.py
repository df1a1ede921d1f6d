"""The ways of taking a snapshot that are compared, behind one interface, each as its own documentation says to use it.

==============  ========================================================================================================
none            no snapshots: what the others are compared with
holdfast        this package: memory of an agent, one copy, checksummed
holdfast-tier   the same, and every snapshot is spilled to a tier on the local disk, durably
torch.save      synchronous, one file on the local disk, not fsynced
dcp             ``torch.distributed.checkpoint.async_save`` as it comes: blocks while staging, writes in a thread, fsyncs
dcp-staged      the same with ``DefaultStager(StagingOptions(...))``: cached staging into shared memory in a thread, awaited
                before the optimizer's step; written by another process. Pinned memory and non-blocking copies need CUDA.
dcp-thread      as dcp-staged, but written by a thread of the trainer
==============  ========================================================================================================

Peers that write in the background are awaited before their next snapshot begins: they hold one staged copy. Every
contender imports what it needs by itself, so that the memory of the others is theirs alone.
"""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from workload import Workload

if TYPE_CHECKING:
    from holdfast import Ticket

PEERS: Final = ("torch.save", "dcp", "dcp-staged", "dcp-thread")


class Contender(ABC):
    """Takes snapshots of one workload. Its optimizer calls the contender before each step, by a hook."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    @abstractmethod
    def step(self, step: int, wanted: bool) -> bool:
        """Called at the end of each training step; *wanted*: a snapshot is due. Returns whether one was taken."""

    def settle(self) -> None:
        """Return once nothing is under way any more."""

    def close(self) -> None:
        """Let everything go."""


class Nothing(Contender):
    """Trains, and takes no snapshots."""

    def step(self, step: int, wanted: bool) -> bool:
        return False


class Holdfast(Contender):
    """This package.

    Attributes:
        attach_s: how long the constructor of the Checkpointer took, starting an agent included.
    """

    def __init__(self, workload: Workload, job: str, shm: str, tier: Path | None = None) -> None:
        super().__init__(workload)
        from holdfast import Checkpointer, Tier

        # Due at each step: so every snapshot that is taken is spilled, unless one is being spilled still.
        tiers = [Tier(str(tier), every=1, keep=2)] if tier is not None else None
        began_s = time.perf_counter()
        self.ckpt = Checkpointer(workload.model, workload.optimizer, job=job, shm=shm, every=1 << 30, tiers=tiers)
        self.attach_s = time.perf_counter() - began_s
        self._last: Ticket | None = None

    def step(self, step: int, wanted: bool) -> bool:
        if not wanted:
            self.ckpt.step(step)
            return False
        self._last = self.ckpt.snapshot(step)
        return self._last.id is not None

    def settle(self) -> None:
        if self._last is not None and self._last.id is not None:
            self.ckpt.wait(self._last)
        self._last = None

    def close(self) -> None:
        self.ckpt.close()


class TorchSave(Contender):
    """``torch.save`` of everything, in the training thread; two files in turn, so that one is always whole."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        super().__init__(workload)
        self._folder = folder

    def step(self, step: int, wanted: bool) -> bool:
        if wanted:
            torch.save(_state_dict(self.workload), self._folder / f"snapshot-{step % 2}.pt")
        return wanted


class Dcp(Contender):
    """``async_save``, with whatever options *options* makes. The optimizer waits for the staging, if that is asynchronous."""

    def __init__(self, workload: Workload, folder: Path, options: Callable[[], dict[str, Any]]) -> None:
        super().__init__(workload)
        import torch.distributed as dist

        if not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where the writing process looks for its peers
            dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        self._folder = folder
        self._options = options()
        self._staged: Any = None
        self._written: Any = None
        workload.optimizer.register_step_pre_hook(lambda *_: self._await_staging())

    def step(self, step: int, wanted: bool) -> bool:
        if not wanted:
            return False
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.settle()
        path = self._folder / f"snapshot-{step % 2}"
        shutil.rmtree(path, ignore_errors=True)
        answer: Any = async_save(_state_dict(self.workload), checkpoint_id=str(path), **self._options)
        self._staged = getattr(answer, "staging_completion", None)
        self._written = getattr(answer, "upload_completion", answer)
        return True

    def _await_staging(self) -> None:
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.result()

    def settle(self) -> None:
        self._await_staging()
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def _state_dict(workload: Workload) -> dict[str, Any]:
    return {"model": workload.model.state_dict(), "optimizer": workload.optimizer.state_dict()}


def _staged(kind: Literal["thread", "process"]) -> dict[str, Any]:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
    )
    return {"async_checkpointer_type": AsyncCheckpointerType(kind), "async_stager": DefaultStager(options)}


def make(name: str, workload: Workload, *, folder: Path, job: str, shm: str) -> Contender:
    """The contender of that name. Raises ``KeyError`` for another name."""
    makers: dict[str, Callable[[], Contender]] = {
        "none": lambda: Nothing(workload),
        "holdfast": lambda: Holdfast(workload, job, shm),
        "holdfast-tier": lambda: Holdfast(workload, job, shm, folder / "tier"),
        "torch.save": lambda: TorchSave(workload, folder),
        "dcp": lambda: Dcp(workload, folder, dict),
        "dcp-staged": lambda: Dcp(workload, folder, lambda: _staged("process")),
        "dcp-thread": lambda: Dcp(workload, folder, lambda: _staged("thread")),
    }
    return makers[name]()
