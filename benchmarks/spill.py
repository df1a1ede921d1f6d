"""What it takes to have a snapshot in a tier, durably; against the bare limits and other ways to write the same state.

    python benchmarks/spill.py [--size 4GB] [--rounds 3] [--upload 256MB] [--training 1GB] [--folder FOLDER] [--quick]

Spill: from "every rank has sealed it" to the agent's word that it is persisted, the verification of the slot and every
fsync included; CPU seconds are those of trainer and agent together. Everything takes turns in every round; figures are
medians, ratios are within a round. FOLDER must be on a disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from durable import PEERS, Bytes, Took, end_agent, resident, save, size_of, state_of, timed, write_bare
from trial import Segment, TrialSpec
from workload import Workload

_HERE: Final = Path(__file__).parent
_BARE_SHARE: Final = 0.85
_TIMES_FASTER: Final = 1.5
_CPU_SHARE: Final = 1 / 3
_UPLOAD_SHARE: Final = 0.8
_SLOWDOWN: Final = 0.02
_WAIT_S: Final = 300.0


def main() -> int:
    """Measure and print. A missed target is a finding, not an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="of the state that is spilled (kB, MB, GB are powers of ten); 4GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--upload", help="how much is uploaded to an S3 server on loopback; 256MB")
    parser.add_argument("--training", help="of the state that is trained while it is spilled; 1GB")
    parser.add_argument("--only", default="disk,upload,training", help="which parts")
    parser.add_argument("--folder", type=Path, help="on a disk; a temporary one under ./.build")
    parser.add_argument("--quick", action="store_true", help="64 MB of each")
    options = parser.parse_args()
    sizes = {
        part: size_of(given or ("64MB" if options.quick else usual))
        for part, given, usual in (
            ("disk", options.size, "4GB"),
            ("upload", options.upload, "256MB"),
            ("training", options.training, "1GB"),
        )
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is cleared away
    parts: dict[str, Callable[[int, int, Path], None]] = {"disk": _disk, "upload": _upload, "training": _training}
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; {options.rounds} rounds", flush=True)
    base = options.folder or Path(".build")
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="holdfast-spill-", dir=base.resolve()) as folder:
        for part in options.only.split(","):
            parts[part](sizes[part], options.rounds, Path(folder))
    return 0


# -- figures -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What each way took, round by round."""

    nbytes: int
    took: dict[str, list[Took]] = field(default_factory=dict)

    def note(self, name: str, took: Took) -> None:
        """One more round of *name*."""
        self.took.setdefault(name, []).append(took)

    def speed(self, name: str) -> float:
        """Bytes per second."""
        return self.nbytes / statistics.median(took.wall_s for took in self.took[name])

    def cpu(self, name: str) -> float:
        """CPU seconds per GB."""
        return statistics.median(took.cpu_s for took in self.took[name]) / (self.nbytes / 1e9)

    def times(self, name: str, other: str) -> float:
        """How many times as fast as *other* *name* is."""
        return statistics.median(b.wall_s / a.wall_s for a, b in zip(self.took[name], self.took[other], strict=True))

    def cpu_share(self, name: str, other: str) -> float:
        """CPU time of *name*, as a share of that of *other*."""
        return statistics.median(
            a.cpu_s / max(b.cpu_s, 1e-9) for a, b in zip(self.took[name], self.took[other], strict=True)
        )

    def show(self, names: Sequence[str]) -> None:
        """One line for each."""
        for name in names:
            print(f"{name:<24}{self.speed(name) / 1e9:6.2f} GB/s  {self.cpu(name):6.3f} CPU s/GB")


def verdict(what: str, figure: str, limit: str, met: bool) -> None:
    """One target."""
    print(f"{what:<44}{figure:>12}  {limit:<12} {'ok' if met else 'MISSED'}", flush=True)


# -- to a disk ---------------------------------------------------------------------------------------------------------


