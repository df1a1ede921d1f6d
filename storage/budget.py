"""Whether snapshots fit into a tier: asked before training starts, and again before each spill. Pure.

*A place* here is what one store holds: the whole tier where all nodes share it, one node's disk where each has its own.
``snapshot_bytes`` are then those of all nodes' images, or of that node's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import BudgetExceeded
from ..snapshot.record import SnapshotId
from .tiers import TierSettings


def check_budget(settings: TierSettings, snapshot_bytes: int, free_bytes: int | None, *, held_bytes: int = 0) -> None:
    """Refuse a tier that cannot hold what is to be kept and the one that is being written.

    Args:
        settings: of the tier.
        snapshot_bytes: of one snapshot's images, in this place.
        free_bytes: in this place; None where there is no limit.
        held_bytes: of the job's snapshots that are there already: they make room for others.

    Milestones are not counted: how many there will be, nobody knows. When they have filled the tier, spills are skipped.

    Raises:
        BudgetExceeded: it cannot; says how much is needed, and what to change.
    """
    need = (settings.keep + 1) * spilled_bytes(snapshot_bytes)
    what = f"tier {settings.url} is to keep {settings.keep} snapshots while it writes another: that is {need} bytes"
    if settings.limit_bytes is not None and need > settings.limit_bytes:
        raise BudgetExceeded(f"{what}, its limit is {settings.limit_bytes}; raise limit, or lower keep")
    if free_bytes is not None and need > free_bytes + held_bytes:
        raise BudgetExceeded(
            f"{what}, {free_bytes} are free and {held_bytes} held by older ones; make room there, or lower keep"
        )


def no_room(settings: TierSettings, snapshot_bytes: int, free_bytes: int | None, held_bytes: int) -> str | None:
    """Why one more snapshot does not fit now; None if it does. Arguments as of ``check_budget``."""
    need = spilled_bytes(snapshot_bytes)
    if settings.limit_bytes is not None and held_bytes + need > settings.limit_bytes:
        return f"tier {settings.url} holds {held_bytes} of {settings.limit_bytes} bytes, {need} more are needed"
    if free_bytes is not None and need > free_bytes:
        return f"tier {settings.url} has {free_bytes} bytes free, {need} are needed"
    return None


def spilled_bytes(snapshot_bytes: int) -> int:
    """What images of so many bytes take in a tier, at most: checksums, padding of chunks, metadata and entries come on top."""
    return snapshot_bytes + snapshot_bytes // 64 + (1 << 20)


@dataclass(slots=True)
class _Coming:
    """One image that is being written, or (not *active*) that was written a moment ago."""

    nbytes: int
    written: int = 0
    active: bool = True


class Underway:
    """The images that one node writes to a place now: what that will hold before long, and does not show yet.

    A store may show objects as they are written, or only once all are durable. So of a snapshot that is being written,
    what is there is what the store shows, or what it showed before and what was written since, whichever is more.
    """

    def __init__(self) -> None:
        self._images: dict[SnapshotId, dict[int, _Coming]] = {}
        self._before: dict[SnapshotId, int] = {}

    @property
    def ids(self) -> list[SnapshotId]:
        """The snapshots that are counted here."""
        return list(self._images)

    def begin(self, id: SnapshotId, rank: int, nbytes: int, shown_bytes: int) -> None:
        """An image of *nbytes* is to be written; *shown_bytes* of its snapshot are there already."""
        if id not in self._images:
            for old in [old for old, images in self._images.items() if not any(one.active for one in images.values())]:
                self.forget(old)  # by now the store shows all of it
            self._images[id], self._before[id] = {}, shown_bytes
        self._images[id][rank] = _Coming(nbytes)

    def wrote(self, id: SnapshotId, rank: int, nbytes: int) -> None:
        """So much more of the image is written."""
        if (one := self._images.get(id, {}).get(rank)) is not None:
            one.written += nbytes

    def end(self, id: SnapshotId, rank: int, *, done: bool) -> None:
        """It is written; or, not *done*, given up, and nothing is left of it."""
        images = self._images.get(id, {})
        if rank in images and done:
            images[rank].active = False
        elif images.pop(rank, None) is not None and not images:
            self.forget(id)

    def forget(self, id: SnapshotId) -> None:
        """The snapshot was removed, or counts as any other from now on."""
        self._images.pop(id, None)
        self._before.pop(id, None)

    def no_room(
        self, settings: TierSettings, shown: Mapping[SnapshotId, int], free_bytes: int | None, *, world: int = 0
    ) -> str | None:
        """Why what is under way does not fit; None if it does.

        Args:
            shown: what the store shows of each snapshot, in bytes. Without a limit, those that are under way suffice.
            free_bytes: in this place; None where there is no limit.
            world: the number of images, if all nodes write them here and this node counts for all; else 0.
        """
        held = sum(nbytes for id, nbytes in shown.items() if id not in self._images)
        missing = 0
        for id, images in self._images.items():
            active = [one for one in images.values() if one.active]
            there = max(shown.get(id, 0), self._before[id] + sum(one.written for one in images.values()))
            whole = world * max(one.nbytes for one in active) - there if active else 0
            held += there
            missing += max(whole, sum(max(one.nbytes - one.written, 0) for one in active))
        return no_room(settings, missing, free_bytes, held)
