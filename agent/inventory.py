"""What an agent says that it holds, as the restore plan wants it."""

from __future__ import annotations

from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, InTier
from . import wire_pb2 as wire
from .client import id_of, wire_id


def held_images(reply: wire.ImageList) -> list[Held]:
    """The images of an agent's answer."""
    return [
        Held(
            SnapshotId(i.generation, i.step, i.run), i.rank, i.world, i.watermark, reply.agent, i.path, i.image_bytes,
            i.complete, i.checks_crc,
        )
        for i in reply.images
    ]  # fmt: skip


def held_parities(reply: wire.ImageList) -> list[HeldParity]:
    """The parities of an agent's answer."""
    return [
        HeldParity(id_of(p.id), p.key, p.index, tuple(p.ranks), p.tolerance, reply.agent, p.lane)
        for p in reply.parities
    ]


def in_tiers(reply: wire.TierList) -> list[InTier]:
    """What an agent finds in the tiers."""
    return [
        InTier(
            id_of(i.id), i.world, i.tier, tuple((r.offset, r.offset + r.nbytes) for r in i.ranks), reply.agent, i.whole
        )
        for i in reply.images
    ]


def parity_source(parity: HeldParity, address: str = "") -> wire.ParitySource:
    """One parity, and who holds it, as it is said to agents."""
    said = wire.Parity(
        id=wire_id(parity.id), lane=parity.lane, index=parity.index, tolerance=parity.tolerance, ranks=parity.ranks,
        key=parity.key,
    )  # fmt: skip
    return wire.ParitySource(parity=said, agent=parity.agent, address=address)
