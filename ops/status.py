"""``holdfast status``: groups, agents, trainers and slots, what was skipped and why, and what could still be lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from ..agent import wire_pb2 as wire
from ..agent.client import AgentClient
from .answers import Answered, Asked, Silent, ask, asking, console, print_json, printable, silent_json
from .groups import Group, Member, group_json, groups
from .quantity import show_bytes, show_milliseconds, show_ranks, show_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ALONE: Final = (
    "alone: no other node protects these snapshots. Whoever loses this node loses everything held in its memory."
)
_NONE: Final = "-"


@click.command
@asking
@click.option(
    "--all", "everyone", is_flag=True, help="Show the agents of all nodes, not only of this one or those named."
)
def status(asked: Asked, as_json: bool, everyone: bool) -> None:
    """Show groups, agents, trainers, slots, what was skipped and why, and what could still be lost."""
    answers = ask(asked, AgentClient.status, lambda report: report)
    shown = [answered for answered in answers.given if everyone or answered.directly]
    found = groups(answers)
    if as_json:
        print_json(
            {
                "groups": [group_json(group) for group in found],
                "agents": [_agent_json(answered) for answered in shown],
                "silent": silent_json(answers.silent),
            }
        )
        return
    out = console()
    if not answers.given and not answers.silent:
        out.print("no agent of yours runs on this node")
    for group in found:
        _show_group(out, group)
    for answered in shown:
        _show_agent(out, answered)
    if others := len(answers.given) - len(shown):
        out.print(f"{others} more agent{'s' if others > 1 else ''} on other nodes: --all shows them\n")
    for silent in answers.silent:
        _show_silent(out, silent)


# -- tables -----------------------------------------------------------------------------------------------------------


def _show_group(out: Console, group: Group) -> None:
    for line in _group_heading(group):
        out.print(printable(line), soft_wrap=True)
    out.print(_member_table(group))
    for member in group.members:
        if member.report is not None and member.report.group.trouble:
            out.print(printable(f"  {member.agent}: {member.report.group.trouble}"), soft_wrap=True)
    out.print()


def _group_heading(group: Group) -> Iterator[str]:
    n, spare = len(group.members), group.spare
    yield f"group of {n} nodes, job {group.job}: any {group.tolerance} may be lost with their memory"
    if group.protected is None:
        yield "  nothing is protected yet"
        return
    steps = group.lag_steps or 0
    lag = f"{steps} step{'s' if steps != 1 else ''} behind training"
    now = f"{spare} more may be lost now" if spare >= 0 else f"{-spare} more than that cannot be reached"
    yield f"  newest protected {group.protected}, {lag}; {now}"


def _member_table(group: Group) -> Table:
    from rich.table import Table

    table = Table("node", "address", "ranks", "reachable", "protected", "parity", "pulled", "in", "damaged blocks")
    for member in group.members:
        table.add_row(
            printable(member.agent),
            printable(member.address),
            show_ranks(member.ranks),
            "yes" if member.reachable else "NO",
            *_member_figures(member),
        )
    return table


def _member_figures(member: Member) -> Iterator[str]:
    """Its newest protected snapshot, the bytes of its parity, and what the last protection took."""
    yield _NONE if member.protected is None else printable(str(member.protected))
    if member.report is None:
        yield from [_NONE] * 4
        return
    own = member.report.group
    yield show_bytes(own.parity_bytes)
    yield show_bytes(own.pulled_bytes)
    yield show_milliseconds(own.protect_s)
    yield str(own.damaged)


def _show_agent(out: Console, answered: Answered[wire.StatusReport]) -> None:
    for line in _heading(answered.address, answered.answer):
        out.print(printable(line), soft_wrap=True)
    out.print(_trainer_table(answered.answer) if answered.answer.trainers else "  no trainer has been attached")
    out.print(_slot_table(answered.answer) if answered.answer.slots else "  no slots")
    if answered.answer.tiers:
        out.print(_tier_table(answered.answer))
        for tier in answered.answer.tiers:
            if tier.trouble:
                out.print(printable(f"  {tier.url}: {tier.trouble}"), soft_wrap=True)
    if answered.answer.foreign:
        names = ", ".join(printable(name) for name in answered.answer.foreign)
        out.print(f"  files that are not ours, left alone: {names}", soft_wrap=True)
    out.print()


def _show_silent(out: Console, silent: Silent) -> None:
    out.print(f"{printable(silent.address)}: not answering", soft_wrap=True)
    out.print(f"  {printable(str(silent.error))}\n", soft_wrap=True)


def _heading(address: str, r: wire.StatusReport) -> Iterator[str]:
    idle = f", nobody attached for {show_seconds(r.idle_s)}" if r.idle_s else ""
    yield f"agent {r.agent}, job {r.job}, pid {r.pid}, holdfast {r.version}, up {show_seconds(r.uptime_s)}{idle}"
    yield f"  asked at {address}; answers at {r.listen}; shared memory in {r.shm}"
    limit = f"of {show_bytes(r.limit_bytes)} allowed" if r.limit_bytes else "and no limit declared"
    yield f"  memory {show_bytes(r.reserved_bytes)} reserved {limit}"
    if r.alone:
        yield f"  {_ALONE}"


def _trainer_table(report: wire.StatusReport) -> Table:
    from rich.table import Table

    table = Table("rank", "trainer", "step", "watermark", "taken", "last stall", "last copy", "copied", "skipped")
    for trainer in report.trainers:
        t = _trainer_json(trainer)
        table.add_row(
            f"{t['rank']}/{t['world']}",
            f"{t['state']}, pid {t['pid']}",
            _shown(t["step"]),
            _shown(t["watermark"]),
            _shown(t["taken"]),
            _NONE if t["last_stall_s"] is None else show_milliseconds(t["last_stall_s"]),
            _NONE if t["last_copy_s"] is None else show_milliseconds(t["last_copy_s"]),
            _copied(t["copied_bytes"], t["image_bytes"]),
            _skips(t["skipped"]),
        )
    return table


def _copied(copied_bytes: int | None, image_bytes: int | None) -> str:
    """Like ``1.2 MiB of 120.0 MiB``: the rest lay in the slot already."""
    if copied_bytes is None or image_bytes is None:
        return _NONE
    return f"{show_bytes(copied_bytes)} of {show_bytes(image_bytes)}"


def _skips(skipped: dict[str, int]) -> str:
    """Like ``7: slots-busy 5, agent-away 2``."""
    if not skipped:
        return "0"
    reasons = sorted(skipped.items(), key=lambda entry: (-entry[1], entry[0]))
    return f"{sum(skipped.values())}: {', '.join(f'{printable(reason)} {count}' for reason, count in reasons)}"


def _slot_table(report: wire.StatusReport) -> Table:
    from rich.table import Table

    table = Table("rank", "slot", "state", "snapshot", "image", "capacity")
    for slot in report.slots:
        held = slot.state == "sealed"
        table.add_row(
            str(slot.rank),
            str(slot.index),
            printable(slot.state),
            f"{printable(slot.run[:8])}/{slot.step}" if held else _NONE,
            show_bytes(slot.image_bytes) if held else _NONE,
            show_bytes(slot.capacity_bytes),
        )
    return table


def _tier_table(report: wire.StatusReport) -> Table:
    from rich.table import Table

    table = Table("tier", "newest here", "behind", "last spill", "in", "images", "failed", "waiting", "pruned")
    for tier in report.tiers:
        t = _tier_json(report, tier)
        newest = t["newest"]
        table.add_row(
            printable(t["url"]),
            printable(f"{newest['run'][:8]}/{newest['step']}") if newest else _NONE,
            _NONE if t["lag_steps"] is None else f"{t['lag_steps']} step{'s' if t['lag_steps'] != 1 else ''}",
            show_bytes(t["spilled_bytes"]) if t["spills"] else _NONE,
            show_seconds(t["spill_s"]) if t["spills"] else _NONE,
            str(t["spills"]),
            str(t["failures"]),
            str(t["queued"]),
            str(t["pruned"]),
        )
    return table


def _shown(value: int | None) -> str:
    return _NONE if value is None else str(value)


# -- JSON: docs/cli.md lists these keys -------------------------------------------------------------------------------


def _agent_json(answered: Answered[wire.StatusReport]) -> dict[str, Any]:
    r = answered.answer
    return {
        "address": answered.address,
        "agent": r.agent,
        "version": r.version,
        "job": r.job,
        "pid": r.pid,
        "uptime_s": r.uptime_s,
        "idle_s": r.idle_s,
        "shm": r.shm,
        "listen": r.listen,
        "alone": r.alone,
        "reserved_bytes": r.reserved_bytes,
        "limit_bytes": r.limit_bytes or None,
        "trainers": [_trainer_json(trainer) for trainer in r.trainers],
        "slots": [_slot_json(slot) for slot in r.slots],
        "foreign": list(r.foreign),
        "tiers": [_tier_json(r, tier) for tier in r.tiers],
    }


def _tier_json(report: wire.StatusReport, tier: wire.TierStatus) -> dict[str, Any]:
    there = tier.HasField("newest")
    steps = [t.report.step for t in report.trainers if t.report.ByteSize()]
    steps += [slot.step for slot in report.slots if slot.state == "sealed"]
    newest = {"run": tier.newest.run, "generation": tier.newest.generation, "step": tier.newest.step}
    return {
        "url": tier.url,
        "newest": newest if there else None,
        "lag_steps": max(0, max(steps) - tier.newest.step) if there and steps else None,
        "spilled_bytes": tier.spilled_bytes,
        "spill_s": tier.spill_s,
        "spills": tier.spills,
        "failures": tier.failures,
        "trouble": tier.trouble,
        "queued": tier.queued,
        "pruned": tier.pruned,
    }


def _trainer_json(t: wire.TrainerStatus) -> dict[str, Any]:
    report = t.report
    told = report.ByteSize() > 0  # a trainer that has ended a step has a step to tell
    return {
        "rank": t.rank,
        "world": t.world,
        "pid": t.pid,
        "state": "alive" if t.alive else "ended" if t.ended else "gone",
        "step": report.step if told else None,
        "watermark": report.watermark if told and report.watermark >= 0 else None,
        "taken": report.taken if told else None,
        "skipped": dict(report.skipped),
        "last_stall_s": report.last_stall_s if told else None,
        "last_copy_s": report.last_copy_s if told else None,
        "image_bytes": report.image_bytes or None,
        "copied_bytes": report.copied_bytes or None,
    }


def _slot_json(slot: wire.SlotStatus) -> dict[str, Any]:
    held = slot.state == "sealed"
    return {
        "rank": slot.rank,
        "slot": slot.index,
        "state": slot.state,
        "run": slot.run if held else None,
        "generation": slot.generation if held else None,
        "step": slot.step if held else None,
        "image_bytes": slot.image_bytes if held else None,
        "capacity_bytes": slot.capacity_bytes,
    }
