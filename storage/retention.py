"""Which snapshots of one job stay in a tier, and which go. Pure: a function of a listing and of what the user wants kept.

What always stays: the newest complete snapshot; of what is newer, the newest few, as they may yet become complete; what
somebody reads. What stays because the user says so: the newest few complete ones, and milestones. Everything else goes.

Two runs of one generation both went back to the same point, and may both be alive, each thinking that it is the job. So
neither's snapshots count against the other's, until a later generation shows which of them the job went on from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from ..snapshot.record import SnapshotId

HOPES: Final = 2
"""So many incomplete snapshots of a run may become complete yet: the one being written, and one that ranks are late with.
Were it all of them, a tier in which nothing gets complete would be full one day, and stay so."""


@dataclass(frozen=True, slots=True)
class Present:
    """A snapshot of which anything is there.

    Attributes:
        in_use: somebody reads it, or copies from it.
        elsewhere: what is missing may be on other nodes' disks. They may rely on what is here.
    """

    id: SnapshotId
    complete: bool
    in_use: bool = False
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a snapshot goes, and the reason, in words for a person."""

    id: SnapshotId
    goes: bool
    reason: str


def decide(present: Iterable[Present], keep: int, milestone_steps: int | None = None) -> list[Verdict]:
    """A verdict on each snapshot, oldest first.

    Args:
        present: all snapshots of one job of which anything is there, each once, and none that is deleted already.
        keep: so many complete ones stay, the newest; at least 1.
        milestone_steps: the first complete one at or after each multiple stays, too.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: the newest complete snapshot always stays")
    listed = sorted(present, key=lambda one: one.id)
    complete = [one.id for one in listed if one.complete]
    stays = dict.fromkeys(_milestones(complete, milestone_steps), f"a milestone of every {milestone_steps} steps")
    stays |= dict.fromkeys(_newest(complete, keep), f"one of the newest {keep}")
    if complete:
        stays[complete[-1]] = "the newest complete one"
    hopeful = [one for one in listed if not one.complete and _is_hopeful(one.id, complete)]
    hope = "newer than the newest complete one" if complete else "none is complete yet"
    stays |= dict.fromkeys(_hopes(hopeful, listed), hope)
    given_up = {one.id for one in hopeful}
    verdicts = []
    for one in listed:
        reason = stays.get(one.id) or ("somebody reads it" if one.in_use else None)
        goes = f"older than the newest {keep}" if one.complete else "incomplete, and a newer one is complete"
        if one.id in given_up:
            goes = "incomplete, and newer ones have been begun"
        verdicts.append(Verdict(one.id, reason is None, reason or goes))
    return verdicts


def _newest(complete: Sequence[SnapshotId], keep: int) -> set[SnapshotId]:
    """The newest of all, and of each run of the newest generation. *complete* is in order."""
    newest = set(complete[-keep:])
    for _, ids in _runs(_last_generation(complete)):
        newest.update(ids[-keep:])
    return newest


def _is_hopeful(id: SnapshotId, complete: Sequence[SnapshotId]) -> bool:
    """Whether an incomplete snapshot would be wanted if it became complete."""
    if not complete:
        return True
    if id.generation < complete[-1].generation:
        return False
    same_run = [other for other in _last_generation(complete) if other.run == id.run]
    return id.generation > complete[-1].generation or not same_run or id > same_run[-1]


def _hopes(hopeful: Sequence[Present], listed: Sequence[Present]) -> set[SnapshotId]:
    """Those of *hopeful* that stay: the newest few of each run of the newest generation, and of all that came before."""
    stays = {one.id for one in hopeful if one.elsewhere}
    earlier = [one.id for one in hopeful if one.id.generation < listed[-1].id.generation]
    stays.update(earlier[-HOPES:])
    for _, ids in _runs(one.id for one in hopeful if one.id.generation == listed[-1].id.generation):
        stays.update(ids[-HOPES:])
    return stays


def _milestones(complete: Sequence[SnapshotId], steps: int | None) -> set[SnapshotId]:
    """The first at or after each multiple of *steps*, as each generation saw it.

    A generation sees what earlier ones left, up to where it went back to. What it then does again does not count against
    what is there of before, nor the other way round: milestones of a branch that was given up stay.
    """
    if steps is None:
        return set()
    first_step: dict[int, int] = {}
    for id in complete:
        first_step[id.generation] = min(id.step, first_step.get(id.generation, id.step))
    by_multiple: dict[int, list[SnapshotId]] = {}
    for id in complete:
        by_multiple.setdefault(id.step // steps, []).append(id)
    by_multiple.pop(0, None)
    return {id for ids in by_multiple.values() for id in ids if not any(_precedes(one, id, first_step) for one in ids)}


def _precedes(earlier: SnapshotId, later: SnapshotId, first_step: dict[int, int]) -> bool:
    """Whether *earlier* lies on the way to *later*: of a lower step, and no generation between went back behind it."""
    if earlier.step >= later.step or earlier.generation > later.generation:
        return False
    if earlier.generation == later.generation:
        return earlier.run == later.run
    return all(
        step > earlier.step
        for generation, step in first_step.items()
        if earlier.generation < generation <= later.generation
    )


def _last_generation(complete: Sequence[SnapshotId]) -> list[SnapshotId]:
    return [id for id in complete if id.generation == complete[-1].generation]


def _runs(ids: Iterable[SnapshotId]) -> list[tuple[str, list[SnapshotId]]]:
    ordered = sorted(ids, key=lambda id: (id.run, id))
    return [(run, list(group)) for run, group in groupby(ordered, key=lambda id: id.run)]
