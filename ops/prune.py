"""``holdfast prune``: remove from tiers what their retention lets go. (Agents do so by themselves, after each spill.)"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from ..errors import ConfigError
from ..storage.prune import Pruned, Pruner
from ..storage.store import open_store
from ..storage.tiers import Tier, TierSettings
from .answers import Asked, console, print_json, printable
from .quantity import show_bytes
from .sources import Agents, find


@click.command
@click.option("--dry-run", is_flag=True, help="Say what would go and why; remove nothing.")
@click.option("--keep", type=click.IntRange(min=1), help="So many of the newest complete snapshots stay.")
@click.option(
    "--milestone-steps", type=click.IntRange(min=1), help="Besides, one at or after each multiple of this stays."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; docs/cli.md names its keys.")
@click.argument("source", metavar="[SOURCE]", required=False)
def prune(source: str | None, dry_run: bool, keep: int | None, milestone_steps: int | None, as_json: bool) -> None:
    """Remove old snapshots, and what unfinished ones left, from a tier, or from all tiers of a config (HOLDFAST_CONFIG).

    A config says what each tier keeps; otherwise --keep has to. The newest complete snapshot always stays, and so does what is
    being read. This may be killed at any time: the next prune takes it up.
    """
    where = find(source or os.environ.get("HOLDFAST_CONFIG"), Asked((), named=False))
    if isinstance(where, Agents):
        raise ConfigError("nothing in memory is pruned: name a tier, or a config (HOLDFAST_CONFIG)")
    if not where.settings and keep is None:
        raise ConfigError(f"how many snapshots is {where.name} to keep? --keep, or a config, has to say")
    settings = where.settings or tuple(TierSettings.parse(Tier(url)) for url in where.urls)
    chosen = [_adjusted(one, keep, milestone_steps) for one in settings]
    done = asyncio.run(_prune(chosen, where.job or None, dry_run=dry_run))
    if as_json:
        print_json({"dry_run": dry_run, "tiers": [_json(one) for one in done]})
        return
    for one in done:
        _show(one, dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class _Done:
    url: str
    pruned: Pruned


def _adjusted(settings: TierSettings, keep: int | None, milestone_steps: int | None) -> TierSettings:
    if keep is not None:
        settings = replace(settings, keep=keep, keep_min=min(settings.keep_min, keep))
    return settings if milestone_steps is None else replace(settings, milestone_steps=milestone_steps)


async def _prune(settings: Sequence[TierSettings], job: str | None, *, dry_run: bool) -> list[_Done]:
    done: list[_Done] = []
    for one in settings:
        store = open_store(one.url)
        try:
            pruner = Pruner(store, one, job)
            done.append(_Done(one.url, Pruned(tuple(await pruner.plan())) if dry_run else await pruner.prune()))
        finally:
            await store.close()
    return done


def _show(one: _Done, *, dry_run: bool) -> None:
    from rich.table import Table

    out, removed = console(), {removal.id: removal for removal in one.pruned.removals}
    table = Table("snapshot", "", "why", title=printable(one.url), title_justify="left")
    known = {verdict.id for verdict in one.pruned.verdicts}
    for removal in one.pruned.removals:
        if removal.id not in known:
            table.add_row(str(removal.id), "gone" if removal.done else "partly gone", printable(removal.reason))
    for verdict in one.pruned.verdicts:
        state, reason = "stays", verdict.reason
        if verdict.goes:
            found = removed.get(verdict.id)
            state = "would go" if dry_run else "gone" if found is not None and found.done else "left"
            reason = reason if found is None else found.reason
        table.add_row(str(verdict.id), state, printable(reason))
    out.print(table if table.row_count else printable(f"{one.url}: no snapshots"))
    if not dry_run:
        freed = sum(removal.nbytes for removal in one.pruned.removals) + one.pruned.swept_bytes
        out.print(f"freed {show_bytes(freed)}")


def _json(one: _Done) -> dict[str, Any]:
    return {
        "url": one.url,
        "verdicts": [
            {"run": v.id.run, "step": v.id.step, "generation": v.id.generation, "goes": v.goes, "reason": v.reason}
            for v in one.pruned.verdicts
        ],
        "removals": [
            {
                "run": r.id.run, "step": r.id.step, "generation": r.id.generation, "reason": r.reason,
                "objects": r.objects, "bytes": r.nbytes, "done": r.done,
            }
            for r in one.pruned.removals
        ],
        "swept_bytes": one.pruned.swept_bytes,
    }  # fmt: skip
