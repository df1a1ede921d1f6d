"""SOURCE on the command line: where snapshots are looked for, and how one is read from there, whatever it is.

    agent://host:port, unix:/path/agent.sock, /path/agent.sock     the memory of a job's agents
    file:///folder, /folder, s3://…, gs://…, az://…                 a tier
    settings.toml                                                  all tiers of a job, the nearest first
    memory                                                         the agents that the options or the environment name

A snapshot is named ``RUN/STEP``, ``/STEP``, ``RUN/latest`` or ``latest``, with ``SOURCE#`` before it where it is not in the
source that is meant anyway.
"""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from ..errors import ConfigError, HoldfastError, SnapshotLost, SnapshotUnknown
from ..snapshot.record import SnapshotId
from ..storage.config import load_config
from ..storage.entries import Entry
from ..storage.inflight import each
from ..storage.leases import reading
from ..storage.reader import ImageReader, Listed, list_snapshots, read_entry
from ..storage.store import Found, Store, open_store
from ..storage.tiers import TierSettings, parse_tiers, parse_url
from .answers import Asked, whom
from .contents import Opened
from .held import LATEST, is_name

Note = Callable[[str], None]
"""Told, in words, of what did not work and was gone around."""

MEMORY: Final = "memory"
_HOST_AND_PORT: Final = re.compile(r"[^/]+:\d{1,5}")
_READS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Listing:
    """A snapshot as a source lists it.

    Attributes:
        job: empty where the source does not tell before it is read.
        ranks: whose images are there.
    """

    job: str
    id: SnapshotId
    world: int
    ranks: tuple[int, ...]
    complete: bool


class Source(Protocol):
    """Where snapshots are. ``name``: for people."""

    name: str

    async def snapshots(self) -> Sequence[Listing]:
        """All that are there, newest first for each job. Raises if nothing of the source answers."""
        ...

    def open(self, listing: Listing) -> AbstractAsyncContextManager[Opened]:
        """Read one, as long as the context lasts; it is not pruned meanwhile. Images that cannot be had are left out."""
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...


# -- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Words:
    """What somebody wrote: a source, or the usual one if None; and a snapshot in it, or none in particular."""

    source: str | None
    snapshot: str | None


def read_words(text: str) -> Words:
    """``SOURCE``, ``SNAPSHOT`` or ``SOURCE#SNAPSHOT``. What reads as the name of a snapshot is one."""
    if is_name(text):
        return Words(None, text)
    source, mark, name = text.rpartition("#")
    if mark and source and is_name(name):
        return Words(source, name)
    return Words(text, None)


def named_snapshot(text: str | None) -> Words:
    """The same where a snapshot is needed: a source alone means its newest complete one."""
    words = read_words(text) if text else Words(None, None)
    return replace(words, snapshot=words.snapshot or LATEST)


# -- which ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agents:
    """The memory of the agents that are to be asked."""

    asked: Asked


@dataclass(frozen=True, slots=True)
class Tiers:
    """Tiers, nearest first. ``settings`` are those of a config; without one there are only urls. ``job`` if it says."""

    name: str
    urls: tuple[str, ...]
    settings: tuple[TierSettings, ...] = ()
    job: str = ""


def find(text: str | None, asked: Asked) -> Agents | Tiers:
    """What a SOURCE means; without one, the agents of *asked*, which also has the certificates.

    Raises:
        ConfigError: it means nothing.
    """
    if text is None or text == MEMORY:
        return Agents(asked)
    if text.endswith(".toml"):
        config = load_config(text)
        if not config.tiers:
            raise ConfigError(f"{text} names no [[tier]]")
        settings = parse_tiers(config.tiers)
        return Tiers(text, tuple(one.url for one in settings), settings, config.job or "")
    if _is_agent(text):
        return Agents(replace(whom([text], None, {}), trust=asked.trust))
    url = parse_url(text)
    if "://" not in text and not Path(text).expanduser().is_dir():
        raise ConfigError(
            f"{text!r} is neither a snapshot (RUN/STEP, /STEP, RUN/latest, latest) nor a source: there is no such folder"
        )
    return Tiers(url, (url,))


def _is_agent(text: str) -> bool:
    if text.startswith(("agent://", "unix:")) or ("://" not in text and _HOST_AND_PORT.fullmatch(text)):
        return True
    if "://" in text:
        return False
    try:
        return text.endswith(".sock") or stat.S_ISSOCK(Path(text).stat().st_mode)
    except OSError:
        return False


def open_source(found: Agents | Tiers, note: Note) -> Source:
    """The source that was found; nothing is asked yet."""
    if isinstance(found, Agents):
        from .memory import MemorySource

        return MemorySource(found.asked, note)
    return TierSource(found.name, [open_store(url) for url in found.urls], note, found.job)


