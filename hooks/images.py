"""The images of one snapshot, as a restore reads them: mapped where they lie on this node, else brought by its agent.

An agent brings a whole image into a slot where this rank goes on from it; of any other image, just the byte ranges that are
needed, into two windows of shared memory: while one is emptied into the live tensors, the other is filled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from ..agent import wire_pb2 as wire
from ..agent.client import WINDOW_BYTES, WINDOW_RANGES, packed, wire_id
from ..agent.inventory import parity_source
from ..errors import AgentUnreachable, Corrupt, HoldfastError, SnapshotLost
from ..snapshot.arena import Slot, Window
from ..snapshot.layout import Layout, align
from ..snapshot.live import Part, Source, SourceImage
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, Plan
from .found import Found

_log = logging.getLogger(__name__)
_PIECE_BYTES: Final = WINDOW_BYTES // 8  # so that windows are filled well
_NEAR_BYTES: Final = 4096  # what lies so close together is asked for as one range
_PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)  # an agent that has ended is started again, and this rank attached to it

Bytes = npt.NDArray[np.uint8]


class Agent(Protocol):
    """What this node's agent does for a restore (``Holding``). Each raises ``SnapshotLost`` where nobody has the image."""

    def materialise(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.MaterialiseReply:
        """Have an image in a slot of this node."""
        ...

    def describe_image(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.Description:
        """Say how an image is laid out."""
        ...

    def read_ranges(self, request: wire.ReadRequest, timeout_s: float) -> wire.ReadReply:
        """Have byte ranges of an image in a window."""
        ...


@dataclass(slots=True)
class _Batch:
    """What one request brings: disjoint ranges in their order, and the parts to be filled, each with its place in the window."""

    ranges: list[tuple[int, int]] = field(default_factory=list)
    parts: list[tuple[Part, int]] = field(default_factory=list)
    nbytes: int = 0

    def takes(self, part: Part, end: int) -> bool:
        """Add *part* if it fits; *end* is that of the image. Parts come in the order of their first bytes."""
        first = part.placed.offset + part.span.offset
        low, high = first // 64 * 64, min(align(first + part.span.nbytes), end)
        if self.ranges and low <= self.ranges[-1][1] + _NEAR_BYTES:
            start, stop = self.ranges[-1]
            grown = max(high - stop, 0)
            if self.nbytes + grown > WINDOW_BYTES:
                return False
            self.ranges[-1] = start, max(stop, high)
        else:
            start, grown = low, high - low
            if self.ranges and (self.nbytes + grown > WINDOW_BYTES or len(self.ranges) == WINDOW_RANGES):
                return False
            self.ranges.append((low, high))
        self.nbytes += grown
        self.parts.append((part, self.nbytes - (self.ranges[-1][1] - start) + first - start))
        return True


def batches(parts: Sequence[Part], image_bytes: int) -> Iterator[_Batch]:
    """The requests that bring all of *parts*, none of which is longer than a window."""
    batch = _Batch()
    for part in sorted(parts, key=lambda part: part.placed.offset + part.span.offset):
        if not batch.takes(part, image_bytes):
            yield batch
            batch = _Batch()
            batch.takes(part, image_bytes)
    if batch.parts:
        yield batch


class Windows:
    """The shared memory in which the agent lays what this rank asks for; mapped once.

    Attributes:
        pulled_bytes: what came from other nodes.
    """

    def __init__(self, agent: Agent, reader: int, timeout_s: float) -> None:
        """*reader*: this rank."""
        self.pulled_bytes = 0
        self._agent = agent
        self._reader = reader
        self._timeout_s = timeout_s
        self._maps: dict[str, Window] = {}

    def read(self, image: wire.MaterialiseRequest, ranges: Sequence[tuple[int, int]], window: int) -> Bytes:
        """The bytes of these (start, end) ranges, one after the other; theirs until the same window is asked for again."""
        request = wire.ReadRequest(
            image=image,
            ranges=packed([(start, end - start) for start, end in ranges]),
            window=window,
            reader=self._reader,
        )
        reply = self._insist(request)
        self.pulled_bytes += reply.pulled_bytes
        nbytes = sum(end - start for start, end in ranges)
        mapped = self._maps.get(reply.path)
        if mapped is None or not mapped.in_place:  # it had to grow, or was made by another agent: the old one is stale
            mapped = self._maps[reply.path] = Window.open(reply.path)
        return mapped.bytes[:nbytes]

    def _insist(self, request: wire.ReadRequest) -> wire.ReadReply:
        """The agent's answer; that of its successor, if it ends meanwhile."""
        for pause_s in _PAUSES_S:
            try:
                return self._agent.read_ranges(request, self._timeout_s)
            except AgentUnreachable as error:
                _log.warning("%s; asking again in %g s", error, pause_s)
                time.sleep(pause_s)
        return self._agent.read_ranges(request, self._timeout_s)

    def close(self) -> None:
        """Have the agent take the windows back. Never raises: the restore is done, and other ranks go on with this one."""
        if self._maps:
            self._maps.clear()
            try:
                self._agent.read_ranges(wire.ReadRequest(reader=self._reader), self._timeout_s)
            except HoldfastError as error:  # its agent ended meanwhile, and took them with it
                _log.warning("the windows of rank %d are not given back: %s", self._reader, error)


class RangedImage:
    """An image that is not on this node; what is needed of it comes through windows, verified by the agent (``Source``)."""

    def __init__(self, layout: Layout, nbytes: int, request: wire.MaterialiseRequest, windows: Windows) -> None:
        self.layout = layout
        self.nbytes = nbytes
        self._request = request
        self._windows = windows

    def fill(self, parts: Sequence[Part], pool: Executor) -> None:
        """As ``Source.fill``."""
        todo = list(batches([small for part in parts for small in part.cut(_PIECE_BYTES)], self.nbytes))
        with ThreadPoolExecutor(1, "holdfast-windows") as ahead:
            coming = [ahead.submit(self._windows.read, self._request, b.ranges, i % 2) for i, b in enumerate(todo[:2])]
            for number, batch in enumerate(todo):
                found = coming[number].result()
                list(pool.map(partial(_copy, found), batch.parts))
                if number + 2 < len(todo):
                    following = todo[number + 2].ranges
                    coming.append(ahead.submit(self._windows.read, self._request, following, number % 2))

    def values(self) -> Bytes:
        """The encoded values."""
        out = np.empty(self.nbytes - self.layout.values_offset, np.uint8)
        for at in range(0, out.nbytes, WINDOW_BYTES):
            start = self.layout.values_offset + at
            nbytes = min(WINDOW_BYTES, out.nbytes - at)
            out[at : at + nbytes] = self._windows.read(self._request, [(start, start + nbytes)], 0)[:nbytes]
        return out

    def close(self) -> None:
        """Nothing is held between reads."""


def _copy(found: Bytes, part: tuple[Part, int]) -> None:
    """Fill a part from its place in a window."""
    its, at = part
    its.copy_from(found[at : at + its.span.nbytes])


class Images:
    """Opens the images of the snapshot that *decision* chose, for one rank."""

    def __init__(
        self,
        decision: Plan,
        found: Found,
        here: str,
        agent: Agent | None,
        windows: Windows | None,
        mapped: Mapping[str, Slot],
        unread: frozenset[tuple[SnapshotId, int, int]],
        timeout_s: float,
    ) -> None:
        """*here*: the agent of this node; without one, every copy is taken to be on this node. *mapped*: slots by their paths.
        *unread*: (snapshot, rank, tier) of images that could not be read there."""
        assert decision.chosen is not None
        self._id = decision.chosen
        self._decision = decision
        self._found = found
        self._here = here
        self._agent = agent
        self._windows = windows
        self._mapped = mapped
        self._unread = unread
        self._timeout_s = timeout_s
        # Thousands of ranks are asked for, one by one.
        self._copies: dict[int, list[Held]] = {}
        self._ranks_on: dict[str, list[int]] = {}  # by agent
        for image in found.images:
            if image.id == self._id:
                self._copies.setdefault(image.rank, []).append(image)
        for number, where in enumerate(found.agents):
            self._ranks_on.setdefault(where, []).append(number)

    @property
    def world(self) -> int:
        """How many images there are."""
        return self._decision.world

    def copy_here(self, rank: int) -> Held | None:
        """The copy of that rank's image on this node, if there is one."""
        return next((i for i in self._copies.get(rank, ()) if self._agent is None or i.agent == self._here), None)

    def mapped(self, rank: int) -> SourceImage:
        """That rank's image in a slot of this node, brought there if it is not. Raises ``SnapshotLost``, ``Corrupt``."""
        here = self.copy_here(rank)
        path = here.path if here is not None else self._brought(rank)
        return SourceImage(path, rank, self._id, self._mapped.get(path))

    def ranged(self, rank: int, described: tuple[Layout, int] | None = None) -> Source:
        """That rank's image as it lies here, or in ranges. *described*: its layout and length, if these are known.

        Raises as ``mapped``.
        """
        if self.copy_here(rank) is not None or self._windows is None or self._agent is None:
            return self.mapped(rank)
        request = self.request(rank)
        if described is None:
            told = self._agent.describe_image(request, self._timeout_s)
            described = Layout.from_text(told.layout), told.image_bytes
        layout, nbytes = described
        if layout.values_offset > nbytes:
            raise Corrupt(f"the layout of {self._id} of rank {rank} is longer than its image")
        return RangedImage(layout, nbytes, request, self._windows)

    def nearest(self, rank: int) -> int:
        """Which rank looks at that image for all: one on a node that has it, if there is any."""
        there = {image.agent for image in self._copies.get(rank, ())}
        near = sorted(r for agent in there for r in self._ranks_on.get(agent, ())) or range(
            len(self._found.agents) or 1
        )
        return near[rank % len(near)]

    def _brought(self, rank: int) -> str:
        """Where the image lies on this node, now that its agent has brought it. Raises ``SnapshotLost``."""
        if self._agent is None:
            raise SnapshotLost(f"the image of {self._id} of rank {rank} is not on this node")
        reply = self._agent.materialise(self.request(rank), self._timeout_s)
        _log.info("%s of rank %d: %s", self._id, rank, reply.how)
        return reply.path

    def request(self, rank: int) -> wire.MaterialiseRequest:
        """What the agent must know to bring that rank's image: everybody who has it, or can compute it."""
        found, id = self._found, self._id
        return wire.MaterialiseRequest(
            id=wire_id(id),
            rank=rank,
            world=self._decision.world,
            images=[
                wire.Source(rank=i.rank, agent=i.agent, address=found.addresses[i.agent], checks_crc=i.checks_crc)
                for i in found.images
                if i.id == id
            ],
            parities=[parity_source(p, found.addresses[p.agent]) for p in found.parities if p.id == id],
            tiers=[
                wire.TierSource(tier=part.tier, agent=part.agent, address=found.addresses[part.agent])
                for part in found.stored
                if part.id == id and part.holds(rank) and (id, rank, part.tier) not in self._unread
            ],
        )
