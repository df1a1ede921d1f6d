"""The memory of a job's agents as a source of snapshots."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ..agent.peers import Peers
from ..agent.reading import Copy, HeldImage, open_image
from ..errors import AgentUntrusted, HoldfastError, SourceGone
from ..storage.inflight import each
from .answers import Answers, Asked, printable
from .contents import Image, Opened
from .held import Holdings, Snapshot, ask_holdings, snapshots
from .sources import Listing, Note

_OPENS_AT_ONCE = 16


class MemorySource:
    """What the agents hold together. Images that only their group could compute are not had: agents would have to make room
    for them, in the memory that the job needs."""

    name = "memory"

    def __init__(self, asked: Asked, note: Note) -> None:
        self._asked = asked
        self._note = note
        self._held: dict[tuple[str, object], Snapshot] = {}
        self._addresses: dict[str, tuple[str, bool]] = {}  # by where an agent was asked: for its peers, and with TLS

    async def answers(self) -> Answers[Holdings]:
        """What each agent says that it holds."""
        answers = await asyncio.to_thread(ask_holdings, self._asked)
        self._addresses = {given.address: (given.answer[0].listen, given.answer[0].tls) for given in answers.given}
        self._held = {(held.job, held.id): held for held in snapshots(answers.given)}
        return answers

    async def snapshots(self) -> Sequence[Listing]:
        """As ``Source.snapshots``."""
        for silent in (await self.answers()).silent:
            self._note(f"not answering: {silent.address} ({silent.error})")
        return [
            Listing(held.job, held.id, held.world, tuple(held.ranks), held.complete) for held in self._held.values()
        ]

    @asynccontextmanager
    async def open(self, listing: Listing) -> AsyncIterator[Opened]:
        """As ``Source.open``. What the job overwrites while it is read is ``SourceGone``."""
        held = self._held[listing.job, listing.id]
        trust = self._asked.trust
        peers = Peers(listing.job, f"holdfast-{os.getpid()}", trust)
        images: dict[int, Image] = {}
        opened: list[HeldImage] = []
        reasons: dict[int, HoldfastError] = {}
        tls = trust.client_context() if trust is not None else None

        async def open_rank(rank: int) -> None:
            try:
                image = await open_image(held.id, self._copies(held, rank), peers, tls, self._note, len(held.ranks))
                images[rank] = image
                opened.append(image)
            except HoldfastError as error:
                reasons[rank] = error
                self._note(f"rank {rank}: {error}")

        try:
            await each(held.ranks, open_rank, _OPENS_AT_ONCE)
            if not images:
                raise next(iter(reasons.values()), SourceGone(f"nobody holds {held.id} any more"))
            values = {image.record.rank: image.nbytes - image.layout.values_offset for image in opened}
            yield Opened(self.name, listing.job, held.id, held.world, dict(sorted(images.items())), values, reasons)
        finally:
            for image in opened:
                image.close()
            await peers.close()

    def _copies(self, held: Snapshot, rank: int) -> list[Copy]:
        """The copies of one image; those on this node first."""
        copies: list[Copy] = []
        for copy in held.copies:
            if copy.image.rank != rank:
                continue
            address, tls = self._addresses[copy.address]
            local = copy.address.startswith("/")
            if tls and self._asked.trust is None:
                if not local:
                    raise AgentUntrusted(f"agent {printable(copy.agent)} asks for certificates: give --tls-ca, …")
                address = ""
            copies.append(Copy(copy.agent, address, copy.image.path, rank, copy.image.checks_crc, local))
        return sorted(copies, key=lambda copy: not copy.local)

    async def close(self) -> None:
        """As ``Source.close``."""
