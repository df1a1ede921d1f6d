"""``holdfast ls``: the snapshots that are held."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .answers import (
    Snapshot,
    ask,
    asking,
    console,
    holdings,
    print_json,
    printable,
    silent_json,
    snapshots,
    tell_silent,
    whom,
)
from .quantity import show_bytes, show_ranks

if TYPE_CHECKING:
    from rich.table import Table


@click.command
@asking
def ls(agents: tuple[str, ...], job: str | None, as_json: bool) -> None:
    """List the snapshots that are held, newest first."""
    answers = ask(whom(agents, job, os.environ), holdings)
    held = snapshots(answers.given)
    if as_json:
        print_json({"snapshots": [_json(s) for s in held], "silent": silent_json(answers.silent)})
        return
    console().print(_table(held) if held else "no snapshots are held")
    tell_silent(answers.silent)


def _table(held: Sequence[Snapshot]) -> Table:
    from rich.table import Table

    table = Table("job", "snapshot", "generation", "ranks held", "complete", "bytes", "where")
    for s in held:
        table.add_row(
            printable(s.job),
            printable(str(s.id)),
            str(s.id.generation),
            f"{len(s.ranks)} of {s.world}" + ("" if s.complete else f": {show_ranks(s.ranks)}"),
            "yes" if s.complete else "no",
            show_bytes(_bytes(s)),
            printable(", ".join(sorted({copy.agent for copy in s.copies}))),
        )
    return table


def _json(s: Snapshot) -> dict[str, Any]:
    return {
        "job": s.job,
        "run": s.id.run,
        "step": s.id.step,
        "generation": s.id.generation,
        "world": s.world,
        "ranks": s.ranks,
        "complete": s.complete,
        "image_bytes": _bytes(s),
        "images": [
            {
                "rank": copy.image.rank,
                "image_bytes": copy.image.image_bytes,
                "agent": copy.agent,
                "address": copy.address,
                "path": copy.image.path,
                "trainer_alive": copy.image.trainer_alive,
            }
            for copy in s.copies
        ],
    }


def _bytes(s: Snapshot) -> int:
    return sum(copy.image.image_bytes for copy in s.copies)
