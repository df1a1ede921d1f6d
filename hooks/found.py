"""What all agents of a job hold together, as all its ranks know it; and how ranks do one thing together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from ..agent import wire_pb2 as wire
from ..agent.inventory import held_images, held_parities, in_tiers
from ..errors import Corrupt, PeerFailed
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, InTier
from .ranks import Ranks

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Found:
    """What all agents hold together.

    Attributes:
        images, parities: sealed.
        spoiled: slots that were sealed and cannot be read.
        addresses: where each agent is found.
        stored: what lies in the tiers.
        silent: tiers that some agent could not read, and why.
        others: tiers that hold snapshots of other jobs, and of which.
        agents: of each rank of this job, in rank order.
    """

    images: tuple[Held, ...]
    spoiled: tuple[str, ...]
    parities: tuple[HeldParity, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    stored: tuple[InTier, ...] = ()
    silent: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()


def gather_inventories(ranks: Ranks, reply: wire.ImageList, listed: wire.TierList, timeout_s: float) -> Found:
    """What any agent holds; the same on every rank. Collective.

    Each image is reported by its own rank where that is attached to the agent, so the answer does not grow with the
    square of the ranks; images of ranks that are elsewhere now are reported by all ranks of the node. An agent may take
    a former trainer for alive whose rank is elsewhere already, so where each rank is, the ranks tell each other first.
    """
    here = f"{reply.agent} {reply.address}".encode()
    attached = [where == here for where in ranks.gather(here, "comparing who is where", timeout_s)]
    theirs = {
        image.path
        for image in reply.images
        if image.trainer_alive and image.rank != ranks.rank and image.rank < ranks.world and attached[image.rank]
    }
    mine = [asdict(held) for held in held_images(reply) if held.path not in theirs]
    parities = [asdict(parity) for parity in held_parities(reply)]
    first = attached.index(True) == ranks.rank  # of this node: it speaks for all of them
    stored = [asdict(part) for part in in_tiers(listed)] if first else []
    silent = [f"{reply.agent}: {error}" for error in listed.errors] if first else []
    others = list(listed.others) if first else []
    said = json.dumps(
        [mine, list(reply.spoiled), parities, stored, silent, others, [reply.agent, reply.address]]
    ).encode()
    gathered = [json.loads(part) for part in ranks.gather(said, "comparing what the agents hold", timeout_s)]
    images = {Held(**{**entry, "id": SnapshotId(**entry["id"])}) for part, *_ in gathered for entry in part}
    guards = {
        HeldParity(**{**entry, "id": SnapshotId(**entry["id"]), "ranks": tuple(entry["ranks"])})
        for _, _, part, *_ in gathered
        for entry in part
    }
    tiers = {
        InTier(**{**entry, "id": SnapshotId(**entry["id"]), "ranks": tuple(map(tuple, entry["ranks"]))})
        for _, _, _, part, *_ in gathered
        for entry in part
    }
    return Found(
        tuple(sorted(images, key=lambda held: (held.id, held.rank, held.agent, held.path))),
        tuple(sorted({path for _, part, *_ in gathered for path in part})),
        tuple(sorted(guards, key=lambda parity: (parity.id, parity.key, parity.index, parity.agent))),
        dict(where for *_, where in gathered),
        tuple(sorted(tiers, key=lambda part: (part.id, part.tier, part.agent))),
        tuple(sorted({error for *_, part, _, _ in gathered for error in part})),
        tuple(sorted({other for *_, part, _ in gathered for other in part})),
        tuple(agent for *_, (agent, _) in gathered),
    )


def together(ranks: Ranks, what: str, timeout_s: float, work: Callable[[], Result]) -> Result:
    """Do *work* on every rank; return only if all succeeded. Collective.

    Raises:
        The rank's own error if it failed, after the others know.
        Corrupt, PeerFailed: another rank's failure, named.
    """
    done: list[Result] = []
    error: Exception | None = None
    try:
        done.append(work())
    except Exception as caught:  # noqa: BLE001 - whatever it is, the others must hear of it before it travels on
        error = caught
    said = json.dumps([type(error).__name__, str(error)] if error else None).encode()
    outcomes = [json.loads(outcome) for outcome in ranks.gather(said, what, timeout_s)]
    if error is not None:
        raise error
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, message = outcome
            raise (Corrupt if kind == "Corrupt" else PeerFailed)(f"{what}: rank {rank} failed: {kind}: {message}")
    return done[0]
