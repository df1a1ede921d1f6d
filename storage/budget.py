"""Whether snapshots fit into a tier: asked before training starts, and again before each spill. Pure.

*A place* here is what one store holds: the whole tier where all nodes share it, one node's disk where each has its own.
``snapshot_bytes`` are then those of all nodes' images, or of that node's.
"""

from __future__ import annotations

from ..errors import BudgetExceeded
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
