"""One snapshot, of whatever world took it, opened to be loaded from: chosen, described, and read box by box."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ...errors import Corrupt, SnapshotLost, SnapshotUnknown, TierUnreachable
from ...snapshot.assembly import Read, assemble
from ...snapshot.codec import decode
from ...snapshot.layout import Layout, Slice
from ...snapshot.live import Source, apply
from ...snapshot.recovery import Plan, prospects
from ...snapshot.state import Item, from_leaf
from ..found import Found, together
from ..holding import Holding
from ..images import Images, RangedImage, Windows
from ..ranks import Ranks

_log = logging.getLogger(__name__)


def choose(found: Found, step: int | None) -> Plan:
    """The newest snapshot that can be had, or the newest of *step*. Pure, and the same on every rank.

    Raises:
        SnapshotUnknown: there is none that ever was complete.
        SnapshotLost: there was, and it cannot be had; says why.
        TierUnreachable: nothing is to be had, or not what was complete last, and a tier may have it that cannot be read now.
    """
    passed: list[str] = []
    lost = False
    for prospect in prospects(found.images, parities=found.parities, stored=found.stored):
        if step is not None and prospect.id.step != step:
            continue
        if prospect.reason is None:
            if lost and found.silent:
                raise _unreachable(found, passed)
            _log.log(logging.WARNING if lost else logging.INFO, "%s", "\n".join([*passed, f"load {prospect.id}"]))
            return Plan(prospect.id, prospect.sources, (), None)
        lost |= prospect.complete
        passed.append(f"passed over {prospect.id}: {prospect.reason}")
    if found.silent:
        raise _unreachable(found, passed)
    passed += [f"{path}: it was sealed, and its record cannot be read" for path in found.spoiled]
    passed += [f"{other}, which is another job's" for other in found.others]
    which = "" if step is None else f" of step {step}"
    kind = SnapshotLost if lost or found.spoiled else SnapshotUnknown
    raise kind("\n".join([f"this job has no snapshot{which} that can be loaded", *passed]))


def _unreachable(found: Found, passed: Sequence[str]) -> TierUnreachable:
    return TierUnreachable("\n".join([*passed, "these tiers may have it:", *found.silent]))


class Opened:
    """All images of one snapshot, each read where it is nearest. Constructing it is collective, nothing else is.

    Attributes:
        step: which it is.
        layouts: of each image, by rank.
    """

    layouts: Mapping[int, Layout]

    def __init__(self, plan: Plan, found: Found, holding: Holding, ranks: Ranks, timeout_s: float) -> None:
        """*holding* stays attached as long as this is open. Raises ``SnapshotLost``, ``Corrupt``, ``PeerFailed``."""
        assert plan.chosen is not None
        self._id = plan.chosen
        self.step = self._id.step
        self._world = plan.world
        self._holding = holding
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._windows = Windows(holding, ranks.rank, timeout_s)
        mapped = {slot.place.path: slot for slot in holding.slots}
        here = holding.welcome.agent
        self._images = Images(plan, found, here, holding, self._windows, mapped, frozenset(), timeout_s)
        self._sources: dict[int, Source] = {}
        self._described: dict[int, tuple[Layout, int]] = {}  # by rank: layout and length
        self._values: dict[int, Any] = {}
        try:
            self._described = self._describe()
        except BaseException:
            self.close()
            raise
        self.layouts = {rank: layout for rank, (layout, _) in self._described.items()}
        self._near: Collection[int] = {r for r in self.layouts if self._images.copy_here(r) is not None}

    def values(self, rank: int) -> Any:
        """What is no tensor in that rank's image, decoded. Raises ``SnapshotLost``, ``Corrupt``."""
        if rank not in self._values:
            try:
                found = self._source(rank).values()
            except Corrupt as error:
                found = self._instead(rank, error).values()
            self._values[rank] = decode(found, from_leaf)
        return self._values[rank]

    def fill(self, wanted: Sequence[tuple[Slice, torch.Tensor]]) -> None:
        """Fill each tensor with that box of the global tensor; every byte is verified before it is used.

        Raises:
            LayoutMismatch: parts that no image holds.
            SnapshotLost, Corrupt: an image cannot be had any more; some tensors are overwritten then.
        """
        items = [Item(box, tensor, tensor, lazy=False) for box, tensor in wanted]
        reads: dict[int, list[Read]] = {}
        for read in assemble([box for box, _ in wanted], self.layouts, self._ranks.rank % self._world, near=self._near):
            reads.setdefault(read.rank, []).append(read)
        for rank, its in reads.items():
            try:
                apply(items, its, {rank: self._source(rank)})
            except Corrupt as error:
                apply(items, its, {rank: self._instead(rank, error)})

    def close(self) -> None:
        """Unmap, and have the agent take its windows back."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()
        self._windows.close()

    def _describe(self) -> dict[int, tuple[Layout, int]]:
        """Layout and length of each image; each is looked at by one rank, which tells all others. Collective."""

        def look() -> dict[int, tuple[int, str]]:
            mine = [rank for rank in range(self._world) if self._images.nearest(rank) == self._ranks.rank]
            return {rank: _said(self._source(rank)) for rank in mine}

        said = together(self._ranks, "looking at the images", self._timeout_s, look)
        payload = zlib.compress(json.dumps(said).encode(), 1)
        found: dict[int, tuple[Layout, int]] = {}
        for part in self._ranks.gather(payload, "comparing layouts", self._timeout_s):
            for rank, (nbytes, text) in json.loads(zlib.decompress(part)).items():
                found[int(rank)] = Layout.from_text(text.encode("utf-8", "surrogatepass")), nbytes
        return found

    def _source(self, rank: int) -> Source:
        """That rank's image: mapped where it lies on this node, else in ranges that the agent brings."""
        if rank not in self._sources:
            described = self._described.get(rank)
            try:
                source = self._images.ranged(rank, described)
                if described is not None and source.layout != described[0]:
                    source.close()
                    raise Corrupt(f"the image of {self._id} of rank {rank} is not laid out as another copy of it")
            except (Corrupt, OSError) as error:
                return self._instead(rank, error)
            self._sources[rank] = source
        return self._sources[rank]

    def _instead(self, rank: int, error: Exception) -> Source:
        """The image as the agent brings it from wherever it is sound, since the copy that was read is not."""
        _log.warning("%s; it is read from elsewhere", error)
        if (before := self._sources.pop(rank, None)) is not None:
            before.close()
        request = self._images.request(rank)
        if rank in self._described:
            layout, nbytes = self._described[rank]
        else:
            told = self._holding.describe_image(request, self._timeout_s)
            layout, nbytes = Layout.from_text(told.layout), told.image_bytes
        self._sources[rank] = RangedImage(layout, nbytes, request, self._windows)
        return self._sources[rank]


def _said(source: Source) -> tuple[int, str]:
    return source.nbytes, source.layout.to_text().decode("utf-8", "surrogatepass")
