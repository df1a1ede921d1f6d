"""``holdfast inspect``: the tensors of one snapshot, where they lie, and whether their bytes are sound."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..agent import wire_pb2 as wire
from ..agent.trust import Trust
from ..errors import ConfigError, Corrupt
from ..snapshot.layout import Layout
from .answers import Asked, asking, connect, console, print_json, printable, tell_silent
from .held import LATEST, Snapshot, ask_holdings, choose, snapshots
from .look import look
from .opening import source_option
from .quantity import show_bytes
from .sources import Agents, find, named_snapshot

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's slice of a tensor, or its values (then *start* and *extent* are empty), with what its bytes add up to.

    ``damaged``: some block that these bytes touch does not match the checksum it was sealed with.
    """

    rank: int
    start: tuple[int, ...]
    extent: tuple[int, ...]
    nbytes: int
    crc: int
    damaged: bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """One global tensor and the slices of it that are held, in rank order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything in the images of one snapshot."""

    snapshot: Snapshot
    images: tuple[wire.ImageDetail, ...]
    tensors: tuple[Tensor, ...]
    values: tuple[Part, ...]

    @property
    def damaged(self) -> list[wire.ImageDetail]:
        """The images that have damaged blocks."""
        return [image for image in self.images if image.bad_blocks]


@click.command
@asking
@source_option
@click.option("--explain", "explained", is_flag=True, help="Say whether and how it can be restored; read no image.")
@click.option("--stats", is_flag=True, help="Smallest, largest and mean element of each tensor, and how many are NaN.")
@click.argument("snapshot", metavar="[[SOURCE#]RUN/STEP]", default=LATEST)
@click.argument("patterns", metavar="[TENSOR]...", nargs=-1)
def inspect(
    snapshot: str,
    patterns: tuple[str, ...],
    source: str | None,
    asked: Asked,
    as_json: bool,
    explained: bool,
    stats: bool,
) -> None:
    """Show the tensors of one snapshot. Of one in memory, every byte is checked.

    RUN may be cut short as far as it stays unambiguous, and left out where only one run holds that step. 'latest', which is
    what is meant if nothing is said, is the newest complete snapshot, RUN/latest that of one run.

    With TENSOR, which may be a pattern such as 'model.*', show these tensors only. What lies in a tier is read only for --stats;
    "holdfast verify" checks all of it.

    With --explain, say whether and how it can be restored, why no newer one can, and what could still be lost; 'latest' then
    is the one that a restore would choose.
    """
    words = named_snapshot(snapshot)
    where = find(words.source or source, asked)
    if isinstance(where, Agents) and not (patterns or stats):
        _inspect_memory(words.snapshot or LATEST, where.asked, as_json, explained)
        return
    if explained:
        raise ConfigError("--explain is for snapshots in memory, and for whole ones")
    asyncio.run(look(snapshot, source, asked, patterns, stats=stats, as_json=as_json))


def _inspect_memory(snapshot: str, asked: Asked, as_json: bool, explained: bool) -> None:
    """Have the agents read it where it lies."""
    answers = ask_holdings(asked, tiers=explained)
    tell_silent(answers.silent)
    if explained:
        from .explain import explain

        explain(snapshot, answers, as_json=as_json)
        return
    chosen = choose(snapshot, snapshots(answers.given))
    contents = _read(chosen, asked.trust)
    if as_json:
        print_json(_json(contents))
    else:
        _show(console(), contents)
    if contents.damaged:
        images = "; ".join(
            f"{d.image.path} (rank {d.image.rank}): {len(d.bad_blocks)} of {_block_count(d)} blocks"
            for d in contents.damaged
        )
        raise Corrupt(f"{chosen.id} has blocks that do not match their checksum: {images}")


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(snapshot: Snapshot, trust: Trust | None) -> Contents:
    """Have every agent that holds an image of *snapshot* read it in full. Of several copies, a sound one is shown."""
    details: list[wire.ImageDetail] = []
    for address in dict.fromkeys(copy.address for copy in snapshot.copies):
        with connect(address, trust) as client:
            details += client.inspect(snapshot.id.run, snapshot.id.step).images
    details.sort(key=lambda detail: (detail.image.rank, len(detail.bad_blocks)))
    best = list({detail.image.rank: detail for detail in reversed(details)}.values())[::-1]
    return Contents(snapshot, tuple(details), tuple(tensors_of(best)), tuple(map(_values_of, best)))


