"""``holdfast inspect --explain``: whether and how a snapshot can be restored, why no newer one can, what could still be lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import SnapshotLost
from ..snapshot.outlook import Spare
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, Origin, Persisted, Prospect, Rebuilt
from .answers import Answers, console, print_json, printable
from .held import LATEST, Holdings, JobHoldings, Snapshot, by_job, choose, snapshots
from .quantity import show_bytes, show_ranks

if TYPE_CHECKING:
    from rich.console import Console

_NOBODY: Final = "held by nobody"


@dataclass(frozen=True, slots=True)
class Explained:
    """One snapshot's prospect, and what belongs to it.

    Attributes:
        newer: every newer snapshot of the job that anybody holds or knows of, newest first.
        spare: what could still be lost; None if it cannot be restored.
    """

    snapshot: Snapshot
    job: JobHoldings
    newer: tuple[Prospect, ...]
    spare: Spare | None

    @property
    def prospect(self) -> Prospect:
        return self.job.prospects[self.snapshot.id]

    def group(self, source: Rebuilt) -> HeldParity:
        """A parity of the group that rebuilds *source*."""
        return next(p for p in self.job.parities if p.id == self.snapshot.id and p.key == source.key)


def explain(name: str, answers: Answers[Holdings], *, as_json: bool) -> None:
    """Show what can be said of snapshot *name* from what the agents hold, without reading any image.

    Raises:
        ConfigError, SnapshotUnknown: as ``choose``.
        SnapshotLost: it cannot be restored; all is shown nevertheless. Or nothing can that is held.
    """
    jobs = by_job(answers.given)
    held = _all(jobs, snapshots(answers.given))
    for error in (error for given in answers.given for error in given.answer[2].errors):
        click.echo(f"not looked into: {printable(error)}", err=True)
    if held and name == LATEST and not any(p.reason is None for job in jobs.values() for p in job.prospects.values()):
        reasons = "; ".join(_passed_over(p) for job in jobs.values() for p in job.prospects.values())
        raise SnapshotLost(f"nothing that is held can be restored: {reasons}")
    snapshot = choose(name, held, lambda s: jobs[s.job].prospects[s.id].reason is None)
    job = jobs[snapshot.job]
    newer = tuple(prospect for prospect in job.prospects.values() if prospect.id > snapshot.id)
    found = Explained(snapshot, job, newer, job.spare(snapshot.id))
    if as_json:
        print_json(_json(found))
    else:
        _show(console(), found)
    if found.prospect.reason is not None:
        raise SnapshotLost(f"{snapshot.id} cannot be restored: {found.prospect.reason}")


def _all(jobs: Mapping[str, JobHoldings], held: Sequence[Snapshot]) -> list[Snapshot]:
    """Those in memory and those in tiers alone, by job, then newest first."""
    found = {(s.job, s.id): s for s in held}
    for name, job in jobs.items():
        for part in job.stored:
            found.setdefault((name, part.id), Snapshot(name, part.id, (), part.world))
    newest_first = sorted(found.values(), key=lambda s: s.id, reverse=True)
    return sorted(newest_first, key=lambda s: s.job)


# -- showing ----------------------------------------------------------------------------------------------------------


def _show(out: Console, found: Explained) -> None:
    from rich.table import Table

    s = found.snapshot
    out.print(
        printable(f"snapshot {s.id.run}/{s.id.step} of job {s.job}, generation {s.id.generation}: {_verdict(found)}"),
        soft_wrap=True,
    )
    table = Table("rank", "image", "where it comes from")
    for rank in range(s.world):
        size, words = _where(found, rank)
        table.add_row(str(rank), size, printable(words))
    out.print(table)
    for line in _remarks(found):
        out.print(printable(line), soft_wrap=True)


def _verdict(found: Explained) -> str:
    if found.prospect.reason is not None:
        return "cannot be restored"
    better = next((p for p in found.newer if p.reason is None), None)
    return f"can be restored, but a restore takes {better.id}, which is newer" if better else "can be restored"


def _remarks(found: Explained) -> Iterator[str]:
    if found.prospect.reason is not None:
        yield found.prospect.reason
    for prospect in found.newer:
        if prospect.reason is not None:
            yield f"newer, and passed over: {_passed_over(prospect)}"
    if found.spare is not None:
        nodes = found.spare.nodes
        count = f"{nodes or 'no'} more node{'s' if nodes > 1 else ''}"
        yield f"{count}{'' if found.spare.exact else ', if not more,'} may be lost, whichever, and it can still be restored"


def _passed_over(prospect: Prospect) -> str:
    return f"{prospect.id}: {prospect.reason}"


def _where(found: Explained, rank: int) -> tuple[str, str]:
    """The size of a rank's image, and in words where it comes from."""
    source = _source(found, rank)
    if source is None:
        return "-", _NOBODY
    if isinstance(source, Held):
        return show_bytes(source.image_bytes), _held_where(found.job.attached.get(rank), source)
    if isinstance(source, Persisted):
        return (
            "-",
            f"{_NOBODY}; read from {found.job.tier_urls.get(source.tier, 'a tier')} by {', '.join(source.agents)}",
        )
    group = found.group(source)
    ranks = show_ranks(sorted(r for r in group.ranks if r != -1))
    guard = f"the group of ranks {ranks}, of whose {len(group.ranks)} members any {group.tolerance} may be lost"
    return "-", f"{_NOBODY}; rebuilt by {guard}, with the parity of {', '.join(source.agents)}"


