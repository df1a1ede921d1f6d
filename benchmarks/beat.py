"""What the beat costs the training thread: begun at the fence, harvested at the end of the step.

    python benchmarks/beat.py [--ranks 8] [--steps 200]

Ranks are processes on gloo that sleep where training would compute; on a machine with fewer cores than ranks, what is
waited for includes the other ranks' turns on a core, so the CPU time is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

_FORWARD_S = 0.1
_OPTIMIZER_S = 0.03


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(rank, options.ranks, options.steps, folder))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(options.ranks)]
    wall_ms, cpu_ms = (statistics.median(t[kind] for t in told) * 1e3 for kind in ("wall_s", "cpu_s"))
    verdict = "ok" if wall_ms <= 0.3 else "MISSED"
    print(f"{options.ranks} ranks on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.steps} steps")
    print(f"beat, training thread per step: median {wall_ms:.3f} ms (CPU {cpu_ms:.3f} ms)  <= 0.300 ms  {verdict}")


def _rank(rank: int, world: int, steps: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from holdfast.hooks.pulse import Pulse, Standing
    from holdfast.hooks.ranks import join
    from holdfast.snapshot.beat import Agreed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    taken: list[int] = []

    def standing() -> Standing:
        return Standing(dict.fromkeys(taken[-2:], True), able=True, relayout=False, busy_us=0)

    pulse = Pulse(join(), 2, Agreed(), dropped=lambda step: None, relayout=lambda ordinal: None)
    wall_s, cpu_s = [], []
    for step in range(1, steps + 1):
        time.sleep(_FORWARD_S)
        began = time.perf_counter(), time.thread_time()
        pulse.start(standing)
        started = time.perf_counter() - began[0], time.thread_time() - began[1]
        time.sleep(_OPTIMIZER_S)
        began = time.perf_counter(), time.thread_time()
        if pulse.harvest(step, True, standing, 10.0).take:
            taken.append(step)
        wall_s.append(time.perf_counter() - began[0] + started[0])
        cpu_s.append(time.thread_time() - began[1] + started[1])
    assert len(taken) > steps // 2, f"{len(taken)} of {steps} steps were agreed on"
    told = {"wall_s": statistics.median(wall_s), "cpu_s": statistics.median(cpu_s)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
