"""What ``ls`` shows of tiers: from their listings, and one entry of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..errors import HoldfastError
from ..snapshot.record import SnapshotId
from ..storage.names import data_of
from ..storage.reader import Listed, read_entry
from ..storage.store import Store, open_store
from .answers import printable
from .quantity import show_bytes, show_ranks
from .sources import Note, Tiers, TierSource

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class InTier:
    """A snapshot in one tier.

    Attributes:
        job: empty if no entry of it can be read.
        committed_s: when the last of its entries was written, by the store's clock.
        stored_bytes: what its objects take; None if nobody asked.
    """

    url: str
    job: str
    listed: Listed
    committed_s: float
    stored_bytes: int | None

    @property
    def id(self) -> SnapshotId:
        """Its identity."""
        return self.listed.id


async def list_tiers(tiers: Tiers, note: Note, *, sizes: bool) -> list[InTier]:
    """All snapshots of each tier, nearest tier first, newest snapshot first."""
    source = TierSource(tiers.name, [open_store(url) for url in tiers.urls], note, tiers.job)
    try:
        found = await source.listed()
        jobs: dict[str, str] = {}  # of runs
        return [
            await _look(store, one.listed[index], jobs, note, sizes=sizes)
            for index, store in enumerate(source.stores)
            for one in reversed(found)
            if index in one.listed
        ]
    finally:
        await source.close()


async def _look(store: Store, listed: Listed, jobs: dict[str, str], note: Note, *, sizes: bool) -> InTier:
    run = listed.id.run
    for rank in sorted(listed.entries)[: 0 if run in jobs else 3]:
        try:
            jobs[run] = (await read_entry(store, listed.id, rank, listed.world)).job
            break
        except HoldfastError as error:
            note(str(error))
    committed_s = max((found.modified_s for found in listed.entries.values()), default=0.0)
    stored = sum(found.nbytes for found in await store.list(data_of(listed.id))) if sizes else None
    return InTier(store.url, jobs.get(run, ""), listed, committed_s, stored)


def tier_table(found: Sequence[InTier]) -> Table:
    """For people."""
    from rich.table import Table

    sizes = found[0].stored_bytes is not None
    table = Table(
        "tier", "job", "snapshot", "generation", "ranks", "complete", "written", *(("bytes",) if sizes else ())
    )
    for one in found:
        ranks = sorted(one.listed.entries)
        table.add_row(
            printable(one.url),
            printable(one.job),
            str(one.id),
            str(one.id.generation),
            f"{len(ranks)} of {one.listed.world}" + ("" if one.listed.complete else f": {show_ranks(ranks)}"),
            "deleted" if one.listed.deleted else "yes" if one.listed.complete else "no",
            _time(one.committed_s).replace("+00:00", "Z"),
            *((show_bytes(one.stored_bytes),) if one.stored_bytes is not None else ()),
        )
    return table


def tier_json(one: InTier) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "source": one.url,
        "job": one.job,
        "run": one.id.run,
        "step": one.id.step,
        "generation": one.id.generation,
        "world": one.listed.world,
        "ranks": sorted(one.listed.entries),
        "complete": one.listed.complete,
        "deleted": one.listed.deleted,
        "committed": _time(one.committed_s),
        "stored_bytes": one.stored_bytes,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
