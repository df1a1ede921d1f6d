"""A worker of an elastic job, as torchrun starts it: trains until it is told to stop, and writes down all that it was.

    torchrun … elastic.py FOLDER

``FOLDER/<node>.jsonl`` gets a line for every life and every step; once ``FOLDER/stop`` is there, all ranks end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from holdfast import Checkpointer
from holdfast.tests.hooks.reshards import tensors
from holdfast.tests.hooks.worlds import Net, Trained
from torch.distributed.fsdp import fully_shard


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = Net()
    fully_shard(model)
    job = Trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    log = (folder / f"{os.environ['HOLDFAST_SHM'].rpartition('/')[2]}.jsonl").open("a", buffering=1)

    def write(**entry: Any) -> None:
        log.write(json.dumps({"rank": dist.get_rank(), "world": dist.get_world_size(), **entry}) + "\n")

    with Checkpointer(job.model, job.optimizer) as ckpt:
        start = ckpt.restore() or 0
        write(restored=start, tensors=tensors(job))
        for step in range(start + 1, 1_000_000):
            job.turn()
            ckpt.step(step)
            write(step=step, tensors=tensors(job), watermark=ckpt.watermark)
            stop = torch.tensor(float((folder / "stop").exists()))
            dist.all_reduce(stop)
            if stop:
                return
            time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