class Trainer:
    """A state, its snapshots in an agent's memory, and a tier. A context."""

    def __init__(self, nbytes: int, tier: Path) -> None:
        from holdfast import Checkpointer, Tier

        self.workload = Workload.of(nbytes)
        self._shm = Path(f"/dev/shm/holdfast-bench-{os.getpid()}")
        self._tier = tier
        self._step = 0
        self._ckpt = Checkpointer(
            self.workload.model, self.workload.optimizer, job=self._shm.name, shm=str(self._shm), every=1 << 30,
            tiers=[Tier(str(tier), every=1 << 30, keep=1)],
        )  # fmt: skip
        self._agent = int((self._shm / "agent.pid").read_text())

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ckpt.close()
        end_agent(self._shm)
        shutil.rmtree(self._shm, ignore_errors=True)

    def spill(self) -> Took:
        """One snapshot; what it takes to persist it, once it is sealed."""
        while True:
            self._step += 1
            ticket = self._ckpt.snapshot(self._step)
            if ticket.id is not None:
                break
            time.sleep(0.05)
        self._ckpt.wait(ticket)
        os.sync()
        took = timed(lambda: self._ckpt.wait(ticket, "persisted", _WAIT_S), self._agent)
        self._await_tidy()
        return took

    def _await_tidy(self) -> None:
        """The agent removes the snapshot before this one; nobody else's time shall go into that."""
        deadline_s = time.monotonic() + _WAIT_S
        while len(list((self._tier / "snapshots").iterdir())) > 1 and time.monotonic() < deadline_s:
            self._step += 1
            self._ckpt.step(self._step)
            time.sleep(0.05)
        os.sync()


def _disk(nbytes: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with Trainer(nbytes, folder / "tier") as trainer:
        state, nbytes = state_of(trainer.workload), trainer.workload.state_bytes
        found = Found(nbytes)
        memory = resident(nbytes)
        ways: dict[str, Callable[[], Took]] = {"holdfast": trainer.spill, "bare": lambda: _bare(memory, folder)}
        for peer in PEERS:
            ways[peer] = lambda peer=peer: _saved(peer, state, folder)  # type: ignore[misc]
        trainer.spill()  # connections, libraries, threads
        for number in range(rounds):
            for name in [*ways][:: 1 if number % 2 == 0 else -1]:
                found.note(name, ways[name]())
    print(
        f"\n== {nbytes / 1e6:.0f} MB in {len(state)} tensors to a disk, durable; the limit is one writer, O_DIRECT =="
    )
    found.show([*ways])
    verdict("speed, of the bare writer", f"{found.times('holdfast', 'bare'):.2f}", f">= {_BARE_SHARE}",
            found.times("holdfast", "bare") >= _BARE_SHARE)  # fmt: skip
    for peer in PEERS:
        times, share = found.times("holdfast", peer), found.cpu_share("holdfast", peer)
        verdict(f"speed, times {peer}", f"{times:.2f}", f">= {_TIMES_FASTER}", times >= _TIMES_FASTER)
        verdict(f"CPU, of {peer}", f"{share:.2f}", f"<= {_CPU_SHARE:.2f}", share <= _CPU_SHARE)


def _bare(memory: Bytes, folder: Path) -> Took:
    with _place(folder) as place:
        return timed(lambda: write_bare(memory, place))


def _saved(peer: str, state: dict[str, torch.Tensor], folder: Path) -> Took:
    with _place(folder) as place:
        return timed(lambda: save(peer, state, place))


@contextmanager
def _place(folder: Path) -> Iterator[Path]:
    """An empty folder; before and after, nothing waits to be written."""
    os.sync()
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place)
        os.sync()


# -- to an object store ------------------------------------------------------------------------------------------------


