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
from holdfast.hooks.arrivals import taken
from holdfast.snapshot.state import TrainingState
from holdfast.tests.hooks.nodes import WAIT_S
from holdfast.tests.hooks.worlds import Rank, Trained, build, sealed
from torch import nn
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
    """Trains as *said*, and leaves a snapshot of step 3 behind: perhaps one that is sealed, and no rank knows more of it; and
    perhaps a part of another one."""
    job = build(here.said["kind"], here, seed=1)
    job.extras = {"loader": {"rank": here.rank, "position": 7}}
    ckpt = attached(job, here)
    before: dict[str, str] = {}
    for step in (1, 2, 3):
        before = tensors(job)
        job.turn()
        if step == 3 and "last" in here.said:
            ckpt.wait(ckpt.snapshot(step), here.said["last"], WAIT_S)
            here.barrier()
        else:
            kept(here, ckpt, step)
    found = {"tensors": tensors(job), "before": before, "lr": job.optimizer.param_groups[0]["lr"], "draws": draws()}
    if "torn" in here.said:
        ticket = ckpt.snapshot(4)
        ckpt.wait(ticket, timeout_s=WAIT_S)
        if here.rank in here.said["torn"]:
            ckpt._holding.discard(taken(ticket), "this rank was killed before it was sealed")
    ckpt.close(ended=False)
    return found


def come_back(here: Rank) -> dict[str, Any]:
    """Comes back as *said*; and, if that works, trains on, takes a snapshot, and comes back to that.

    *said* may have a place at which the last rank dies, or *all* do.
    """
    if here.rank == here.world - 1 or "all" in here.said:
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
    found["logged"] = list(here.logged)
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
        step: Any = None if here.said["arguments"] is None else ckpt.restore(**here.said["arguments"])
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
        "held": sorted(id.step for id in ckpt._holding.held()),
    }
    job.turn()
    kept(here, ckpt, 1)
    found["watermark"] = ckpt.watermark
    ckpt.close(ended=False)
    return found


class Stage(nn.Module):
    """Some layers of a pipeline under the names that they have in the whole: tied, frozen, short and empty ones."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        for layer in layers:
            block = nn.ParameterDict(
                {
                    "weight": nn.Parameter(torch.randn(4 + layer, 3)),
                    "frozen": nn.Parameter(torch.randn(5), requires_grad=False),
                    "short": nn.Parameter(torch.randn(3, 2).bfloat16()),
                    "empty": nn.Parameter(torch.randn(0, 3)),
                }
            )
            block["tied"] = block["weight"]
            self.add_module(f"layer{layer}", block)


def pipeline(here: Rank) -> dict[str, Any]:
    """A rank has as many of six layers as *said*; it trains them, or comes back to them with its parameters in another order."""
    counts = here.said["layers"]
    first = sum(counts[: here.rank])
    layers = range(first, first + counts[here.rank])
    torch.manual_seed(here.said["seed"] + first)
    model = Stage(layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    large, small = [p for p in trained if p.numel() > 6], [p for p in trained if p.numel() <= 6]
    groups = [{"params": large, "lr": 1e-2}, {"params": small, "lr": 1e-3, "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups if here.said["train"] else groups[::-1])
    ckpt = here.node.attach(model, optimizer)
    step = None if here.said["train"] else ckpt.restore()
    if here.said["train"]:
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert sealed(here, ckpt, 1)
    ckpt.close(ended=False)
    state = {n: p.detach().float().tolist() for n, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        (rate,) = {g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])} or {0.0}
        kept = optimizer.state.get(parameter, {})
        state[f"{name} trained"] = [rate, *(kept[key].float().tolist() for key in sorted(kept))]
    return {"step": step, "state": state}
