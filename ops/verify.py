"""``holdfast verify``: every checksum of every snapshot of a source; and mending what another source has sound."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import click

from ..errors import Corrupt, HoldfastError
from .answers import Asked, asking, connect, console, print_json, printable
from .checking import Checked, Checker, Fault
from .held import Snapshot, ask_holdings, choose, snapshots
from .memory import MemorySource
from .opening import source_option
from .progress import Bar, Notes
from .sources import Agents, Note, TierSource, Words, find, open_source, read_words


@click.command
@asking
@source_option
@click.option("--repair", is_flag=True, help="Write anew what is damaged in a tier and sound elsewhere.")
@click.option(
    "--from",
    "others",
    metavar="SOURCE",
    multiple=True,
    help="Where else sound bytes may be found, besides the other tiers of the same config; may be repeated.",
)
@click.argument("what", metavar="[SOURCE | [SOURCE#]SNAPSHOT]", required=False)
def verify(
    what: str | None, others: tuple[str, ...], repair: bool, source: str | None, asked: Asked, as_json: bool
) -> None:
    """Read everything and compare it with its checksums: one snapshot, or all of a source.

    In a tier these are the entries, every chunk and the metadata; in memory, agents check every block where it lies. The exit
    code is 14 if anything is damaged in the end. What agents hold is mended by agents, when they next need it.
    """
    words = read_words(what) if what else Words(None, None)
    where, notes = find(words.source or source, asked), Notes()
    if isinstance(where, Agents):
        checked = _verify_memory(words.snapshot, where.asked, notes)
        failed: list[HoldfastError] = []
    else:
        checked, failed = asyncio.run(_verify_tiers(words, source, asked, others, repair, notes))
    if as_json:
        print_json({"snapshots": [_json(one) for one in checked]})
    else:
        _show(checked, repair=repair)
    left = [fault for one in checked for fault in one.faults if not fault.mended]
    if left:
        raise Corrupt(f"{len(left)} objects are damaged, the first one {left[0].key} in {left[0].place}")
    if failed:
        raise failed[0]


# -- tiers ------------------------------------------------------------------------------------------------------------


async def _verify_tiers(
    words: Words, default: str | None, asked: Asked, others: Sequence[str], repair: bool, notes: Note
) -> tuple[list[Checked], list[HoldfastError]]:
    """What was found, and which tiers could not be looked at, or through to the end."""
    checked: list[Checked] = []
    failed: list[HoldfastError] = []
    async with AsyncExitStack() as stack:
        source = open_source(find(words.source or default, asked), notes)
        stack.push_async_callback(source.close)
        assert isinstance(source, TierSource)
        helpers = [open_source(find(other, asked), notes) for other in others]
        for helper in helpers:
            stack.push_async_callback(helper.close)
        stores = [*source.stores, *(s for helper in helpers if isinstance(helper, TierSource) for s in helper.stores)]
        memories = [helper for helper in helpers if isinstance(helper, MemorySource)]
        listed = await source.listed()
        failed += source.silent
        if words.snapshot is not None:
            named = choose(words.snapshot, [one for one in await source.snapshots() if one.ranks])
            listed = [one for one in listed if (one.id, one.world) == (named.id, named.world)]
        with Bar("verifying", 0) as bar:
            checker = Checker(stores, memories, bar, notes, repair=repair)
            for one in listed:
                for index, here in sorted(one.listed.items()):
                    if here.deleted:
                        continue
                    try:
                        checked.append(await checker.check(index, here))
                    except HoldfastError as error:
                        notes(f"{one.id} in {stores[index].url}: {error}")
                        failed.append(error)
    return checked, failed


# -- memory -----------------------------------------------------------------------------------------------------------


def _verify_memory(name: str | None, asked: Asked, note: Note) -> list[Checked]:
    answers = ask_holdings(asked)
    for silent in answers.silent:
        note(f"not answering: {silent.address} ({silent.error})")
    held = snapshots(answers.given)
    chosen = held if name is None else [choose(name, held)]
    return [_checked(snapshot, asked) for snapshot in chosen]


def _checked(snapshot: Snapshot, asked: Asked) -> Checked:
    """Have every agent that holds an image read it."""
    found = Checked("memory", snapshot.job, snapshot.id, snapshot.world, len(snapshot.ranks))
    for address in dict.fromkeys(copy.address for copy in snapshot.copies):
        with connect(address, asked.trust) as client:
            for detail in client.inspect(snapshot.id.run, snapshot.id.step).images:
                found.nbytes += detail.image.image_bytes
                if detail.bad_blocks:
                    blocks = ", ".join(map(str, detail.bad_blocks))
                    found.faults.append(
                        Fault(address, detail.image.path, f"blocks {blocks} do not match their checksum")
                    )
    return found


# -- showing ----------------------------------------------------------------------------------------------------------


def _show(checked: Sequence[Checked], *, repair: bool) -> None:
    from rich.table import Table

    out = console()
    table = Table("snapshot", "in", "ranks", "bytes read", "damaged", *(("mended",) if repair else ()))
    for one in checked:
        mended = (str(sum(fault.mended for fault in one.faults)),) if repair else ()
        ranks = f"{one.ranks} of {one.world}"
        table.add_row(
            printable(str(one.id)), printable(one.place), ranks, str(one.nbytes), str(len(one.faults)), *mended
        )
    out.print(table if checked else "there is no snapshot")
    for fault in (fault for one in checked for fault in one.faults):
        state = "mended" if fault.mended else f"not mended: {fault.hindrance}" if fault.hindrance else "damaged"
        out.print(printable(f"{state}: {fault.key} in {fault.place}: {fault.reason}"), soft_wrap=True)


def _json(one: Checked) -> dict[str, Any]:
    return {
        "source": one.place,
        "job": one.job,
        "run": one.id.run,
        "step": one.id.step,
        "generation": one.id.generation,
        "world": one.world,
        "ranks": one.ranks,
        "bytes": one.nbytes,
        "damaged": [
            {
                "place": fault.place, "key": fault.key, "reason": fault.reason, "mended": fault.mended,
                "hindrance": fault.hindrance,
            }
            for fault in one.faults
        ],
    }  # fmt: skip
