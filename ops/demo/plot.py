"""The picture of a demo: one loss curve, drawn by both runs, with every kill marked. matplotlib stays optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...errors import ConfigError
from .journal import RankRecord
from .schedule import Target
from .verdict import KillCost, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LIVES_NAMED: Final = 11
"""The legend names no more lives than this: a dozen entries are the most that can be told apart."""


def check_plotting() -> None:
    """Raise ``ConfigError`` if no plot can be drawn here; to be asked before a long run, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the plot needs matplotlib: pip install 'holdfast[demo]', or run the demo with --no-plot"
        ) from error


def draw(reference: RankRecord, attacked: RankRecord, verdict: Verdict, path: Path, *, title: str) -> None:
    """Write a PNG to *path*: the losses of one rank in both runs, each life in its own colour, and the kills."""
    check_plotting()
    # The object interface: it needs no display, and leaves the global state of a caller's pyplot alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _curves(axes, reference, attacked)
    _kills(axes, verdict.costs)
    verdict_text = "equal, bit for bit" if verdict.bit_exact else f"NOT equal: {len(verdict.differences)} differences"
    axes.set_title(f"{title}\n{verdict.losses_compared} losses and the final state: {verdict_text}", fontsize=11)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"loss of rank {reference.rank}, nats per byte")
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    # Below the axes: inside, it would hide the kills on whichever side it stood.
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def _curves(axes: Axes, reference: RankRecord, attacked: RankRecord) -> None:
    undisturbed = [done for life in reference.lives for done in life.steps]
    axes.plot(
        [done.step for done in undisturbed],
        [float.fromhex(done.loss) for done in undisturbed],
        color="0.8",
        linewidth=6,
        solid_capstyle="round",
        label="reference, never killed",
    )
    for index, life in enumerate(attacked.lives):
        axes.plot(
            [done.step for done in life.steps],
            [float.fromhex(done.loss) for done in life.steps],
            color=f"C{index % 10}",
            linewidth=1.4,
            marker="." if len(life.steps) == 1 else None,
            label=f"life {life.life}, from step {life.start}" if index < _LIVES_NAMED else None,
        )


def _kills(axes: Axes, costs: Sequence[KillCost]) -> None:
    """A line at each kill: dashed, but heavy if nodes were lost, and dotted where the job was preempted and ended by itself.

    From it an arrow back to the step that training continued from.
    """
    left, right = axes.get_xlim()
    upright = axes.get_xaxis_transform()  # x in steps, y in parts of the height
    for number, cost in enumerate(costs, start=1):
        height = 0.93 - 0.07 * ((number - 1) % 5)
        lost = cost.landed.nodes  # a node that is gone for good is marked more heavily than a process
        preempted = cost.landed.target is Target.PREEMPT
        color = "darkorange" if preempted else "crimson"
        style = "-" if lost else ":" if preempted else "--"
        axes.axvline(cost.newest_step, color=color, linestyle=style, linewidth=1 if style == "--" else 2, alpha=0.7)
        text = f"{'■' if preempted else '✗'} {' and '.join(lost) or cost.landed.target.value}"
        if cost.restored_step is not None:
            text += f", restored {cost.restored_step}"
            axes.annotate(
                "",
                xy=(cost.restored_step, height - 0.02),
                xytext=(cost.newest_step, height - 0.02),
                xycoords=upright,
                textcoords=upright,
                arrowprops={"arrowstyle": "->", "color": color, "connectionstyle": "arc3,rad=-0.4"},
            )
        axes.annotate(
            text,
            xy=(cost.newest_step, height),
            xycoords=upright,
            xytext=(4, 0) if cost.newest_step < (left + right) / 2 else (-4, 0),
            textcoords="offset points",
            horizontalalignment="left" if cost.newest_step < (left + right) / 2 else "right",
            color=color,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
