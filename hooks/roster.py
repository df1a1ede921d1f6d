"""Who is there: all agents of the job, as every trainer tells its own. Groups follow from it."""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Iterable
from typing import Any

from ..agent import wire_pb2 as wire
from ..agent.client import wire_id
from ..agent.inventory import parity_source
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import HeldParity
from .ranks import Ranks

_log = logging.getLogger(__name__)


def gather_roster(
    ranks: Ranks,
    welcome: wire.Welcome,
    protect: str,
    wait_s: float,
    *,
    run: str,
    floor: SnapshotId | None,
    kept: Iterable[HeldParity],
    timeout_s: float,
) -> wire.Roster:
    """The same roster on every rank. Collective."""
    mine = {
        "agent": welcome.agent,
        "address": welcome.listen,
        "machine": welcome.machine,
        "domains": [[domain.level, domain.name] for domain in welcome.domains],
        "slots": len(welcome.slots),
        "image_bytes": max(slot.image_bytes for slot in welcome.slots),
        "table_bytes": max(slot.table_bytes for slot in welcome.slots),
    }
    told = [json.loads(part) for part in ranks.gather(json.dumps(mine).encode(), "finding all agents", wait_s)]
    return wire.Roster(
        run=run,
        protect=protect if _reachable(told) else "off",
        timeout_s=timeout_s,
        peers=_peers(told),
        floor=wire_id(floor) if floor is not None else None,
        kept=[parity_source(parity) for parity in kept],
    )


def _peers(told: list[dict[str, Any]]) -> list[wire.Peer]:
    """One entry per agent, in the order of their first ranks. Agents are told apart by name and address."""
    peers: dict[tuple[str, str], wire.Peer] = {}
    for rank, entry in enumerate(told):
        peer = peers.setdefault(
            (entry["agent"], entry["address"]),
            wire.Peer(
                agent=entry["agent"],
                address=entry["address"],
                domains=[wire.Domain(level=level, name=name) for level, name in entry["domains"]],
            ),
        )
        peer.ranks.append(rank)
        peer.slots = max(peer.slots, entry["slots"])
        peer.image_bytes = max(peer.image_bytes, entry["image_bytes"])
        peer.table_bytes = max(peer.table_bytes, entry["table_bytes"])
    return list(peers.values())


def _reachable(told: list[dict[str, Any]]) -> bool:
    """Whether all agents can reach each other: loopback addresses are good on one machine only."""
    if len({entry["machine"] for entry in told}) == 1:
        return True
    deaf = sorted({entry["agent"] for entry in told if _is_loopback(entry["address"])})
    if deaf:
        _log.warning(
            "agents %s listen on loopback addresses only, so nodes cannot protect each other; start them with --listen and "
            "certificates (holdfast certs init)",
            ", ".join(deaf),
        )
    return not deaf


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False
