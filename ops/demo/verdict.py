"""Was the attacked run the undisturbed one, bit for bit? And what did the kills cost? Pure: records in, verdict out."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .journal import RankRecord
from .schedule import Landed, Target

DIFFERENCES_SHOWN: Final = 20
"""How many differences a summary spells out. One wrong bit makes all later losses wrong; the first ones tell most."""


@dataclass(frozen=True, slots=True)
class KillCost:
    """What one kill cost.

    Attributes:
        newest_step: the newest that any rank had logged when the kill landed.
        restored_step: the one that training continued from; None if no process had to start again.
        lost_steps: the difference of the two.
        stop_s: from a preemption notice until the last rank left its loop, its last snapshot persisted; None if it was none.
        exit_s: from the notice to the end of the last rank's process; None likewise.
        restore_s: the slowest rank's restore in the life after the kill; None likewise.
        reprotect_s: how long protecting the restored snapshot again took then; None also where nobody could.
        recovery_s: from the kill to the first step after it; None likewise.
        split_s: where the slowest-starting rank of the life after the kill spent its time; empty likewise.
    """

    landed: Landed
    newest_step: int
    restored_step: int | None
    restore_s: float | None
    reprotect_s: float | None
    recovery_s: float | None
    split_s: Mapping[str, float]
    stop_s: float | None = None

    @property
    def lost_steps(self) -> int:
        return 0 if self.restored_step is None else self.newest_step - self.restored_step

    @property
    def exit_s(self) -> float | None:
        return self.landed.exit_s


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison. ``differences`` says in words what differs; the run is exact if and only if it is empty.

    Attributes:
        lives: how often the attacked job's processes were started, the first time included.
        repeated_steps: losses compared more than once, as their step was trained again after a kill.
        broken: preemptions that did not go as promised, with no step lost, in words.
        stalls_ms: the training thread's time in Holdfast's calls, one number per step and rank.
    """

    differences: Sequence[str]
    losses_compared: int
    repeated_steps: int
    lives: int
    costs: Sequence[KillCost]
    stalls_ms: Sequence[float]
    broken: Sequence[str] = ()

    @property
    def bit_exact(self) -> bool:
        return not self.differences

    def summary(self) -> dict[str, Any]:
        """The figures of the comparison, ready for JSON. Times that do not apply (an agent's kill) are left out."""
        stalls = sorted(self.stalls_ms)
        return {
            "bit_exact": self.bit_exact,
            "kills": len(self.costs),
            "killed": [str(cost.landed.aim) for cost in self.costs],
            "lost_nodes": [list(cost.landed.nodes) for cost in self.costs],
            "lost_steps": [cost.lost_steps for cost in self.costs],
            "preempted": [_preempted(cost) for cost in self.costs if cost.landed.target is Target.PREEMPT],
            "broken_preemptions": list(self.broken),
            "restore_s": [cost.restore_s for cost in self.costs if cost.restore_s is not None],
            "reprotect_s": [cost.reprotect_s for cost in self.costs if cost.reprotect_s is not None],
            "recovery_s": [cost.recovery_s for cost in self.costs if cost.recovery_s is not None],
            "restart_split_s": [cost.split_s for cost in self.costs if cost.split_s],
            "stall_ms": {
                "median": round(statistics.median(stalls), 4) if stalls else None,
                "max": round(stalls[-1], 4) if stalls else None,
            },
            "lives": self.lives,
            "losses_compared": self.losses_compared,
            "repeated_steps": self.repeated_steps,
            "difference_count": len(self.differences),
            "differences": list(self.differences[:DIFFERENCES_SHOWN]),
        }


def judge(
    reference: Sequence[RankRecord],
    attacked: Sequence[RankRecord],
    landed: Sequence[Landed],
    *,
    steps: int,
    moved: Collection[int] = (),
) -> Verdict:
    """Compare every loss of every life of *attacked*, and its final state, with *reference*.

    Every rank is compared with the same rank of the reference. Missing steps, steps out of order, ranks that restored
    different steps and runs that did not end are differences like a wrong bit. *moved* are the lives after which the job had
    nothing left but the tier.
    """
    differences = [f"reference: {text}" for record in reference for text in _gaps(record, steps)]
    differences += [text for record in attacked for text in _gaps(record, steps)]
    differences += _torn_restores(attacked)
    if len(reference) != len(attacked):
        differences.append(f"the reference has {len(reference)} ranks, the attacked run {len(attacked)}")
    compared = repeated = 0
    for expected, found in zip(reference, attacked, strict=False):
        losses = {done.step: done.loss for life in expected.lives for done in life.steps}
        differences += _wrong_losses(losses, found)
        differences += _wrong_final(expected, found)
        seen = [done.step for life in found.lives for done in life.steps]
        compared += len(seen)
        repeated += len(seen) - len(set(seen))
    if not compared:
        differences.append("there was no loss to compare")
    costs = [_cost(kill, attacked) for kill in landed]
    return Verdict(
        differences=differences,
        losses_compared=compared,
        repeated_steps=repeated,
        lives=len({life.life for record in attacked for life in record.lives}),
        costs=costs,
        stalls_ms=[
            done.stall_ms
            for record in attacked
            for life in record.lives
            for done in life.steps
            if done.stall_ms is not None
        ],
        broken=[
            text for cost in costs if cost.landed.target is Target.PREEMPT for text in _broken(cost, attacked, moved)
        ],
    )


