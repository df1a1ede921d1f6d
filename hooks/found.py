"""What all agents of a job hold together, as all its ranks know it; and how ranks do one thing together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ..agent import wire_pb2 as wire
from ..agent.inventory import held_images, held_parities, in_tiers
from ..errors import Corrupt, HoldfastError, PeerFailed
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, InTier
from .ranks import Ranks

_log = logging.getLogger(__name__)
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


def gather_inventories(
    ranks: Ranks,
    reply: wire.ImageList,
    listed: wire.TierList,
    timeout_s: float,
    elsewhere: Callable[[Sequence[str], float], wire.ImageLists],
) -> Found:
    """What any agent holds; the same on every rank. Collective.

    Each image is reported by its own rank where that is attached to the agent, so the answer does not grow with the
    square of the ranks; images of ranks that are elsewhere now are reported by all ranks of the node. An agent may take
    a former trainer for alive whose rank is elsewhere already, so where each rank is, the ranks tell each other first.
    Agents on whose nodes there are no ranks any more are asked by others: *elsewhere* has this node's agent do so.
    """
    here = f"{reply.agent} {reply.address}".encode()
    attached = [where == here for where in ranks.gather(here, "comparing who is where", timeout_s)]
    theirs = {
        image.path
        for image in reply.images
        if image.trainer_alive and image.rank != ranks.rank and image.rank < ranks.world and attached[image.rank]
    }
    first = attached.index(True) == ranks.rank  # of this node: it speaks for all of them
    said = {
        **_said(reply, theirs),
        "stored": [asdict(part) for part in in_tiers(listed)] if first else [],
        "silent": [f"{reply.agent}: {error}" for error in listed.errors] if first else [],
        "others": list(listed.others) if first else [],
        "peers": len(reply.peers),
    }
    told = _exchanged(ranks, said, timeout_s)
    agents = tuple(part["agent"] for part in told)
    told += _from_elsewhere(ranks, reply, told, timeout_s, elsewhere)
    images = {_identified(Held, entry) for part in told for entry in part["images"]}
    guards = {_identified(HeldParity, entry, ranks=tuple(entry["ranks"])) for p in told for entry in p["parities"]}
    tiers = {
        _identified(InTier, entry, ranks=tuple(map(tuple, entry["ranks"])))
        for part in told
        for entry in part.get("stored", ())
    }
    return Found(
        tuple(sorted(images, key=lambda held: (held.id, held.rank, held.agent, held.path))),
        tuple(sorted({path for part in told for path in part["spoiled"]})),
        tuple(sorted(guards, key=lambda parity: (parity.id, parity.key, parity.index, parity.agent))),
        {part["agent"]: part["address"] for part in told},
        tuple(sorted(tiers, key=lambda part: (part.id, part.tier, part.agent))),
        tuple(sorted({error for part in told for error in part.get("silent", ())})),
        tuple(sorted({other for part in told for other in part.get("others", ())})),
        agents,
    )


def _from_elsewhere(
    ranks: Ranks,
    reply: wire.ImageList,
    told: Sequence[Mapping[str, Any]],
    timeout_s: float,
    elsewhere: Callable[[Sequence[str], float], wire.ImageLists],
) -> list[dict[str, Any]]:
    """What agents hold that were of this job, and on whose nodes it has no ranks now. Collective.

    Any agent that was there before knows all of them; the rank of the one that knows most says who is missing.
    """
    most = max(range(ranks.world), key=lambda rank: (told[rank]["peers"], -rank))
    if not told[most]["peers"]:
        return []
    present = {part["address"] for part in told}
    missing = sorted(set(reply.peers) - present) if ranks.rank == most else []
    said = ranks.gather(json.dumps(missing).encode(), "comparing which agents are missing", timeout_s)
    missing = json.loads(said[most])
    if not missing:
        return []
    mine = missing[ranks.rank :: ranks.world]
    answers: list[dict[str, Any]] = []
    if mine:
        try:
            answers = [_said(answer) for answer in elsewhere(mine, timeout_s).lists]
        except HoldfastError as error:  # what they hold counts as lost, which it may well be
            _log.warning("the agents at %s were not asked: %s", ", ".join(mine[:5]), error)
    gathered = ranks.gather(json.dumps(answers).encode(), "comparing what other agents hold", timeout_s)
    return [answer for part in gathered for answer in json.loads(part)]


def _said(reply: wire.ImageList, without: Collection[str] = ()) -> dict[str, Any]:
    """What an agent holds, as ranks tell each other, *without* the images at some paths."""
    return {
        "images": [asdict(held) for held in held_images(reply) if held.path not in without],
        "spoiled": list(reply.spoiled),
        "parities": [asdict(parity) for parity in held_parities(reply)],
        "agent": reply.agent,
        "address": reply.address,
    }


def _exchanged(ranks: Ranks, said: Mapping[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    gathered = ranks.gather(json.dumps(said).encode(), "comparing what the agents hold", timeout_s)
    return [json.loads(part) for part in gathered]


def _identified(kind: Callable[..., Result], entry: Mapping[str, Any], **fields: Any) -> Result:
    """The object that ``asdict`` has taken apart."""
    return kind(**{**entry, "id": SnapshotId(**entry["id"]), **fields})


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
