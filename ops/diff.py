"""``holdfast diff``: which tensors of two snapshots differ, and by how much."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from .answers import Asked, asking, console, print_json, printable
from .compare import Comparison, compare, compare_values, pair_up
from .contents import Opened, Tensor, require_whole, select, tensors
from .numbers import Difference
from .opening import only_option, opened, source_option
from .progress import Bar, Notes

if TYPE_CHECKING:
    from rich.console import Console


@click.command
@asking
@source_option
@only_option
@click.argument("a", metavar="[SOURCE#]A")
@click.argument("b", metavar="[SOURCE#]B")
@click.pass_context
def diff(
    context: click.Context, a: str, b: str, only: tuple[str, ...], source: str | None, asked: Asked, as_json: bool
) -> None:
    """Compare two snapshots, bit by bit: which tensors differ, by how much, and where other values do.

    The exit code is 0 if nothing differs, and 1 if something does. With --only, values that are no tensors are not compared.
    """
    found, sides = asyncio.run(_diff(a, b, only, source, asked))
    if as_json:
        print_json(_json(found, sides))
    else:
        _show(console(), found, sides)
    context.exit(0 if found.same else 1)


async def _diff(
    a: str, b: str, only: tuple[str, ...], source: str | None, asked: Asked
) -> tuple[Comparison, tuple[Opened, Opened]]:
    notes, found = Notes(), Comparison()
    async with opened(a, source, asked, notes) as ours, opened(b, source, asked, notes) as theirs:
        mine, others = _of(ours), _of(theirs)
        if only:  # a pattern has to match something, on either side
            names = {tensor.name for tensor in select([*mine, *others], only)}
            mine, others = ([t for t in side if t.name in names] for side in (mine, others))
        pairs = pair_up(mine, others, found)
        require_whole(ours, (pair[0] for pair in pairs))
        require_whole(theirs, (pair[1] for pair in pairs))
        with Bar(f"{ours.id} and {theirs.id}", sum(2 * tensor.nbytes for tensor, _ in pairs)) as bar:
            await compare(ours, theirs, pairs, found, bar.advance)
        if not only:
            found.values = await compare_values(ours, theirs)
    return found, (ours, theirs)


def _of(side: Opened) -> list[Tensor]:
    return tensors({rank: image.layout for rank, image in side.images.items()})


def _show(out: Console, found: Comparison, sides: tuple[Opened, Opened]) -> None:
    from rich.table import Column, Table

    for mark, side in zip("AB", sides, strict=True):
        out.print(printable(f"{mark}: {side.id} in {side.source}"), soft_wrap=True)
    table = Table(Column("tensor", overflow="fold"), "dtype", "elements that differ", "largest", "relative", "mean")
    for name, difference in found.differing.items():
        unlike = f" ({difference.unlike} not finite)" if difference.unlike else ""
        table.add_row(
            printable(name), difference.dtype, f"{difference.elements} of {difference.count}{unlike}",
            _number(difference.largest), _number(difference.relative), _number(difference.mean),
        )  # fmt: skip
    if found.differing:
        out.print(table)
    for name in found.only_a:
        out.print(f"only in A: {printable(name)}", soft_wrap=True)
    for name in found.only_b:
        out.print(f"only in B: {printable(name)}", soft_wrap=True)
    for ours, theirs in found.unlike:
        shapes = f"{ours.dtype}{list(ours.shape)} in A, {theirs.dtype}{list(theirs.shape)} in B"
        out.print(f"unlike: {printable(ours.name)}: {shapes}", soft_wrap=True)
    for rank, paths in (found.values or {}).items():
        out.print(f"values of rank {rank}: {printable(', '.join(paths))}", soft_wrap=True)
    differ = len(found.differing) + len(found.unlike) + len(found.only_a) + len(found.only_b)
    out.print("nothing differs" if found.same else f"{differ} tensors differ, {found.equal} are equal")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _json(found: Comparison, sides: tuple[Opened, Opened]) -> dict[str, Any]:
    return {
        "same": found.same,
        **{
            mark: {"source": side.source, "job": side.job, "run": side.id.run, "step": side.id.step,
                   "generation": side.id.generation}
            for mark, side in zip("ab", sides, strict=True)
        },
        "equal": found.equal,
        "differing": [_difference_json(name, difference) for name, difference in found.differing.items()],
        "only_a": found.only_a,
        "only_b": found.only_b,
        "unlike": [
            {"name": ours.name, "dtypes": [ours.dtype, theirs.dtype], "shapes": [list(ours.shape), list(theirs.shape)]}
            for ours, theirs in found.unlike
        ],
        "values": None
        if found.values is None
        else [{"rank": rank, "paths": paths} for rank, paths in found.values.items()],
    }  # fmt: skip


def _difference_json(name: str, difference: Difference) -> dict[str, Any]:
    return {
        "name": name, "dtype": difference.dtype, "elements": difference.count, "differ": difference.elements,
        "largest": difference.largest, "relative": difference.relative, "mean": difference.mean,
        "not_finite": difference.unlike,
    }  # fmt: skip