def _held_where(attached: str | None, source: Held) -> str:
    """*attached*: the agent of the node on which the rank runs now, None if it does not run."""
    if attached is None:
        return f"{source.path} of agent {source.agent}"
    if attached == source.agent:
        return f"its own slot, {source.path} of agent {source.agent}"
    return f"fetched from {source.path} of agent {source.agent} by {attached}, where the rank runs now"


def _source(found: Explained, rank: int) -> Origin | None:
    """Of several copies that of the rank's own node; where not all can be had, what is there."""
    copies = [image for image in found.job.images if (image.id, image.rank) == (found.snapshot.id, rank)]
    own = [image for image in copies if image.agent == found.job.attached.get(rank)]
    planned = [source for source in found.prospect.sources if source.rank == rank]
    return next(iter([*own, *planned, *copies]), None)


# -- JSON: docs/cli.md lists these keys -------------------------------------------------------------------------------


def _json(found: Explained) -> dict[str, Any]:
    s, prospect = found.snapshot, found.prospect
    return {
        "job": s.job,
        **_id_json(s.id),
        "world": s.world,
        "ranks": s.ranks,
        "complete": s.complete,
        "known_complete": prospect.complete,
        "restorable": prospect.reason is None,
        "reason": prospect.reason,
        "chosen": prospect.reason is None and all(p.reason is not None for p in found.newer),
        "spare_nodes": found.spare.nodes if found.spare else None,
        "spare_exact": found.spare.exact if found.spare else None,
        "images": [_image_json(found, rank) for rank in range(s.world)],
        "newer": [{**_id_json(p.id), "reason": p.reason} for p in found.newer],
    }


def _image_json(found: Explained, rank: int) -> dict[str, Any]:
    source, attached = _source(found, rank), found.job.attached.get(rank)
    image: dict[str, Any] = {"rank": rank, "source": None, "attached": attached}
    if isinstance(source, Held):
        kind = "own" if source.agent == attached else "held"
        return image | {
            "source": kind, "agent": source.agent, "path": source.path, "image_bytes": source.image_bytes,
        }  # fmt: skip
    if isinstance(source, Persisted):
        return image | {
            "source": "tier", "tier": found.job.tier_urls.get(source.tier), "readers": list(source.agents),
        }  # fmt: skip
    if isinstance(source, Rebuilt):
        group = found.group(source)
        return image | {
            "source": "rebuilt", "parity_of": list(source.agents), "tolerance": group.tolerance,
            "group_ranks": [r for r in group.ranks if r != -1],
        }  # fmt: skip
    return image


def _id_json(id: SnapshotId) -> dict[str, Any]:
    return {"run": id.run, "generation": id.generation, "step": id.step}
