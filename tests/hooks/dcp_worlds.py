"""What ranks of a job do that saves and loads through ``torch.distributed.checkpoint``. Scenarios for ``worlds.run_world``."""

from __future__ import annotations

import random
from typing import Any

import holdfast
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from holdfast import crashpoints
from holdfast.errors import ConfigError
from holdfast.tests.hooks.nodes import QUICK, bits
from holdfast.tests.hooks.worlds import Net, Rank, Trained, build
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def _where(here: Rank) -> dict[str, Any]:
    return {"job": here.node.job, "shm": str(here.node.shm), "deadlines": QUICK}


def writer(here: Rank, **options: Any) -> holdfast.dcp.Writer:
    return holdfast.dcp.Writer(**{**_where(here), **options})


def state_of(job: Trained) -> dict[str, Any]:
    """As a user of DCP puts it together."""
    model, optimizer = get_state_dict(job.model, job.optimizer)
    return {"model": model, "optim": optimizer, "seen": 17}


def put_back(job: Trained, state: dict[str, Any]) -> None:
    set_state_dict(job.model, job.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def whole(value: Any) -> Any:
    """The bits of a state, however it is distributed. Collective."""
    if isinstance(value, DTensor):
        return bits(value.full_tensor())
    if isinstance(value, dict):
        return {key: whole(value[key]) for key in sorted(value)}
    return [whole(entry) for entry in value] if isinstance(value, list | tuple) else bits(value)


# -- scenarios -----------------------------------------------------------------------------------------------------------


def there_and_back(here: Rank) -> dict[str, Any]:
    """FSDP2 with AdamW: saved twice, the second time asynchronously; freshly built, loaded, and trained on alike."""
    job = build("fsdp2", here, seed=1)
    apart = dist.new_group()  # from the training's own collectives
    with writer(here) as write:
        for step in (1, 2):
            job.turn()
            if step == 1:
                dcp.save(state_of(job), checkpoint_id=f"step-{step}", storage_writer=write, process_group=apart)
            else:
                saved = dcp.async_save(state_of(job), checkpoint_id=f"step-{step}", storage_writer=write)
        wanted = bits(state_of(job))
        saved.result()  # type: ignore[union-attr]
        write.close(ended=False)
    again = build("fsdp2", here, seed=2)
    state = state_of(again)
    differed = bits(state) != wanted
    dcp.load(state, storage_reader=holdfast.dcp.Reader(**_where(here)))
    put_back(again, state)
    found = bits(state_of(again))
    for one in (job, again):
        _seed(here)
        one.turn()
    goes_on = bits(state_of(job)) == bits(state_of(again))
    return {"differed": differed, "same": found == wanted, "goes on": goes_on}


def _seed(here: Rank) -> None:
    """What a turn draws from is not part of what was saved here."""
    torch.manual_seed(here.rank)
    random.seed(here.rank)
    np.random.seed(here.rank)


def save_as(here: Rank) -> Any:
    """Save a job of the kind that the test says, to the tier that it says; the whole of it."""
    kind, url = here.said
    job = build(kind, here, seed=1)
    for _ in range(2):
        job.turn()
    state = state_of(job)
    with writer(here, tiers=[holdfast.Tier(url, every=1000)], wait="persisted") as write:
        dcp.save(state, checkpoint_id="step-2", storage_writer=write)
        write.close(ended=False)
    return whole(state)


def load_as(here: Rank) -> Any:
    """Load it into another kind of job, and shape of world; the whole of it."""
    kind, url = here.said
    job = build(kind, here, seed=2)
    state = state_of(job)
    dcp.load(state, storage_reader=holdfast.dcp.Reader(**_where(here), tiers=[holdfast.Tier(url, every=1000)]))
    put_back(job, state)
    return whole(state_of(job))


def save_protected(here: Rank) -> Any:
    """One rank on each of the nodes whose folders the test says; the whole of what is saved, protected."""
    job = build("fsdp2", here, seed=1)
    job.turn()
    state = state_of(job)
    with writer(here, **_on(here.said[here.rank]), protect="2+1") as write:
        assert not write.saves.alone
        dcp.save(state, storage_writer=write)
        write.close(ended=False)
    return whole(state)


def load_from_others(here: Rank) -> Any:
    """The same on other nodes, and of other ranks; then saved again, and loaded through the Writer."""
    job = build("fsdp2", here, seed=2)
    state = state_of(job)
    dcp.load(state, storage_reader=holdfast.dcp.Reader(**_where(here) | _on(here.said[here.rank])))
    found = whole(state)
    with writer(here, **_on(here.said[here.rank]), protect="2+1") as write:
        dcp.save(state, storage_writer=write)
        again = state_of(build("fsdp2", here, seed=3))
        dcp.load(again, checkpoint_id="2", storage_reader=holdfast.dcp.Reader(write))
    return found, whole(again)


def _on(shm: str) -> dict[str, str]:
    return {"shm": shm, "agent": f"{shm}/agent.sock"}


PLACEMENTS: tuple[tuple[Placement, ...], ...] = (
    (Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()), (Replicate(), Replicate()), (Shard(0), Shard(0)),
)  # fmt: skip


def placed(here: Rank) -> list[str]:
    """DTensors on a 2 × 2 mesh, of a shape that nothing divides: saved in each placement, loaded in each. What went wrong."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    full = {f"w{n}": torch.arange(7.0 * 5).view(7, 5) + n for n in range(len(PLACEMENTS))}
    state: dict[str, Any] = {
        name: distribute_tensor(tensor, mesh, placements)
        for (name, tensor), placements in zip(full.items(), PLACEMENTS, strict=True)
    }
    some = DeviceMesh("cpu", [0, 2])
    if here.rank in (0, 2):
        state["part"] = DTensor.from_local(torch.full((2,), float(here.rank // 2)), some, [Shard(0)])
    wrong: list[str] = []
    with writer(here) as write:
        dcp.save(state, storage_writer=write)
        for placements in PLACEMENTS:
            into = {name: distribute_tensor(torch.zeros(7, 5), mesh, placements) for name in full}
            dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
            wrong += [f"{name} {placements}" for name in full if not torch.equal(into[name].full_tensor(), full[name])]
        plain = {"part": torch.zeros(4), "w0": torch.zeros(7, 5)}
        dcp.load(plain, storage_reader=holdfast.dcp.Reader(write))
        if plain["part"].tolist() != [0, 0, 1, 1] or not torch.equal(plain["w0"], full["w0"]):
            wrong.append(f"plain: {plain}")
    return wrong


def refused(here: Rank) -> list[str]:
    """What must be refused on all ranks, and leave the Writer as it was; the messages."""
    said: list[str] = []
    group = dist.new_group([0])
    with writer(here) as write:
        for options in (
            {"no_dist": True},
            {"use_collectives": False},
            {"process_group": group} if here.rank == 0 else None,
        ):
            if options is not None:
                said.append(_failure({"w": torch.ones(2)}, write, **options))
        said.append(_failure({"w": torch.ones(2)}, write, checkpoint_id=f"step-{here.rank + 5}"))
        said.append(_failure({f"own{here.rank}": (print,) if here.rank else 1}, write))
        dcp.save({"w": torch.full((2,), 3.0)}, checkpoint_id="step-5", storage_writer=write)
        into = {"w": torch.zeros(2)}
        dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
        assert into["w"].tolist() == [3, 3]
    return said


def _failure(state: dict[str, Any], write: holdfast.dcp.Writer, **options: Any) -> str:
    try:
        dcp.save(state, storage_writer=write, **options)
    except (CheckpointException, ConfigError) as error:
        return str(error)
    return ""


def _numbered(number: int) -> dict[str, Any]:
    torch.manual_seed(number)
    return {"net": Net().state_dict(), "number": number}


def killed(here: Rank) -> None:
    """Two saves; all ranks die inside a third, at the place that the test says."""
    with writer(here) as write:
        for number in (1, 2):
            dcp.save(_numbered(number), storage_writer=write)
        here.barrier()
        crashpoints.arm(here.said[here.rank])
        dcp.save(_numbered(3), storage_writer=write)


def after(here: Rank) -> Any:
    """What the next life loads, which number that is, and what it loads after a save of its own."""
    found = []
    with writer(here) as write:
        for _ in range(2):
            into = _numbered(0)
            dcp.load(into, storage_reader=holdfast.dcp.Reader(write))
            found.append((write.step, into["number"], bits(into) == bits(_numbered(into["number"]))))
            dcp.save(_numbered(4), storage_writer=write)
    return found
