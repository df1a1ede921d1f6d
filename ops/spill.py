"""``holdfast spill``: have the next snapshot written to the tiers, whatever their schedule says."""

from __future__ import annotations

from typing import Any

import click

from ..agent import wire_pb2 as wire
from ..agent.client import AgentClient
from ..errors import AgentUnreachable, StateUnreachable
from .answers import Answered, Asked, ask, asking, console, print_json, printable, silent_json, tell_silent

Reply = tuple[wire.StatusReport, wire.SpillReply]


@click.command
@asking
@click.option(
    "--tiers", type=click.IntRange(min=0), default=0, help="Only to the nearest so many tiers; 0 is all.  [default: 0]"
)
def spill(asked: Asked, as_json: bool, tiers: int) -> None:
    """Ask for the next snapshot to be spilled now, on all nodes of each job that is asked.

    This returns at once. "holdfast status" shows how far it is, "holdfast ls TIER" when it is there.
    """
    jobs: set[str] = set()

    def question(client: AgentClient) -> Reply:
        report = client.status()
        return report, client.spill_now(tiers)

    answers = ask(asked, question, lambda reply: reply[0])
    if not answers.given:
        raise answers.silent[0].error if answers.silent else AgentUnreachable("no agent of yours runs on this node")
    if as_json:
        print_json({"asked": [_json(given) for given in answers.given], "silent": silent_json(answers.silent)})
    else:
        for given in answers.given:
            report, reply = given.answer
            jobs.add(report.job)
            verdict = "accepted" if reply.accepted else f"refused: {reply.reason}"
            console().print(printable(f"job {report.job}, agent {report.agent}: {verdict}"), soft_wrap=True)
        tell_silent(answers.silent)
    accepted = {given.answer[0].job for given in answers.given if given.answer[1].accepted}
    if refused := [g for g in answers.given if g.answer[0].job not in accepted]:
        raise StateUnreachable(f"job {refused[0].answer[0].job}: {refused[0].answer[1].reason}")


def _json(given: Answered[Reply]) -> dict[str, Any]:
    report, reply = given.answer
    return {"job": report.job, "agent": report.agent, "accepted": reply.accepted, "reason": reply.reason}
