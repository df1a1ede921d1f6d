"""``holdfast copy``: snapshots from one source into a tier, rank by rank; what is there already is not copied again."""

from __future__ import annotations

import asyncio
import mmap
import tempfile
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from ..agent.reading import HeldImage
from ..errors import ConfigError, SnapshotLost
from ..storage.inflight import each
from ..storage.reader import Listed, list_snapshots
from ..storage.store import Store, open_store
from ..storage.tiers import parse_url
from ..storage.writer import Image as Written
from ..storage.writer import copy_rank, write_image
from .answers import Asked, asking, console, print_json, printable
from .contents import Bytes, Opened
from .held import LATEST, choose
from .memory import MemorySource
from .opening import source_option
from .progress import Bar, Notes
from .quantity import show_bytes
from .sources import Listing, Source, TierSource, find, open_source, read_words

_RANKS_AT_ONCE = 2
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Copied:
    """What was done for one snapshot. ``skipped``: ranks whose image was there already; ``nbytes``: of the others' images."""

    listing: Listing
    ranks: tuple[int, ...]
    skipped: tuple[int, ...]
    nbytes: int


@click.command
@asking
@source_option
@click.option("--all", "every", is_flag=True, help="All complete snapshots of SRC, oldest first.")
@click.argument("src", metavar="[SOURCE | [SOURCE#]SNAPSHOT]")
@click.argument("dst", metavar="TIER")
def copy(src: str, dst: str, every: bool, source: str | None, asked: Asked, as_json: bool) -> None:
    """Copy a snapshot into a tier; of a source alone, its newest complete one.

    Every byte is verified on the way, and taken from where it is sound. A rank's image counts in TIER once all of it is there, so
    this may be killed at any time, and run again: what was finished is not copied twice.
    """
    copied = asyncio.run(_copy(src, dst, every, source, asked))
    if as_json:
        print_json({"target": parse_url(dst), "copied": [_json(one) for one in copied]})
        return
    for one in copied:
        there = f" ({len(one.skipped)} were there)" if one.skipped else ""
        console().print(
            printable(f"{one.listing.id}: {len(one.ranks)} of {one.listing.world} images copied{there}, ")
            + show_bytes(one.nbytes),
            soft_wrap=True,
        )


async def _copy(src: str, dst: str, every: bool, default: str | None, asked: Asked) -> list[Copied]:
    words = read_words(src)
    if every and words.snapshot is not None:
        raise ConfigError(f"--all, and one snapshot ({words.snapshot}), were asked for")
    source, target = open_source(find(words.source or default, asked), Notes()), open_store(parse_url(dst))
    try:
        if isinstance(source, TierSource) and target.url in [store.url for store in source.stores]:
            raise ConfigError(f"{target.url} is where the snapshots come from")
        found = list(await source.snapshots())
        chosen = (
            [one for one in reversed(found) if one.complete] if every else [choose(words.snapshot or LATEST, found)]
        )
        there = {(one.id, one.world): one for one in await list_snapshots(target)}
        return [await _one(source, listing, target, there.get((listing.id, listing.world))) for listing in chosen]
    finally:
        await source.close()
        await target.close()


async def _one(source: Source, listing: Listing, target: Store, there: Listed | None) -> Copied:
    if not listing.complete:
        raise SnapshotLost(
            f"{listing.id} is not complete in {source.name}: it has {len(listing.ranks)} of {listing.world} ranks"
        )
    done = there.ranks if there is not None and not there.deleted else frozenset()
    left = [rank for rank in range(listing.world) if rank not in done]
    nbytes: list[int] = []
    if left:
        async with source.open(listing) as opened:
            with Bar(f"{listing.id} to {target.url}", 0) as bar:

                async def rank_(rank: int) -> None:
                    nbytes.append(await _rank(source, opened, rank, target, bar))

                await each(left, rank_, _RANKS_AT_ONCE if isinstance(source, TierSource) else 1)
    return Copied(listing, tuple(left), tuple(sorted(done)), sum(nbytes))


async def _rank(source: Source, opened: Opened, rank: int, target: Store, bar: Bar) -> int:
    """Copy one image; returns its length."""
    if rank not in opened.images:
        raise SnapshotLost(f"the image of rank {rank} of {opened.id} cannot be had from {source.name}")
    if isinstance(source, TierSource):
        having = source.stores_of(rank)
        entry = await copy_rank(having[0], target, opened.id, rank, opened.world, also=having[1:], progress=bar.advance)
        bar.expect(entry.image_bytes)
        return entry.image_bytes
    assert isinstance(source, MemorySource)
    image = opened.images[rank]
    assert isinstance(image, HeldImage)
    bar.expect(image.nbytes)
    with tempfile.TemporaryFile() as file:  # not in memory: an image may be as large as what a whole node has
        held = await _fetched(image, file.fileno(), file.truncate)
        written = Written(opened.id, rank, opened.world, image.record.watermark, opened.job, image.layout, held)
        await write_image(target, written, still=lambda: True, progress=bar.advance)
    return image.nbytes


async def _fetched(image: HeldImage, descriptor: int, truncate: Any) -> Bytes:
    """All bytes of an image, verified, in a mapped file."""
    truncate(max(image.nbytes, 1))
    held: Bytes = np.frombuffer(mmap.mmap(descriptor, max(image.nbytes, 1)), np.uint8)[: image.nbytes]
    for start in range(0, image.nbytes, _PIECE_BYTES):
        await image.read(start, held[start : start + _PIECE_BYTES])
    return held


def _json(one: Copied) -> dict[str, Any]:
    id = one.listing.id
    return {
        "run": id.run, "step": id.step, "generation": id.generation, "world": one.listing.world,
        "ranks": list(one.ranks), "there": list(one.skipped), "bytes": one.nbytes,
    }  # fmt: skip