# -- tiers ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class InTiers:
    """A snapshot in tiers: what each store's listing says of it, by the store's index."""

    id: SnapshotId
    world: int
    listed: dict[int, Listed] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """The ranks whose image is in any of them."""
        return sorted({rank for one in self.listed.values() if not one.deleted for rank in one.ranks})

    @property
    def complete(self) -> bool:
        """Whether the image of every rank is in one or another of them."""
        return self.ranks == list(range(self.world))

    @property
    def entries(self) -> list[Found]:
        """The objects that commit it."""
        return [found for one in self.listed.values() for found in one.entries.values()]


class TierSource:
    """One tier, or all of a job: what one lacks, or has damaged, is read from the next.

    Attributes:
        stores: nearest first.
        silent: why some did not answer when the source was listed last.
    """

    def __init__(self, name: str, stores: Sequence[Store], note: Note, job: str = "") -> None:
        self.name = name
        self.stores = list(stores)
        self.silent: list[HoldfastError] = []
        self._note = note
        self._job = job
        self._found: dict[tuple[SnapshotId, int], InTiers] = {}
        self._stores_of: dict[int, list[Store]] = {}  # by rank, of the snapshot that is open

    async def listed(self) -> list[InTiers]:
        """All that is there, oldest first. A tier that does not answer is noted, unless there is no other.

        Raises:
            TierUnreachable, …: of the first one, if none answers.
        """
        answers = await asyncio.gather(*map(list_snapshots, self.stores), return_exceptions=True)
        self.silent = []
        self._found = {}
        for index, answer in enumerate(answers):
            if isinstance(answer, HoldfastError):
                self.silent.append(answer)
                self._note(f"not answering: {self.stores[index].url}: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                for one in answer:
                    self._found.setdefault((one.id, one.world), InTiers(one.id, one.world)).listed[index] = one
        if len(self.silent) == len(self.stores):
            raise self.silent[0]
        return [self._found[key] for key in sorted(self._found)]

    async def snapshots(self) -> Sequence[Listing]:
        """As ``Source.snapshots``."""
        found = [one for one in reversed(await self.listed()) if one.ranks]
        return [Listing(self._job, one.id, one.world, tuple(one.ranks), one.complete) for one in found]

    @asynccontextmanager
    async def open(self, listing: Listing) -> AsyncIterator[Opened]:
        """As ``Source.open``. Raises ``SnapshotUnknown`` if it is deleted meanwhile."""
        found = self._found[listing.id, listing.world]
        async with AsyncExitStack() as stack:
            having = await self._lease(stack, found)
            entries, reasons = await self._entries(found, having)
            readers = {rank: ImageReader(entry, having) for rank, entry in entries.items()}
            values = {rank: entry.values.nbytes for rank, entry in entries.items()}
            job = next((entry.job for entry in entries.values()), self._job)
            try:
                yield Opened(self.name, job, listing.id, listing.world, readers, values, reasons)
            finally:
                for damage in (damage for reader in readers.values() for damage in reader.damaged):
                    self._note(f"damaged: {damage.key} in {damage.url}: {damage.reason}")

    async def _lease(self, stack: AsyncExitStack, found: InTiers) -> list[Store]:
        """Say in each store that has the snapshot that it is being read; returns these stores."""
        having: list[Store] = []
        failed: HoldfastError = SnapshotUnknown(f"{found.id} is not in {self.name}")
        for index, one in found.listed.items():
            if one.deleted or not one.entries:
                continue
            try:
                await stack.enter_async_context(reading(self.stores[index], found.id))
                having.append(self.stores[index])
            except HoldfastError as error:
                failed = error
                self._note(f"{self.stores[index].url}: {error}")
        if not having:
            raise failed
        return having

    async def _entries(
        self, found: InTiers, having: Sequence[Store]
    ) -> tuple[Mapping[int, Entry], Mapping[int, HoldfastError]]:
        """A sound entry of each rank that has one, and why others have none. Damage is noted."""
        entries: dict[int, Entry] = {}
        reasons: dict[int, HoldfastError] = {}

        async def read(rank: int) -> None:
            for index, one in found.listed.items():
                store = self.stores[index]
                if rank not in one.entries or store not in having:
                    continue
                try:
                    entries[rank] = await read_entry(store, found.id, rank, found.world)
                    self._stores_of[rank] = [store, *(other for other in having if other is not store)]
                    return
                except HoldfastError as error:
                    reasons[rank] = error
                    self._note(str(error))

        await each(found.ranks, read, _READS_AT_ONCE)
        if not entries:
            raise next(iter(reasons.values()), SnapshotLost(f"no entry of {found.id} is left in {self.name}"))
        return dict(sorted(entries.items())), {rank: error for rank, error in reasons.items() if rank not in entries}

    def stores_of(self, rank: int) -> list[Store]:
        """Of the snapshot that is open: a store with a sound entry of that rank, then all others that may have its chunks."""
        return self._stores_of[rank]

    async def close(self) -> None:
        """As ``Source.close``."""
        for store in self.stores:
            await store.close()
