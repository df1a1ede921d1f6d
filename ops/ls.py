"""``holdfast ls``: the snapshots that are held."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..snapshot.recovery import Prospect, Rebuilt
from .answers import Asked, asking, console, print_json, printable, silent_json, tell_silent
from .held import JobHoldings, Snapshot, ask_holdings, by_job, snapshots
from .listing import list_tiers, tier_json, tier_table
from .progress import Notes
from .quantity import show_bytes, show_ranks
from .sources import Agents, find

if TYPE_CHECKING:
    from rich.table import Table


@click.command
@asking
@click.option("--sizes", is_flag=True, help="Add up what each snapshot takes in a tier; lists every object.")
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
def ls(sources: tuple[str, ...], sizes: bool, asked: Asked, as_json: bool) -> None:
    """List the snapshots that are held, newest first: in memory, or in the tiers that SOURCE names.

    SOURCE is agent://host:port, an agent's socket, a folder, s3://…, or a TOML file with tiers.
    """
    found = [find(source, asked) for source in sources or (None,)]
    documents: dict[str, list[dict[str, Any]]] = {"snapshots": [], "silent": []}
    for one in found:
        if isinstance(one, Agents):
            _list_memory(one.asked, documents, as_json=as_json)
        else:
            listed = asyncio.run(list_tiers(one, Notes(), sizes=sizes))
            documents["snapshots"] += [tier_json(held) for held in listed]
            if not as_json:
                console().print(tier_table(listed) if listed else printable(f"{one.name} holds no snapshots"))
    if as_json:
        print_json(documents)


def _list_memory(asked: Asked, documents: dict[str, list[dict[str, Any]]], *, as_json: bool) -> None:
    answers = ask_holdings(asked)
    held, jobs = snapshots(answers.given), by_job(answers.given)
    documents["snapshots"] += [_json(s, jobs[s.job].prospects[s.id]) for s in held]
    documents["silent"] += silent_json(answers.silent)
    if not as_json:
        console().print(_table(held, jobs) if held else "no snapshots are held")
        tell_silent(answers.silent)


def _table(held: Sequence[Snapshot], jobs: Mapping[str, JobHoldings]) -> Table:
    from rich.table import Table

    table = Table("job", "snapshot", "generation", "ranks held", "complete", "restorable", "bytes", "where")
    for s in held:
        table.add_row(
            printable(s.job),
            printable(str(s.id)),
            str(s.id.generation),
            f"{len(s.ranks)} of {s.world}" + ("" if s.complete else f": {show_ranks(s.ranks)}"),
            "yes" if s.complete else "no",
            _restorable(jobs[s.job].prospects[s.id]),
            show_bytes(s.nbytes),
            printable(", ".join(sorted({copy.agent for copy in s.copies}))),
        )
    return table


def _restorable(prospect: Prospect) -> str:
    """Like ``rebuilding 2-3``."""
    ranks = _rebuilt(prospect)
    return "no" if prospect.reason is not None else f"rebuilding {show_ranks(ranks)}" if ranks else "yes"


def _rebuilt(prospect: Prospect) -> list[int]:
    """The ranks whose image would be computed from its group."""
    return [source.rank for source in prospect.sources if isinstance(source, Rebuilt)]


def _json(s: Snapshot, prospect: Prospect) -> dict[str, Any]:
    return {
        "source": "memory",
        "job": s.job,
        "run": s.id.run,
        "step": s.id.step,
        "generation": s.id.generation,
        "world": s.world,
        "ranks": s.ranks,
        "complete": s.complete,
        "restorable": prospect.reason is None,
        "rebuilt": _rebuilt(prospect),
        "image_bytes": s.nbytes,
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
