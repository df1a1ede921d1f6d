"""How fast a state comes back from a local tier into a live model, with nothing of it in memory; against other ways.

    python benchmarks/restore.py [--size 4GB] [--rounds 3] [--folder FOLDER] [--quick]

Every restore happens in a process of its own, which has built its model already; with Holdfast, it has attached to a fresh
agent, too, which has reserved its slots: that takes place while a job starts, and is shown apart. What is timed is
``restore()``: listing the tier, reading and verifying, and the copy into the live tensors. Before each, the page cache is
dropped. The limit is one thread that reads one file of the same bytes with O_DIRECT into memory that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from durable import (
    PEERS,
    end_agent,
    forget_files,
    load,
    read_bare,
    resident,
    save,
    size_of,
    state_of,
    timed,
    write_bare,
)
from spill import Trainer, verdict
from workload import Workload

_BARE_SHARE: Final = 0.8
_TIMEOUT_S: Final = 300.0


def main() -> int:
    """Measure and print. A missed target is a finding, not an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="of the state (kB, MB, GB are powers of ten); 4GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on a disk; a temporary one under ./.build")
    parser.add_argument("--quick", action="store_true", help="64 MB")
    parser.add_argument("--role", nargs=3, metavar=("WAY", "BYTES", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.role:
        way, nbytes, folder = options.role
        print(json.dumps(_play(way, int(nbytes), Path(folder))), flush=True)
        return 0
    nbytes = size_of(options.size or ("64MB" if options.quick else "4GB"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is cleared away
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; {options.rounds} rounds", flush=True)
    base = options.folder or Path(".build")
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="holdfast-restore-", dir=base.resolve()) as folder:
        _write(nbytes, Path(folder))
        try:
            _measure(nbytes, options.rounds, Path(folder))
        finally:
            end_agent(_shm(Path(folder)))
            shutil.rmtree(_shm(Path(folder)), ignore_errors=True)
    return 0


def _write(nbytes: int, folder: Path) -> None:
    """The same state, in all ways."""
    with Trainer(nbytes, folder / "tier") as trainer:
        trainer.spill()
        state = state_of(trainer.workload)
        for peer in PEERS:
            (folder / peer).mkdir()
            save(peer, state, folder / peer)
        (folder / "bare").mkdir()
        write_bare(resident(trainer.workload.state_bytes), folder / "bare")


def _measure(nbytes: int, rounds: int, folder: Path) -> None:
    ways = ("holdfast", "bare", *PEERS)
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    how = ""
    for number in range(rounds):
        for way in ways[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, "--role", way, str(nbytes), str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S, check=True)
            told[way].append(json.loads(done.stdout.splitlines()[-1]))
            how = told[way][-1]["how"]
    size = told["holdfast"][0]["nbytes"]
    print(
        f"\n== {size / 1e6:.0f} MB from a disk into a live model; cold by {how}; the limit is one reader, O_DIRECT =="
    )
    for way in ways:
        wall_s = statistics.median(one["wall_s"] for one in told[way])
        cpu_s = statistics.median(one["cpu_s"] for one in told[way])
        print(f"{way:<24}{size / 1e9 / wall_s:6.2f} GB/s  {cpu_s / (size / 1e9):6.3f} CPU s/GB")
    stages = told["holdfast"]
    print(
        f"attach, before that: {statistics.median(one['attach_s'] for one in stages):.2f} s; of the restore, "
        f"the agent's part {statistics.median(one['read_s'] for one in stages):.2f} s"
    )
    for way, least in (("bare", _BARE_SHARE), *((peer, 1.0) for peer in PEERS)):
        times = statistics.median(
            other["wall_s"] / ours["wall_s"] for ours, other in zip(told["holdfast"], told[way], strict=True)
        )
        what = "speed, of the bare reader" if way == "bare" else f"speed, times {way}"
        verdict(what, f"{times:.2f}", f">= {least}", times >= least)


def _play(way: str, nbytes: int, folder: Path) -> dict[str, Any]:
    if way == "holdfast":
        return _restore(nbytes, folder)
    workload = Workload.of(nbytes)
    if way == "bare":
        memory = resident(workload.state_bytes)
        how = forget_files(folder)
        took = timed(lambda: read_bare(memory, folder / way))
    else:
        state = state_of(workload)
        _import(way)
        for tensor in state.values():
            tensor.zero_()
        how = forget_files(folder)
        with torch.no_grad():
            took = timed(lambda: load(way, state, folder / way))
        _check(state)
    return {"wall_s": took.wall_s, "cpu_s": took.cpu_s, "how": how}


def _import(way: str) -> None:
    """What the way imports when it is first used is not counted."""
    if way == "dcp":
        import torch.distributed.checkpoint  # noqa: F401
    if way == "safetensors":
        import safetensors.torch  # noqa: F401


def _restore(nbytes: int, folder: Path) -> dict[str, Any]:
    import holdfast.hooks.holding as holding
    from holdfast import Checkpointer, Tier

    workload = Workload.of(nbytes)
    state = state_of(workload)
    for tensor in state.values():
        tensor.zero_()
    shm = _shm(folder)
    (snapshot,) = (folder / "tier/entries").iterdir()
    read_s: list[float] = []
    bring = holding.Holding.materialise

    def timing(*given: Any) -> Any:
        began_s = time.perf_counter()
        answer = bring(*given)
        read_s.append(time.perf_counter() - began_s)
        return answer

    setattr(holding.Holding, "materialise", timing)  # noqa: B010 - mypy minds an assignment
    how = forget_files(folder)
    try:
        began_s = time.perf_counter()
        ckpt = Checkpointer(
            workload.model, workload.optimizer, job=_job(folder), shm=str(shm), every=1 << 30,
            tiers=[Tier(str(folder / "tier"), every=1 << 30)],
        )  # fmt: skip
        attach_s = time.perf_counter() - began_s
        agent = int((shm / "agent.pid").read_text())
        steps: list[int | None] = []
        took = timed(lambda: steps.append(ckpt.restore()), agent)
        assert steps[0] == int(snapshot.name.split("-")[1]), f"restored {steps} of {snapshot.name}"
        _check(state)
        ckpt.close()
    finally:
        end_agent(shm)
        shutil.rmtree(shm, ignore_errors=True)
    return {
        "wall_s": took.wall_s, "cpu_s": took.cpu_s, "how": how, "attach_s": attach_s, "read_s": sum(read_s),
        "nbytes": workload.state_bytes,
    }  # fmt: skip


def _shm(folder: Path) -> Path:
    """Where the agents of restoring processes keep their slots; one at a time."""
    return Path("/dev/shm") / folder.name


def _job(folder: Path) -> str:
    """The job that wrote the tier."""
    (entry,) = folder.glob("tier/entries/*/*.json")
    name: str = json.loads(entry.read_bytes())["document"]["job"]
    return name


def _check(state: dict[str, torch.Tensor]) -> None:
    """Everything is back: no tensor is left with zeros in its last places."""
    for name, tensor in state.items():
        assert tensor.view(-1)[-1] != 0, f"{name} was not restored"


if __name__ == "__main__":
    sys.exit(main())
