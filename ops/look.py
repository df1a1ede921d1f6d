"""``holdfast inspect`` of a snapshot in a tier, or of single tensors: what is there, and what the numbers are like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .answers import Asked, console, print_json, printable
from .contents import Opened, Piece, Tensor, require_whole, select, stream, tensors
from .numbers import Stats
from .opening import opened
from .progress import Bar, Notes
from .quantity import show_bytes, show_ranks

if TYPE_CHECKING:
    from rich.console import Console


async def look(
    text: str, source: str | None, asked: Asked, patterns: tuple[str, ...], *, stats: bool, as_json: bool
) -> None:
    """Show the tensors that *patterns* match; with *stats* they are read, and every byte is verified.

    Raises:
        Corrupt: something that was read is damaged wherever it lies.
        SnapshotLost: numbers are wanted of a tensor that is not all there.
    """
    async with opened(text, source, asked, Notes()) as found:
        every = tensors({rank: image.layout for rank, image in found.images.items()})
        chosen = select(every, patterns)
        numbers = await _numbers(found, chosen) if stats else {}
        values = {} if patterns else dict(sorted(found.values_bytes.items()))
    if as_json:
        print_json(_json(found, chosen, numbers, values))
    else:
        _show(console(), found, chosen, numbers, values)


async def _numbers(found: Opened, chosen: list[Tensor]) -> dict[str, Stats]:
    require_whole(found, chosen)
    numbers = {tensor.name: Stats(tensor.dtype) for tensor in chosen}
    with Bar(str(found.id), sum(tensor.nbytes for tensor in chosen)) as bar:
        async for cell in stream(found, chosen):
            numbers[cell.tensor.name].add(cell.bytes)
            bar.advance(cell.bytes.nbytes)
    return numbers


def _show(out: Console, found: Opened, chosen: list[Tensor], numbers: dict[str, Stats], values: dict[int, int]) -> None:
    from rich.table import Column, Table

    total = show_bytes(sum(tensor.nbytes for tensor in chosen))
    out.print(
        printable(f"snapshot {found.id.run}/{found.id.step} of job {found.job}, generation {found.id.generation}: ")
        + f"{len(found.images)} of {found.world} ranks, {len(chosen)} tensors, {total}, in "
        + printable(found.source),
        soft_wrap=True,
    )
    statistics = ("min", "max", "mean", "NaN", "infinite") if numbers else ()
    table = Table(Column("tensor", overflow="fold"), "dtype", "shape", "bytes", "ranks", *statistics)
    for tensor in chosen:
        ranks = sorted({piece.rank for piece in tensor.pieces})
        own = sorted({piece.rank for piece in tensor.own})
        where = show_ranks(ranks) + (f"; {show_ranks(own)} their own" if own else "")
        cells = (printable(tensor.name), tensor.dtype, str(list(tensor.shape)), str(tensor.nbytes))
        table.add_row(*cells, where + ("" if tensor.whole else " INCOMPLETE"), *_stat_cells(numbers.get(tensor.name)))
    out.print(table)
    if values:
        out.print(f"values of ranks {show_ranks(sorted(values))}: {show_bytes(sum(values.values()))}")


def _stat_cells(stats: Stats | None) -> tuple[str, ...]:
    if stats is None:
        return ()
    shown = ("" if value is None else f"{value:.6g}" for value in (stats.low, stats.high, stats.mean))
    return (*shown, str(stats.nans), str(stats.infinities))


def _json(found: Opened, chosen: list[Tensor], numbers: dict[str, Stats], values: dict[int, int]) -> dict[str, Any]:
    return {
        "source": found.source,
        "job": found.job,
        "run": found.id.run,
        "step": found.id.step,
        "generation": found.id.generation,
        "world": found.world,
        "ranks": sorted(found.images),
        "complete": not found.missing,
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "whole": tensor.whole,
                "slices": [_piece(piece) for piece in (*tensor.pieces, *tensor.own)],
            }
            | ({"stats": _stats(numbers[tensor.name])} if numbers else {})
            for tensor in chosen
        ],
        "values": [{"rank": rank, "bytes": nbytes} for rank, nbytes in values.items()],
    }


def _piece(piece: Piece) -> dict[str, Any]:
    s = piece.slice
    return {"rank": piece.rank, "start": list(s.start), "extent": list(s.extent), "bytes": s.nbytes}


def _stats(stats: Stats) -> dict[str, Any]:
    return {
        "elements": stats.count, "min": stats.low, "max": stats.high, "mean": stats.mean, "zeros": stats.zeros,
        "nan": stats.nans, "infinite": stats.infinities,
    }  # fmt: skip
