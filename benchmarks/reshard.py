"""How fast a state comes back to other ranks than it was taken by, from memory; against DCP's ``load`` from a warm local disk.

    python benchmarks/reshard.py [--size 2GB] [--rounds 3] [--worlds 2,6,4] [--folder FOLDER] [--quick]

An FSDP2 job of four ranks takes a snapshot, and saves the same state with DCP. Then new jobs of other numbers of ranks bring it
back, both ways in turn, from before the first rank begins until the last has it; everything shares this machine's cores. DCP's
files are in the page cache. The limit is the copy of the same bytes between two resident buffers, all ranks at the same time.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from durable import end_agent, size_of
from spill import verdict
from workload import Workload

_TAKEN_BY: Final = 4
_TIMEOUT_S: Final = 600.0
_OTHER, _SAME = 3.0, 5.0


def main() -> int:
    """Measure and print. A missed target is a finding, not an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="of the state, all ranks together (kB, MB, GB are powers of ten); 2GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worlds", default="2,6,4", help="how many ranks bring it back")
    parser.add_argument("--folder", type=Path, help="on a disk; a temporary one under ./.build")
    parser.add_argument("--quick", action="store_true", help="64 MB")
    options = parser.parse_args()
    nbytes = size_of(options.size or ("64MB" if options.quick else "2GB"))
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; {options.rounds} rounds", flush=True)
    base = options.folder or Path(".build")
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="holdfast-reshard-", dir=base.resolve()) as name:
        folder = Path(name)
        shm = Path("/dev/shm") / folder.name
        try:
            _job(_TAKEN_BY, "leave", nbytes, folder)
            print(
                f"\n== {nbytes / 1e6:.0f} MB, FSDP2, taken by {_TAKEN_BY} ranks; DCP's files are in the page cache =="
            )
            for world in map(int, options.worlds.split(",")):
                _show(world, [_job(world, "come_back", nbytes, folder) for _ in range(options.rounds)])
        finally:
            end_agent(shm)
            shutil.rmtree(shm, ignore_errors=True)
    return 0


def _show(world: int, rounds: list[dict[str, float]]) -> None:
    ours, theirs, copy = (statistics.median(one[way] for one in rounds) for way in ("holdfast", "dcp", "copy"))
    times = statistics.median(one["dcp"] / one["holdfast"] for one in rounds)
    print(f"{world} ranks: holdfast {ours * 1e3:.0f} ms, DCP load {theirs * 1e3:.0f} ms, bare copy {copy * 1e3:.0f} ms")
    least = _SAME if world == _TAKEN_BY else _OTHER
    verdict(f"{_TAKEN_BY} to {world} ranks, times DCP", f"{times:.1f}", f">= {least}", times >= least)


def _job(world: int, part: str, nbytes: int, folder: Path) -> dict[str, float]:
    """Run one job; the seconds that each way took."""
    (folder / "store").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, world, part, nbytes, str(folder)), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_TIMEOUT_S)
        assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
    told: dict[str, float] = json.loads((folder / "told.json").read_text())
    return told


def _rank(rank: int, world: int, part: str, nbytes: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("holdfast").setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    work = _leave if part == "leave" else _come_back
    told = work(nbytes, Path(folder))
    if rank == 0:
        (Path(folder) / "told.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def _built(nbytes: int) -> tuple[Any, Any]:
    """The workload's model, sharded, and its optimizer, with moments."""
    from torch.distributed.fsdp import fully_shard

    workload = Workload.of(nbytes, moments=False)
    for block in workload.model.blocks:
        fully_shard(block)
    fully_shard(workload.model)
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=1e-4)
    with torch.no_grad():
        for parameter in workload.model.parameters():
            first, second = parameter.detach() * 2, parameter.detach() * 3
            optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
    return workload.model, optimizer


def _attached(model: Any, optimizer: Any, folder: Path) -> Any:
    from holdfast import Checkpointer

    return Checkpointer(model, optimizer, job=folder.name, shm=f"/dev/shm/{folder.name}")


def _leave(nbytes: int, folder: Path) -> dict[str, float]:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model, optimizer = _built(nbytes)
    ckpt = _attached(model, optimizer, folder)
    ckpt.wait(ckpt.snapshot(1), "sealed")
    ckpt.close(ended=False)
    state, moments = get_state_dict(model, optimizer)
    save({"model": state, "optim": moments}, checkpoint_id=folder / "dcp")
    return {}


def _come_back(nbytes: int, folder: Path) -> dict[str, float]:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    model, optimizer = _built(nbytes)
    live = [t.to_local() for p in model.parameters() for t in (p.detach(), *_moments(optimizer, p))]
    truth = [float(t.sum()) for t in live]
    other = [torch.ones_like(t) for t in live]
    ckpt = _attached(model, optimizer, folder)
    took: dict[str, float] = {}
    for way in ("holdfast", "dcp", "copy"):
        state, moments = get_state_dict(model, optimizer)
        for tensor in live:
            tensor.zero_()
        began_s = _together()
        if way == "holdfast":
            assert ckpt.restore() == 1
        elif way == "dcp":
            load({"model": state, "optim": moments}, checkpoint_id=folder / "dcp")
        else:
            for tensor, source in zip(live, other, strict=True):
                tensor.copy_(source)
        took[way] = _together() - began_s
        found = [float(t.sum()) for t in live]
        assert way == "copy" or found == truth, f"{way} brought something else back"
    ckpt.close(ended=False)
    return took


def _moments(optimizer: Any, parameter: Any) -> list[Any]:
    return [optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")]


def _together() -> float:
    """The time at which all ranks are here."""
    import torch.distributed as dist

    dist.barrier()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
