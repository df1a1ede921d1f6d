"""``holdfast demo`` as the command line offers it. Light to import: torch, rich and the driver come in when it runs."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .nodes import NODES_LIMIT
from .schedule import Aim, Progress, Target

if TYPE_CHECKING:
    from rich.console import Console

    from .driver import Outcome, Plan, Watch
    from .verdict import KillCost, Verdict

_RUNS: Final = ("reference", "attacked")
_KILLED: Final = {
    Target.TRAINER: "every rank",
    Target.RANK: "{victim}",
    Target.AGENT: "{victim}",
    Target.ALL: "ranks and agents",
    Target.NODE: "{nodes}",
    Target.PREEMPT: "preempt {victim}",
}
_DIFFERENCES_SHOWN: Final = 5
_NONE: Final = "-"


@click.command()
@click.option(
    "--nodes", type=click.IntRange(1, NODES_LIMIT), default=1, show_default=True, help="Simulated if several."
)
@click.option(
    "--ranks", type=click.IntRange(1, 64), help="Training processes of each node.  [default: 2; 1 with several nodes]"
)
@click.option("--protect", metavar="K+M", default="auto", show_default=True, help="As for the Checkpointer.")
@click.option("--permute", is_flag=True, help="Have ranks move to other nodes whenever the job starts again.")
@click.option("--strategy", type=click.Choice(["ddp", "fsdp2"]), default="ddp", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Training steps of each run.")
@click.option(
    "--kill",
    "targets",
    metavar="|".join(target.value for target in Target),
    multiple=True,
    default=["trainer"],
    show_default=True,
    help="What to SIGKILL: every rank, one random rank, an agent, all ranks and agents at once; or whole nodes with their "
    "memory, one, or several at once (node,node). preempt: SIGTERM one random rank, and once all have ended by themselves, take "
    "every machine away. Given several times, they take turns.",
)
@click.option(
    "--tier", metavar="URL", help="Spill to URL/JOB too.  [default: OUT/tier if there are preemptions, else nowhere]"
)
@click.option("--kills", type=click.IntRange(0), default=3, show_default=True, help="How many kills.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of the training and of the kills.  [default: random]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="demo-out", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--plot/--no-plot", default=True, help="Draw the loss curves to OUT/loss.png.  [default: plot]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=600, show_default=True, help="In seconds.")
@click.pass_context
def demo(
    context: click.Context,
    nodes: int,
    ranks: int | None,
    protect: str,
    permute: bool,
    strategy: str,
    steps: int,
    targets: tuple[str, ...],
    tier: str | None,
    kills: int,
    seed: int | None,
    out: Path,
    as_json: bool,
    plot: bool,
    timeout_s: float,
) -> None:
    """Train a small GPT, kill it at random instants, and compare it bit for bit with a run left in peace.

    Exits with 0 only if every loss of every rank, and the final state, are those of the undisturbed run, and no preemption cost
    a step.
    """
    from .driver import Plan, run_demo

    plan = Plan(
        nodes=nodes,
        ranks=ranks or (2 if nodes == 1 else 1),
        protect=protect,
        permute=permute,
        strategy=strategy,
        steps=steps,
        targets=[Aim.parse(target) for target in targets],
        kills=kills,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        out=out,
        timeout_s=timeout_s,
        tier=tier,
    )
    if plot:
        from .plot import check_plotting

        check_plotting()
    began = time.monotonic()
    with _progress(plan, quiet=as_json) as watch:
        outcome = run_demo(plan, watch)
    report = _report(plan, outcome, time.monotonic() - began)
    if plot:
        report["plot"] = str(_plot(plan, outcome))
    out.joinpath("verdict.json").write_text(json.dumps(report, indent=2))
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(plan, outcome, report)
    verdict = outcome.verdict
    context.exit(0 if verdict.bit_exact and not verdict.broken and report["kills"] == kills else 1)


def _report(plan: Plan, outcome: Outcome, wall_s: float) -> dict[str, Any]:
    finals = [record.final or {} for record in outcome.attacked]
    return {
        **outcome.verdict.summary(),
        "kills_wanted": plan.kills,
        "seed": plan.seed,
        "steps": plan.steps,
        "nodes": plan.nodes,
        "ranks": plan.ranks,
        "protect": plan.protect,
        "strategy": plan.strategy,
        "tier": outcome.tier,
        "relaunches": outcome.relaunches,
        "skipped_in_last_life": finals[0].get("skipped", {}),
        "wall_s": round(wall_s, 1),
    }


def _plot(plan: Plan, outcome: Outcome) -> Path:
    from .plot import draw

    path = plan.out / "loss.png"
    title = f"holdfast demo: {_set_up(plan)}, seed {plan.seed}"
    draw(outcome.reference[0], outcome.attacked[0], outcome.verdict, path, title=title)
    return path


def _set_up(plan: Plan) -> str:
    """Like ``2 ranks, ddp``."""
    ranks = f"{plan.ranks} rank{'s' if plan.ranks > 1 else ''}"
    return (
        f"{plan.nodes} nodes of {ranks}, {plan.strategy}, protect {plan.protect}"
        if plan.nodes > 1
        else (f"{ranks}, {plan.strategy}")
    )


@contextlib.contextmanager
def _progress(plan: Plan, *, quiet: bool) -> Iterator[Watch]:
    """A live line per run on the terminal; only the seed, on standard error, if *quiet*."""
    if quiet:
        click.echo(f"seed {plan.seed}", err=True)  # now, as a run that fails prints no report
        yield lambda _run, _progress, _kills: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    columns = [
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]:28}"),
        TimeElapsedColumn(),
    ]
    names = "; ".join(map(str, plan.targets))
    with Display(*columns) as display:
        display.console.print(f"seed {plan.seed}; {_set_up(plan)}; kills {plan.kills} ({names})")
        tasks = {name: display.add_task(name, total=plan.steps, start=False, news="") for name in _RUNS}

        def watch(run: str, progress: Progress, kills: int) -> None:
            news = "starting" if progress.loss is None else f"loss {progress.loss:.4f}"
            news += f"  kills {kills}" if run == "attacked" else ""
            display.start_task(tasks[run])
            display.update(tasks[run], completed=progress.step, news=news)

        yield watch


def _show(plan: Plan, outcome: Outcome, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table()
    preempted = any(cost.exit_s is not None for cost in outcome.verdict.costs)
    exit_heading = ("to exit",) if preempted else ()  # eighty columns are soon full
    for heading in (
        "",
        "killed",
        "at step",
        "restored",
        "lost",
        *exit_heading,
        "restore",
        "re-protect",
        "to next step",
    ):
        table.add_column(heading, justify="right")
    for number, cost in enumerate(outcome.verdict.costs, start=1):
        table.add_row(str(number), *_row(cost, preempted=preempted))
    if outcome.landed:
        console.print(table)
    _show_verdict(console, plan, outcome, report)


def _row(cost: KillCost, *, preempted: bool) -> list[str]:
    """*preempted*: whether there is a column for the time from a notice to the exit."""
    landed = cost.landed
    exit_s = [_NONE if cost.exit_s is None else f"{cost.exit_s:.2f} s"] if preempted else []
    return [
        _KILLED[landed.target].format(victim=landed.victims[0], nodes=", ".join(landed.nodes)),
        str(cost.newest_step),
        _NONE if cost.restored_step is None else str(cost.restored_step),
        str(cost.lost_steps),
        *exit_s,
        _NONE if cost.restore_s is None else f"{cost.restore_s * 1e3:.0f} ms",
        _NONE if cost.reprotect_s is None else f"{cost.reprotect_s * 1e3:.0f} ms",
        _NONE if cost.recovery_s is None else f"{cost.recovery_s:.2f} s",
    ]


def _show_verdict(console: Console, plan: Plan, outcome: Outcome, report: dict[str, Any]) -> None:
    verdict = outcome.verdict
    if report["kills"] < plan.kills:
        console.print(f"[yellow]The run ended before kill {report['kills'] + 1} of {plan.kills}: give it more --steps.")
    stall = report["stall_ms"]
    if stall["median"] is not None:
        console.print(f"Holdfast's share of a step: median {stall['median']:.3f} ms, longest {stall['max']:.3f} ms")
    if outcome.tier is not None:
        console.print(f"Snapshots in {outcome.tier}", highlight=False, soft_wrap=True)
    console.print(f"Records in {plan.out}/" + (f", loss curves in {report['plot']}" if "plot" in report else ""))
    _show_preemptions(console, verdict)
    compared = f"{verdict.losses_compared} losses ({verdict.repeated_steps} of repeated steps) and the final state"
    if verdict.bit_exact:
        console.print(f"[bold green]Bit-exact:[/] {compared} of every rank equal the undisturbed run.")
        return
    console.print(f"[bold red]NOT bit-exact:[/] compared {compared}; {len(verdict.differences)} differences:")
    for text in verdict.differences[:_DIFFERENCES_SHOWN]:
        console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def _show_preemptions(console: Console, verdict: Verdict) -> None:
    count = sum(cost.landed.target is Target.PREEMPT for cost in verdict.costs)
    if count and not verdict.broken:
        console.print(
            f"[bold green]No step lost[/] at {count} preemption{'s' if count > 1 else ''}, with every machine taken away."
        )
    for text in verdict.broken:
        console.print("[bold red]A preemption cost more than it should:[/]", end=" ")
        console.print(text, highlight=False, markup=False, soft_wrap=True)
