"""Finding and opening the snapshot that a command is about: what ``inspect``, ``diff`` and ``restore`` share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import click

from .answers import Asked
from .contents import Opened, Tensor, require_whole, select, tensors
from .held import choose
from .sources import Note, Source, find, named_snapshot, open_source


def source_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--source``: where snapshots are that are named without a source."""
    return click.option(
        "-s", "--source", metavar="SOURCE",
        help="Where to look for snapshots that are named without one: agent://host:port, a folder, s3://…, or a TOML file "
        "with tiers. Default: the memory of the agents.",
    )(command)  # fmt: skip


def only_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--only``: which tensors."""
    return click.option(
        "--only", metavar="PATTERN", multiple=True,
        help="Only tensors with names like this, such as 'model.*'; may be repeated.",
    )(command)  # fmt: skip


@asynccontextmanager
async def opened(text: str | None, default: str | None, asked: Asked, note: Note) -> AsyncIterator[Opened]:
    """The snapshot that ``[SOURCE#]NAME`` means; *default* is the source where none is named.

    Raises:
        ConfigError: the words mean nothing, or several snapshots.
        SnapshotUnknown: there is none of that name.
    """
    words = named_snapshot(text)
    source = open_source(find(words.source or default, asked), note)
    try:
        async with chosen(source, words.snapshot or "") as found:
            yield found
    finally:
        await source.close()


@asynccontextmanager
async def chosen(source: Source, name: str) -> AsyncIterator[Opened]:
    """The snapshot of *source* that *name* means."""
    listing = choose(name, await source.snapshots())
    async with source.open(listing) as found:
        yield found


def wanted_tensors(found: Opened, patterns: tuple[str, ...], rank: int = 0) -> list[Tensor]:
    """The whole tensors that *patterns* match, all without patterns. Raises ``ConfigError``, ``SnapshotLost``."""
    every = tensors({rank: image.layout for rank, image in found.images.items()}, rank)
    matching = select(every, patterns)
    require_whole(found, matching)
    return matching
