"""What snapshots cost the training loop, against no snapshots, ``torch.save`` and DCP; and how fast the state comes back.

    python benchmarks/capture.py [--sizes 256MB,1GB,4GB] [--iterations 10] [--rounds 3] [--quick] [--json]

Every contender runs in a process of its own, one at a time, all of them in every round; figures are medians over the
rounds, and overheads compare with the run without snapshots of the same round. Training is simulated (``workload``): what
is measured is how long the training thread spends in a contender's hands, and how much longer its iterations take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from report import Measured, judge, show
from restart import STAGES
from trial import Segment, TrialSpec

_HERE: Final = Path(__file__).parent
_TRIAL_TIMEOUT_S: Final = 900.0
_PEERS: Final = ("torch.save", "dcp", "dcp-staged")
_LEGEND: Final = """
iteration: mean over a segment, median over rounds. overhead: against "none" in the same round.
blocked: of the training thread per snapshot, by a timer around step() and the hook before the next optimizer step: median,
maximum, and the median of the CPU time in it. compute: one thread multiplies matrices; peers write to local disk.
"""
_UNITS: Final = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes:
        iterations: of each segment; with a snapshot at every 5th step, what two snapshots take.
        cap_s: slow contenders do fewer iterations: only as many as begin within this time.
        rounds: how often. Peers, which are slower by factors, take part in the first only.
    """

    sizes: tuple[int, ...]
    iterations: int
    rounds: int
    cap_s: float
    contenders: tuple[str, ...]
    folder: str

    def segments(self) -> list[Segment]:
        """All combinations of mode and interval."""
        return [
            Segment(mode, every, self.iterations if every == 1 else 11, self.cap_s)
            for mode in ("sleep", "compute")
            for every in (1, 5)
        ]


class Bench:
    """Runs trials, one process at a time, and clears away what they leave behind."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._count = 0
        self._matmuls = 0

    def run(self) -> list[Measured]:
        """Everything, size by size."""
        self._matmuls = self._trial("calibrate", 0, [])["matmuls"]
        return [self._size(state_bytes) for state_bytes in self._plan.sizes]

    def _size(self, state_bytes: int) -> Measured:
        measured = Measured(state_bytes)
        for number in range(self._plan.rounds):
            here = self._plan.contenders if number == 0 else ("none", "holdfast")
            done: dict[str, Any] = {}
            for contender in here if number % 2 == 0 else here[::-1]:
                began_s = time.monotonic()
                done[contender] = self._trial(contender, state_bytes, self._plan.segments())
                took_s = time.monotonic() - began_s
                _say(
                    f"{state_bytes / 1e6:.0f} MB, round {number + 1} of {self._plan.rounds}: {contender} ({took_s:.0f} s)"
                )
            measured.rounds.append(done)
            measured.restarts.append(self._restart(state_bytes))
        return measured

    def _trial(self, contender: str, state_bytes: int, segments: list[Segment]) -> dict[str, Any]:
        with self._places() as (job, shm, folder):
            spec = TrialSpec(contender, state_bytes, self._matmuls, segments, folder, job, shm, bandwidth=True)
            command = [sys.executable, str(_HERE / "trial.py"), json.dumps(asdict(spec))]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return {"error": f"not done within {_TRIAL_TIMEOUT_S:g} s"}
        if done.returncode != 0 or not done.stdout:
            return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def _restart(self, state_bytes: int) -> dict[str, Any]:
        """Kill a trainer with SIGKILL, start it again; the seconds that each stage took, and the step it came back to."""
        with self._places() as (job, shm, _):
            command = [sys.executable, str(_HERE / "restart.py")]
            arguments = [str(state_bytes), job, shm]
            with subprocess.Popen([*command, "first", *arguments], stdout=subprocess.PIPE, text=True) as first:
                try:
                    assert first.stdout is not None
                    first.stdout.readline()
                    time.sleep(0.35)  # into the middle of some later iteration
                finally:
                    first.kill()
            killed_s = time.monotonic()
            again = subprocess.run([*command, "again", *arguments], stdout=subprocess.PIPE, text=True)
        if again.returncode != 0:
            return {"error": f"the second life ended with {again.returncode}"}
        told = json.loads(again.stdout.splitlines()[-1])
        ends_s = [killed_s, *told["ends_s"]]
        return {
            "stages_s": {stage: ends_s[i + 1] - ends_s[i] for i, stage in enumerate(STAGES)},
            "restore_s": told["restore_s"],
            "step": told["step"],
        }

    @contextmanager
    def _places(self) -> Iterator[tuple[str, str, str]]:
        """A job's name, its shared memory and a folder on disk; all gone afterwards, the agent too."""
        self._count += 1
        job = f"bench-{os.getpid()}-{self._count}"
        shm = Path(f"/dev/shm/holdfast-{job}")
        with tempfile.TemporaryDirectory(prefix="holdfast-bench-", dir=self._plan.folder) as folder:
            try:
                yield job, str(shm), folder
            finally:
                _end_agent(shm)
                shutil.rmtree(shm, ignore_errors=True)


def _end_agent(shm: Path) -> None:
    """Ask the agent of that folder to end, and see that it does."""
    try:
        pid = int((shm / "agent.pid").read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return
    deadline_s = time.monotonic() + 20.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _size(text: str) -> int:
    """Bytes from a text like ``256MB``."""
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def _plan(arguments: list[str]) -> tuple[Plan, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="of the state, like 256MB,1GB,4GB (kB, MB, GB are powers of ten)")
    parser.add_argument("--iterations", type=int, help="of 200 ms in each segment with a snapshot at every step")
    parser.add_argument("--rounds", type=int, help="how often every segment is measured")
    parser.add_argument("--contenders", help=f"besides none and holdfast: {', '.join(_PEERS)}, dcp-thread; or nobody")
    parser.add_argument("--folder", default=None, help="on the local disk, for the peers' files")
    parser.add_argument("--quick", action="store_true", help="one small size, two rounds: about two minutes")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON, and no tables")
    given = parser.parse_args(arguments)
    sizes = given.sizes or ("256MB" if given.quick else "256MB,1GB,4GB")
    peers = _PEERS if given.contenders is None else tuple(c for c in given.contenders.split(",") if c != "nobody")
    plan = Plan(
        sizes=tuple(_size(size) for size in sizes.split(",")),
        iterations=given.iterations or (8 if given.quick else 12),
        rounds=given.rounds or (2 if given.quick else 3),
        cap_s=2.5 if given.quick else 6.0,
        contenders=("none", "holdfast", *peers),
        folder=given.folder or tempfile.gettempdir(),
    )
    return plan, given.json


def main() -> int:
    """Measure and print. A missed target is a finding, not an error: the exit code is 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is cleared away
    plan, as_json = _plan(sys.argv[1:])
    load_before = os.getloadavg()[0]
    measured = Bench(plan).run()
    verdicts = [judge(size) for size in measured]
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}; load average {load_before:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after"
    )
    if as_json:
        document = {
            "machine": machine,
            "plan": asdict(plan),
            "sizes": [
                {**asdict(size), "targets": [asdict(v) for v in found]}
                for size, found in zip(measured, verdicts, strict=True)
            ],
        }
        print(json.dumps(document))
    else:
        print(f"{machine}\n{_LEGEND}")
        for size in measured:
            show(size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
