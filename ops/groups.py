"""The groups of a job, put together from what their members say: who is there, what is protected, what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..agent import wire_pb2 as wire
from ..agent.client import id_of
from ..errors import AgentUntrusted
from ..snapshot.record import SnapshotId
from .answers import Answers


@dataclass(frozen=True, slots=True)
class Member:
    """One agent of a group. ``report`` is what it said itself, None if it did not answer."""

    agent: str
    address: str
    ranks: tuple[int, ...]
    reachable: bool
    report: wire.StatusReport | None

    @property
    def protected(self) -> SnapshotId | None:
        """The newest snapshot of which it holds all its parity."""
        if self.report is None or not self.report.group.HasField("protected"):
            return None
        return id_of(self.report.group.protected)


@dataclass(frozen=True, slots=True)
class Group:
    """Agents that protect each other. *tolerance* is m, as long as all are there."""

    job: str
    tolerance: int
    members: tuple[Member, ...]

    @property
    def spare(self) -> int:
        """How many more members may be lost; below 0, too many are."""
        return self.tolerance - sum(not member.reachable for member in self.members)

    @property
    def protected(self) -> SnapshotId | None:
        """The newest snapshot of which every member that answered holds all its parity; None if there is none."""
        held = [member.protected for member in self.members if member.report is not None]
        known = [id for id in held if id is not None]
        return min(known) if known and len(known) == len(held) else None

    @property
    def newest_step(self) -> int | None:
        """The newest step that a member's trainers have ended, or that lies in one of its slots."""
        reports = [member.report for member in self.members if member.report is not None]
        steps = [t.report.step for r in reports for t in r.trainers if t.report.ByteSize()]
        return max([*steps, *(slot.step for r in reports for slot in r.slots if slot.state == "sealed")], default=None)

    @property
    def lag_steps(self) -> int | None:
        """How far the newest protected snapshot is behind training."""
        if self.protected is None or self.newest_step is None:
            return None
        return max(0, self.newest_step - self.protected.step)


def groups(answers: Answers[wire.StatusReport]) -> list[Group]:
    """The groups that those who answered are in, by job, then in the order of their first ranks."""
    reports = [answered.answer for answered in answers.given]
    said = {(r.job, r.agent): r for r in reports}
    # Who could not be asked for want of a certificate may well be there: then their peers' word counts.
    unasked = {silent.address for silent in answers.silent if isinstance(silent.error, AgentUntrusted)}
    views: dict[tuple[str, tuple[tuple[str, str], ...]], list[wire.GroupStatus]] = {}
    for r in reports:
        if r.HasField("group"):
            names = tuple((member.agent, member.address) for member in r.group.members)
            views.setdefault((r.job, names), []).append(r.group)
    found = [
        Group(job, view[0].tolerance, tuple(_members(job, view, said, unasked))) for (job, _), view in views.items()
    ]
    return sorted(found, key=lambda group: (group.job, group.members[0].ranks[:1]))


def _members(
    job: str, views: list[wire.GroupStatus], said: dict[tuple[str, str], wire.StatusReport], unasked: set[str]
) -> Iterator[Member]:
    for index, member in enumerate(views[0].members):
        report = said.get((job, member.agent))
        seen = member.address in unasked and all(view.members[index].reachable for view in views)
        yield Member(member.agent, member.address, tuple(member.ranks), report is not None or seen, report)


def group_json(group: Group) -> dict[str, Any]:
    """For ``--json``: docs/cli.md lists these keys."""
    protected = group.protected
    return {
        "job": group.job,
        "tolerance": group.tolerance,
        "spare": group.spare,
        "protected": None if protected is None else _id_json(protected),
        "newest_step": group.newest_step,
        "lag_steps": group.lag_steps,
        "members": [_member_json(member) for member in group.members],
    }


def _member_json(member: Member) -> dict[str, Any]:
    own = member.report.group if member.report is not None else None
    protected = member.protected
    return {
        "agent": member.agent,
        "address": member.address,
        "ranks": list(member.ranks),
        "reachable": member.reachable,
        "protected": None if protected is None else _id_json(protected),
        "parity_bytes": own.parity_bytes if own else None,
        "pulled_bytes": own.pulled_bytes if own else None,
        "protect_s": own.protect_s if own else None,
        "damaged_blocks": own.damaged if own else None,
        "trouble": own.trouble if own else None,
    }


def _id_json(id: SnapshotId) -> dict[str, Any]:
    return {"run": id.run, "generation": id.generation, "step": id.step}
