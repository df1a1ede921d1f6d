"""``holdfast restore``: a snapshot as files for other programs. (Trainers restore by themselves.)"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .answers import Asked, asking, console, print_json, printable
from .contents import Opened
from .export import FORMATS, Wanted, exporter
from .export.folder import appearing
from .opening import only_option, opened, source_option, wanted_tensors
from .progress import Bar, Notes
from .quantity import show_bytes


@click.command
@asking
@source_option
@only_option
@click.option(
    "--rank", type=int, default=0, help="Whose tensors count where ranks have bytes of their own.  [default: 0]"
)
@click.option("--format", "format_", type=click.Choice(FORMATS), required=True, help="What to write.")
@click.option("--to", "folder", type=click.Path(path_type=Path), required=True, help="A new or empty folder.")
@click.argument("snapshot", metavar="[SOURCE#]SNAPSHOT")
def restore(
    snapshot: str,
    folder: Path,
    format_: str,
    rank: int,
    only: tuple[str, ...],
    source: str | None,
    asked: Asked,
    as_json: bool,
) -> None:
    """Write a snapshot, or some of its tensors, to a folder, in a format that other programs read.

    Every byte is verified on the way. The folder appears when everything is in it, and durable.
    """
    done = asyncio.run(_restore(snapshot, folder, format_, rank, only, source, asked))
    if as_json:
        print_json(done)
        return
    for line in done["omitted"]:
        click.echo(line, err=True)
    console().print(
        f"{done['run'][:8]}/{done['step']}: {done['tensors']} tensors, {show_bytes(done['bytes'])}, as {format_} in "
        + printable(str(folder)),
        soft_wrap=True,
    )


async def _restore(
    snapshot: str, folder: Path, format_: str, rank: int, only: tuple[str, ...], source: str | None, asked: Asked
) -> dict[str, Any]:
    export = exporter(format_)  # torch takes a while to import: the snapshot might be gone after that
    async with opened(snapshot, source, asked, Notes()) as found:
        wanted = _wanted(found, only, rank)
        with Bar(f"{found.id} as {format_}", wanted.nbytes) as bar, appearing(folder) as fresh:
            omitted = await export(wanted, fresh, bar.advance)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "source": found.source, "job": found.job, "run": found.id.run, "step": found.id.step,
        "generation": found.id.generation, "world": found.world, "format": format_, "folder": os.fspath(folder.absolute()),
        "tensors": len(wanted.tensors), "bytes": wanted.nbytes, "files": len(files),
        "file_bytes": sum(path.stat().st_size for path in files), "omitted": omitted,
    }  # fmt: skip


def _wanted(found: Opened, only: tuple[str, ...], rank: int) -> Wanted:
    if not 0 <= rank < found.world:
        raise ConfigError(f"--rank {rank}: {found.id} has ranks 0 to {found.world - 1}")
    if found.missing and not only:
        raise found.lacking("not all of it can be written; tensors that are whole can (--only)")
    return Wanted(found, tuple(wanted_tensors(found, only, rank)), values=not only, only=only)
