"""Jobs that come back with other ranks, meshes or parallel layouts: what runs in a rank."""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from holdfast import Checkpointer, crashpoints
from holdfast.errors import HoldfastError
from holdfast.snapshot.state import TrainingState
from holdfast.tests.hooks.nodes import WAIT_S
from holdfast.tests.hooks.worlds import Rank, Trained, build, sealed
from torch.distributed.tensor import DTensor


def tensors(job: Trained) -> dict[str, str]:
    """A digest of each global tensor of the state, however it is cut. Collective."""
    items = TrainingState({"": job.model}, {"": job.optimizer}, {}).survey().items
    whole = {i.slice.name: i.source.full_tensor() if isinstance(i.source, DTensor) else i.source for i in items}
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in whole.items()}


def draws() -> list[float]:
    """What each global generator gives next."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def attached(job: Trained, here: Rank) -> Checkpointer:
    """*said* may have options for all ranks, or the folder of each rank's node."""
    options = dict(here.said.get("options", {}))
    if "places" in here.said:
        shm = here.said["places"][here.rank]
        options |= {"shm": shm, "agent": f"{shm}/agent.sock"}
    return job.attach(here, **options)


def kept(here: Rank, ckpt: Checkpointer, step: int) -> None:
    """Take a snapshot and see it where *said*; just sealed, if nothing is."""
    if "until" in here.said:
        ckpt.wait(ckpt.snapshot(step), here.said["until"], WAIT_S)
        here.barrier()
    else:
        assert sealed(here, ckpt, step), ckpt.stats().skipped


def leave(here: Rank) -> dict[str, Any]:
    """Trains as *said*, and leaves a snapshot of step 3 behind."""
    job = build(here.said["kind"], here, seed=1)
    job.extras = {"loader": {"rank": here.rank, "position": 7}}
    ckpt = attached(job, here)
    for step in (1, 2, 3):
        job.turn()
        kept(here, ckpt, step)
    ckpt.close(ended=False)
    found = {"tensors": tensors(job), "lr": job.optimizer.param_groups[0]["lr"]}
    return {**found, "draws": draws()}


def come_back(here: Rank) -> dict[str, Any]:
    """Comes back as *said*; and, if that works, trains on, takes a snapshot, and comes back to that.

    *said* may have a place at which the last rank dies.
    """
    if here.rank == here.world - 1:
        crashpoints.arm(here.said.get("crash", ""))
    job = build(here.said["kind"], here, seed=2)
    job.optimizer.param_groups[0]["lr"] = 0.5
    job.extras = {"loader": {}}
    ckpt = attached(job, here)
    try:
        step: Any = ckpt.restore()
    except HoldfastError as error:
        ckpt.close(ended=False)
        return {"step": [type(error).__name__, str(error)]}
    found: dict[str, Any] = {"step": step, "tensors": tensors(job), "draws": draws(), "loader": job.extras["loader"]}
    restored = ckpt.stats().restored
    found["restored"] = None if restored is None else asdict(restored)
    found["lr"] = job.optimizer.param_groups[0]["lr"]
    for number in (step + 1, step + 2):
        job.turn()
        kept(here, ckpt, number)
    wanted = job.bits()
    ckpt.close(ended=False)
    again = build(here.said["kind"], here, seed=3)
    again.extras = {"loader": {}}
    with attached(again, here) as ckpt:
        found["again"] = ckpt.restore()
        found["same"] = again.bits() == wanted
    return found


def some_of_it(here: Rank) -> dict[str, Any]:
    """Restores with the arguments that are *said*, into a job whose last layer is called otherwise and is wider."""
    job = build(here.said["kind"], here, seed=2)
    job.optimizer.param_groups[0]["lr"] = 0.5
    job.extras = {"loader": {"position": 0}}
    before, drawn = tensors(job), torch.get_rng_state()
    ckpt = attached(job, here)
    try:
        step: Any = ckpt.restore(**here.said["arguments"])
    except HoldfastError as error:
        step = [type(error).__name__, str(error)]
    restored = ckpt.stats().restored
    found = {
        "step": step,
        "before": before,
        "tensors": tensors(job),
        "same streams": torch.equal(drawn, torch.get_rng_state()),
        "lr": job.optimizer.param_groups[0]["lr"],
        "loader": job.extras["loader"],
        "restored": None if restored is None else asdict(restored),
    }
    job.turn()
    kept(here, ckpt, 1)
    found["watermark"] = ckpt.watermark
    ckpt.close(ended=False)
    return found