def _gaps(record: RankRecord, steps: int) -> Iterator[str]:
    """What is missing in a rank's record, so that a comparison of what is there would prove too little."""
    newest = 0
    for life in record.lives:
        if life.start > newest:
            yield f"rank {record.rank}, life {life.life}: continues from step {life.start}, trained only to {newest}"
        expected = range(life.start + 1, life.start + 1 + len(life.steps))
        if [done.step for done in life.steps] != list(expected):
            yield f"rank {record.rank}, life {life.life}: its steps are not {life.start + 1}, {life.start + 2}, …"
        newest = max(newest, life.start, *(done.step for done in life.steps))
    if newest != steps:
        yield f"rank {record.rank}: ended at step {newest}, not at {steps}"
    if record.final is None:
        yield f"rank {record.rank}: has no final state"


def _torn_restores(records: Sequence[RankRecord]) -> Iterator[str]:
    """Lives that did not continue from one and the same step on every rank."""
    starts: dict[int, dict[int, int]] = {}
    for record in records:
        for life in record.lives:
            starts.setdefault(life.life, {})[record.rank] = life.start
    for life_number, start_of in sorted(starts.items()):
        if len(set(start_of.values())) > 1:
            yield f"life {life_number}: ranks continued from different steps: {start_of}"


def _wrong_losses(losses: Mapping[int, str], found: RankRecord) -> Iterator[str]:
    for life in found.lives:
        for done in life.steps:
            expected = losses.get(done.step)
            if done.loss != expected:
                yield (
                    f"rank {found.rank}, life {life.life}, step {done.step}: "
                    f"loss {done.loss}, in the reference {expected}"
                )


def _wrong_final(expected: RankRecord, found: RankRecord) -> Iterator[str]:
    if expected.final is None or found.final is None:
        return
    wanted, had = expected.final["digests"], found.final["digests"]
    for part in sorted(wanted.keys() | had.keys()):
        if wanted.get(part) != had.get(part):
            yield f"rank {found.rank}: final {part} differ from those of the reference"


def _broken(cost: KillCost, attacked: Sequence[RankRecord], moved: Collection[int]) -> Iterator[str]:
    """How the job failed to end as a preempted one should: on every rank after one and the same step, and to go on from there."""
    notice = f"notice to {cost.landed.victims[0]} at step {cost.landed.step}"
    stopped = {
        record.rank: life.stopped.step if life.stopped else None
        for record in attacked
        for life in record.lives
        if life.life == cost.landed.life
    }
    if cost.landed.life not in moved:
        yield f"{notice}: the job did not end because of it"
    elif set(stopped.values()) != {cost.newest_step}:
        yield f"{notice}: ranks stopped after different steps: {stopped}"
    elif cost.restored_step is None:
        yield f"{notice}: stopped after step {cost.newest_step}, and did not go on"
    elif cost.lost_steps:
        yield f"{notice}: stopped after step {cost.newest_step}, and went on from step {cost.restored_step}"


def _preempted(cost: KillCost) -> dict[str, Any]:
    """What one preemption came to, ready for JSON."""
    return {
        "notice_to": cost.landed.victims[0],
        "notice_at_step": cost.landed.step,
        "stopped_at_step": cost.newest_step,
        "restored_step": cost.restored_step,
        "lost_steps": cost.lost_steps,
        "stop_s": cost.stop_s,
        "exit_s": cost.exit_s,
    }


def _cost(kill: Landed, attacked: Sequence[RankRecord]) -> KillCost:
    if not kill.target.ends_life:
        return KillCost(kill, kill.step, None, None, None, None, {})
    newest = max(
        (done.step for record in attacked for life in record.lives if life.life <= kill.life for done in life.steps),
        default=0,
    )
    later = [life for record in attacked for life in record.lives if life.life > kill.life]
    first = min((life.life for life in later), default=None)
    after = [life for life in later if life.life == first]
    if not after:
        return KillCost(kill, newest, None, None, None, None, {})
    slowest = max(after, key=lambda life: sum(life.split_s.values()))
    first_steps = [life.steps[0].wall_s for life in after if life.steps]
    return KillCost(
        landed=kill,
        newest_step=newest,
        restored_step=min(life.start for life in after),
        restore_s=max(life.split_s.get("restore", 0.0) for life in after),
        reprotect_s=max((life.split_s["re-protect"] for life in after if "re-protect" in life.split_s), default=None),
        recovery_s=round(max(first_steps) - kill.wall_s, 3) if first_steps else None,
        split_s=slowest.split_s,
        stop_s=_stop_s(kill, attacked),
    )


def _stop_s(kill: Landed, attacked: Sequence[RankRecord]) -> float | None:
    ends = [life.stopped for record in attacked for life in record.lives if life.life == kill.life and life.stopped]
    if kill.target is not Target.PREEMPT or not ends:
        return None
    return round(max(end.wall_s for end in ends) - kill.wall_s, 3)
