"""The script that runs once per rank and life: ``python -m holdfast.ops.demo.worker --out DIR …``.

It imports nothing heavy before it has written down which process it is and when it began.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from .journal import announce
from .stopwatch import Stopwatch


@click.command()
@click.option("--out", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--steps", type=int, required=True)
@click.option("--strategy", type=click.Choice(["ddp", "fsdp2"]), required=True)
@click.option("--seed", type=int, required=True)
@click.option("--protect", help="With a Checkpointer that protects so; without it, without any of Holdfast.")
@click.option("--tier", help="URL of a tier to which the Checkpointer spills.")
@click.option("--grace", "grace_s", type=float, help="Time between a preemption notice and the end that it announces.")
@click.option("--first-life", type=int, default=0, help="Number of the first life under this torchrun.")
@click.option("--store", type=click.Path(path_type=Path), help="File by which the ranks meet; else torchrun's store.")
def main(
    out: Path,
    steps: int,
    strategy: str,
    seed: int,
    protect: str | None,
    tier: str | None,
    grace_s: float | None,
    first_life: int,
    store: Path | None,
) -> None:
    """Train the demo's model as the rank that the environment says, as torchrun sets it.

    Exits with 0 at the end of training, and also when the job is preempted: that it has not finished is said in its journal.
    """
    watch = Stopwatch()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    life = first_life + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    announce(out, rank, life)

    from .training import Task, train

    watch.lap("import")
    meet = store or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    train(Task(out, steps, strategy, seed, protect, tier, grace_s, rank, world, life, meet), watch)


if __name__ == "__main__":
    main()