def tensors_of(details: Iterable[wire.ImageDetail]) -> Iterator[Tensor]:
    """The tensors in some images, in the order in which they first appear; slices in that of the images."""
    found: dict[tuple[str, str, tuple[int, ...]], list[Part]] = {}
    for detail in details:
        layout = Layout.from_text(detail.layout)
        for placed, crc in zip(layout.placed, detail.slice_crc, strict=True):
            s = placed.slice
            part = Part(
                detail.image.rank, s.start, s.extent, s.nbytes, crc, _damaged(detail, placed.offset, placed.end)
            )
            found.setdefault((s.name, s.dtype, s.shape), []).append(part)
    for (name, dtype, shape), parts in found.items():
        yield Tensor(name, dtype, shape, tuple(parts))


def _values_of(detail: wire.ImageDetail) -> Part:
    """The eager values of one image: RNG, loader position, and whatever else is no tensor."""
    start, end = Layout.from_text(detail.layout).values_offset, detail.image.image_bytes
    return Part(detail.image.rank, (), (), end - start, detail.values_crc, _damaged(detail, start, end))


def _damaged(detail: wire.ImageDetail, start: int, end: int) -> bool:
    """Whether a damaged block touches the bytes ``[start, end)`` of the image."""
    size = detail.block_bytes
    return any(start < (block + 1) * size and block * size < end for block in detail.bad_blocks)


def _block_count(detail: wire.ImageDetail) -> int:
    return -(-detail.image.image_bytes // detail.block_bytes)


# -- showing ----------------------------------------------------------------------------------------------------------


def _show(out: Console, contents: Contents) -> None:
    from rich.table import Column, Table

    s = contents.snapshot
    out.print(
        printable(f"snapshot {s.id.run}/{s.id.step} of job {s.job}, generation {s.id.generation}: ")
        + f"{len(s.ranks)} of {s.world} ranks, {len(contents.tensors)} tensors, {show_bytes(s.nbytes)}",
        soft_wrap=True,
    )
    table = Table(Column("tensor", overflow="fold"), "dtype", "shape", "rank: slice", "bytes", "crc32c")
    for tensor in contents.tensors:
        name: tuple[str, str, str] = (printable(tensor.name), tensor.dtype, str(list(tensor.shape)))
        for part in tensor.parts:
            table.add_row(*name, f"{part.rank}: {list(part.start)}+{list(part.extent)}", *_sum_cells(part))
            name = ("", "", "")
    for part in contents.values:
        table.add_row("(values)", "", "", f"{part.rank}:", *_sum_cells(part))
    out.print(table)
    for detail in contents.damaged:
        blocks = ", ".join(map(str, detail.bad_blocks))
        out.print(
            f"damaged: rank {detail.image.rank}, blocks {blocks} of {printable(detail.image.path)}", soft_wrap=True
        )


def _sum_cells(part: Part) -> tuple[str, str]:
    return str(part.nbytes), f"{part.crc:08x}" + (" DAMAGED" if part.damaged else "")


def _json(contents: Contents) -> dict[str, Any]:
    s = contents.snapshot
    return {
        "job": s.job,
        "run": s.id.run,
        "step": s.id.step,
        "generation": s.id.generation,
        "world": s.world,
        "ranks": s.ranks,
        "complete": s.complete,
        "sound": not contents.damaged,
        "block_bytes": contents.images[0].block_bytes,
        "images": [
            {
                "rank": detail.image.rank,
                "path": detail.image.path,
                "image_bytes": detail.image.image_bytes,
                "bad_blocks": list(detail.bad_blocks),
            }
            for detail in contents.images
        ],
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": sum(part.nbytes for part in tensor.parts),
                "slices": [
                    {"rank": part.rank, "start": list(part.start), "extent": list(part.extent)} | _sum_json(part)
                    for part in tensor.parts
                ],
            }
            for tensor in contents.tensors
        ],
        "values": [{"rank": part.rank} | _sum_json(part) for part in contents.values],
    }


def _sum_json(part: Part) -> dict[str, Any]:
    return {"bytes": part.nbytes, "crc32c": f"{part.crc:08x}", "damaged": part.damaged}
