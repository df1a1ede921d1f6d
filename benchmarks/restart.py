"""A trainer to be killed, and the same trainer started again, each a process of its own.

``restart.py first BYTES JOB SHM`` trains until it is killed; it prints a line once its snapshots are being sealed.
``restart.py again BYTES JOB SHM`` prints, as JSON, the time on the system-wide monotonic clock at which each stage ended.
"""

import time

FIRST_LINE_S = time.monotonic()  # before anything else is imported: the interpreter's own start ends here

import json  # noqa: E402
import sys  # noqa: E402

STAGES = ("process start", "import torch", "build the model", "import holdfast", "attach", "restore", "first step")


def main() -> None:
    """Play the part that the first argument names."""
    role, state_bytes, job, shm = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    ends_s = [FIRST_LINE_S]
    import torch

    ends_s.append(time.monotonic())
    from workload import Workload

    torch.set_num_threads(1)
    workload = Workload.of(state_bytes, moments=role == "first")
    ends_s.append(time.monotonic())
    # Only now, so that what is counted is its own: making an optimizer imports half of torch.distributed anyway.
    from holdfast import Checkpointer
    from holdfast.errors import SnapshotSkipped

    ends_s.append(time.monotonic())
    ckpt = Checkpointer(workload.model, workload.optimizer, job=job, shm=shm)
    ends_s.append(time.monotonic())
    step = ckpt.restore() or 0
    ends_s.append(time.monotonic())
    if role == "again":
        workload.optimizer.step()
        ckpt.step(step + 1)
        ends_s.append(time.monotonic())
        print(json.dumps({"step": step, "ends_s": ends_s, "restore_s": ckpt.stats().restore_s}), flush=True)
        ckpt.close()
        return
    told = False
    while True:
        time.sleep(0.1)
        workload.optimizer.step()
        step += 1
        ticket = ckpt.step(step)
        if step >= 5 and not told and ticket is not None and ticket.id is not None:
            try:
                ckpt.wait(ticket)
            except SnapshotSkipped:  # the next one, then
                continue
            told = True
            print("sealed", flush=True)


if __name__ == "__main__":
    main()