def _upload(nbytes: int, rounds: int, folder: Path) -> None:
    from holdfast.tests.storage.weed import Weed

    tempfile.tempdir = str(folder)  # the server's data goes to the same disk
    try:
        with Trainer(nbytes, folder / "near") as trainer, Weed() as weed:
            trainer.spill()
            os.environ.update(weed.environment)
            found = asyncio.run(_uploads(trainer.workload.state_bytes, rounds, folder / "near", weed.folder()))
    finally:
        tempfile.tempdir = None
    print(
        f"\n== {found.nbytes / 1e6:.0f} MB from a tier on disk to an S3 server on loopback; the limit is obstore.put =="
    )
    found.show(["holdfast", "bare"])
    share = found.times("holdfast", "bare")
    verdict("speed, of one multipart put", f"{share:.2f}", f">= {_UPLOAD_SHARE}", share >= _UPLOAD_SHARE)


async def _uploads(nbytes: int, rounds: int, near: Path, url: str) -> Found:
    import obstore
    from holdfast.storage.reader import list_snapshots
    from holdfast.storage.store import open_store
    from holdfast.storage.writer import copy_rank

    source, memory, found = open_store(str(near)), resident(nbytes), Found(nbytes)
    bare = obstore.store.from_url(url + "-bare", client_options={"allow_http": True})
    (listed,) = await list_snapshots(source)

    async def ours(number: int) -> None:
        target = open_store(f"{url}-{number}")
        await copy_rank(source, target, listed.id, 0, 1)
        await target.close()

    async def theirs(number: int) -> None:
        await obstore.put_async(bare, f"object-{number}", memory.data, use_multipart=True, chunk_size=8 << 20)

    await theirs(-1)
    await ours(-1)
    for number in range(rounds):
        for name, work in (("holdfast", ours), ("bare", theirs))[:: 1 if number % 2 == 0 else -1]:
            os.sync()
            cpu_s, began_s = time.process_time(), time.perf_counter()
            await work(number)
            found.note(name, Took(time.perf_counter() - began_s, time.process_time() - cpu_s))
    await source.close()
    return found


# -- while training ----------------------------------------------------------------------------------------------------


def _training(nbytes: int, rounds: int, folder: Path) -> None:
    """Iterations of 200 ms in which the trainer sleeps; every 5th step is captured, and spilled or not."""
    segment = Segment("sleep", 5, 26, 60.0)
    names = ("none", "holdfast", "holdfast-tier")
    iteration_s: dict[str, list[float]] = {name: [] for name in names}
    spills: list[int] = []
    for number in range(rounds):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            result = _trial(name, nbytes, segment, folder)
            (done,) = result["segments"]
            iteration_s[name].append(done["wall_s"] / done["iterations"])
            if name == "holdfast-tier":
                spills.append(result["spills"])
    print(f"\n== {nbytes / 1e6:.0f} MB, 200 ms asleep in each iteration, a snapshot at every 5th step ==")
    for name in names:
        print(f"{name:<24}{statistics.median(iteration_s[name]) * 1e3:8.2f} ms per iteration")
    print(f"snapshots spilled, of {segment.iterations // 5}: {', '.join(map(str, spills))}")
    for what, base in (("spilled every 5th step, against no snapshots", "none"), ("of that, by the spill", "holdfast")):
        slower = statistics.median(
            a / b - 1 for a, b in zip(iteration_s["holdfast-tier"], iteration_s[base], strict=True)
        )
        verdict(what, f"{slower:+.2%}", f"<= {_SLOWDOWN:.0%}", slower <= _SLOWDOWN)


def _trial(contender: str, nbytes: int, segment: Segment, folder: Path) -> dict[str, Any]:
    job = f"holdfast-bench-{os.getpid()}"
    shm = Path("/dev/shm") / job
    with _place(folder) as place:
        spec = TrialSpec(contender, nbytes, 0, [segment], str(place), job, str(shm))
        try:
            done = subprocess.run(
                [sys.executable, str(_HERE / "trial.py"), json.dumps(asdict(spec))],
                stdout=subprocess.PIPE, text=True, timeout=_WAIT_S, check=True,
            )  # fmt: skip
        finally:
            with suppress(OSError):
                end_agent(shm)
            shutil.rmtree(shm, ignore_errors=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
