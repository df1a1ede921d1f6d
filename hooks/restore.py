"""Bringing a snapshot back into the live state: plan, check, apply, compare; each stage together with all ranks.

Every stage ends with a gathering of outcomes, so no rank goes on alone: if one cannot, all learn why. A source that turns
out damaged is struck from the plan, and the next best snapshot is tried.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from ..agent import wire_pb2 as wire
from ..agent.client import wire_id
from ..agent.inventory import held_images, held_parities, parity_source
from ..crashpoints import reach
from ..errors import Corrupt, LayoutMismatch, PeerFailed, RestoreDiverged, SnapshotLost
from ..snapshot.arena import Slot
from ..snapshot.assembly import Read, assemble
from ..snapshot.codec import decode
from ..snapshot.live import SourceImage, apply
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, Plan, Rebuilt, plan
from ..snapshot.replicas import disagreeing, sums
from ..snapshot.state import Targets, TrainingState, from_leaf
from .ranks import Ranks

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one rank is about to apply: verified as far as that is possible without reading the tensors' bytes."""

    images: dict[int, SourceImage]
    targets: Targets
    reads: list[Read]
    values: dict[str, Any]
    shared: frozenset[str]


@dataclass(frozen=True, slots=True)
class Found:
    """What all agents hold together.

    Attributes:
        images, parities: sealed.
        spoiled: slots that were sealed and cannot be read.
        addresses: where each agent is found.
    """

    images: tuple[Held, ...]
    spoiled: tuple[str, ...]
    parities: tuple[HeldParity, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)


def gather_inventories(ranks: Ranks, reply: wire.ImageList, timeout_s: float) -> Found:
    """What any agent holds; the same on every rank. Collective.

    Each image is reported by its own rank where that is attached to the agent, so the answer does not grow with the
    square of the ranks; images of ranks that are elsewhere now are reported by all ranks of the node.
    """
    elsewhere = {image.path for image in reply.images if image.trainer_alive and image.rank != ranks.rank}
    mine = [asdict(held) for held in held_images(reply) if held.path not in elsewhere]
    parities = [asdict(parity) for parity in held_parities(reply)]
    said = json.dumps([mine, list(reply.spoiled), parities, [reply.agent, reply.address]]).encode()
    gathered = [json.loads(part) for part in ranks.gather(said, "comparing what the agents hold", timeout_s)]
    images = {Held(**{**entry, "id": SnapshotId(**entry["id"])}) for part, *_ in gathered for entry in part}
    guards = {
        HeldParity(**{**entry, "id": SnapshotId(**entry["id"]), "ranks": tuple(entry["ranks"])})
        for _, _, part, _ in gathered
        for entry in part
    }
    return Found(
        tuple(sorted(images, key=lambda held: (held.id, held.rank, held.agent, held.path))),
        tuple(sorted({path for _, part, *_ in gathered for path in part})),
        tuple(sorted(guards, key=lambda parity: (parity.id, parity.key, parity.index, parity.agent))),
        dict(where for *_, where in gathered),
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


class Restorer:
    """One restore of one rank. Collective throughout: every rank calls the same methods in the same order."""

    def __init__(
        self,
        state: TrainingState,
        ranks: Ranks,
        timeout_s: float,
        mapped: Iterable[Slot] = (),
        agent: str = "",
        bring: Callable[[wire.MaterialiseRequest, float], wire.MaterialiseReply] | None = None,
    ) -> None:
        """*mapped* are slots that need not be mapped again; *agent* is this node's; *bring* has it bring an image
        here (without it, all images are)."""
        self._agent = agent
        self._bring = bring
        self._mapped = {slot.place.path: slot for slot in mapped}
        self._state = state
        self._ranks = ranks
        self._timeout_s = timeout_s

    def newest(self, found: Found) -> SnapshotId | None:
        """Restore the newest snapshot that can be had; None if none was ever complete.

        Raises:
            SnapshotLost: one was complete, and neither it nor an older one can be had. The live tensors may be partly
                overwritten if its images proved damaged only then.
            LayoutMismatch: it does not fit the live state, or this number of ranks; nothing is changed.
            RestoreDiverged: ranks that must agree do not.
        """
        damaged: set[tuple[SnapshotId, int]] = set()
        hopeless: set[tuple[SnapshotId, int]] = set()
        while True:
            decision = plan(found.images, self._ranks.world, damaged, found.parities, hopeless)
            if decision.chosen is None:
                self._nothing_left(decision, found, damaged)
                return None
            _log.log(logging.WARNING if decision.loss else logging.INFO, "%s", decision.explain())
            reach("restore.planned")
            good = [image for image in found.images if (image.id, image.rank) not in damaged]
            bad = self._attempt(decision, replace(found, images=tuple(good)))
            if not bad:
                return decision.chosen
            for rank in bad:
                (hopeless if isinstance(decision.sources[rank], Rebuilt) else damaged).add((decision.chosen, rank))

    def _nothing_left(self, decision: Plan, found: Found, damaged: set[tuple[SnapshotId, int]]) -> None:
        """Raise unless it is certain that no snapshot ever was complete: starting afresh must not be an accident."""
        if decision.loss and any(image.world != self._ranks.world for image in found.images):
            raise LayoutMismatch(decision.explain())
        if decision.loss or damaged or found.spoiled:
            lines = [f"{path}: it was sealed, and its record cannot be read" for path in found.spoiled]
            raise SnapshotLost("\n".join([decision.explain(), *lines]))
        _log.info("%s", decision.explain())

    def _attempt(self, decision: Plan, found: Found) -> set[int]:
        """Restore as planned; returns the ranks whose images proved damaged, empty on success."""
        with ExitStack() as stack:
            damage: dict[int, str] = {}
            prepared = together(
                self._ranks,
                "preparing the restore",
                self._timeout_s,
                lambda: self._prepare(decision, found, stack, damage),
            )
            if bad := self._all_damage(damage):
                return bad
            assert prepared is not None
            together(self._ranks, "restoring", self._timeout_s, lambda: self._apply(prepared, damage))
            if bad := self._all_damage(damage):
                return bad
            together(self._ranks, "restoring values", self._timeout_s, lambda: self._finish(prepared))
        self._compare(prepared.shared)
        reach("restore.applied")
        return set()

    def _prepare(self, decision: Plan, found: Found, stack: ExitStack, damage: dict[int, str]) -> _Prepared | None:
        rank, id = self._ranks.rank, decision.chosen
        assert id is not None
        images: dict[int, SourceImage] = {}
        for needed in self._needed():
            try:
                path = self._path(id, needed, decision, found)
                image = SourceImage(path, needed, id, self._mapped.get(path))
            except (Corrupt, SnapshotLost, OSError) as error:
                damage[needed] = str(error)
                continue
            stack.callback(image.close)
            images[needed] = image
        if damage:
            return None
        held = [
            placed.slice
            for owner, image in images.items()
            for placed in image.layout.placed
            if owner == rank or rank in placed.slice.members
        ]
        targets = self._state.targets(held)
        layouts = {r: i.layout for r, i in images.items()}
        reads = assemble([item.slice for item in targets.items], layouts, rank)
        try:
            values = decode(images[rank].values(), from_leaf)
        except Corrupt as error:
            damage[rank] = str(error)
            return None
        if not isinstance(values, dict):
            raise LayoutMismatch(f"the values of {decision.chosen} are a {type(values).__name__}, not a state")
        self._state.check_values(values)
        shared = frozenset(piece.name for piece in held if piece.members)
        return _Prepared(images, targets, reads, values, shared)

    def _needed(self) -> list[int]:
        """The ranks whose images hold something of this rank's state: its own, and those of its replicas."""
        if self._ranks.world == 1:
            return [0]
        members = {rank for item in self._state.survey().items for rank in item.slice.members}
        return sorted(members | {self._ranks.rank})

    def _path(self, id: SnapshotId, rank: int, decision: Plan, found: Found) -> str:
        """Where the image lies on this node; brought here if it is not yet. Raises ``SnapshotLost``."""
        copies = [image for image in found.images if (image.id, image.rank) == (id, rank)]
        here = next((image for image in copies if self._bring is None or image.agent == self._agent), None)
        if here is not None and isinstance(decision.sources[rank], Held):
            return here.path
        if self._bring is None:
            raise SnapshotLost(f"the image of {id} of rank {rank} is not on this node")
        request = wire.MaterialiseRequest(
            id=wire_id(id),
            rank=rank,
            world=self._ranks.world,
            images=[
                wire.Source(rank=i.rank, agent=i.agent, address=found.addresses[i.agent], checks_crc=i.checks_crc)
                for i in found.images
                if i.id == id
            ],
            parities=[parity_source(p, found.addresses[p.agent]) for p in found.parities if p.id == id],
        )
        reply = self._bring(request, self._timeout_s)
        _log.info("%s of rank %d: %s", id, rank, reply.how)
        return reply.path

    def _apply(self, prepared: _Prepared, damage: dict[int, str]) -> None:
        for rank, image in prepared.images.items():
            try:
                apply(prepared.targets.items, [r for r in prepared.reads if r.rank == rank], {rank: image})
            except Corrupt as error:
                damage[rank] = str(error)
                return

    def _finish(self, prepared: _Prepared) -> None:
        self._state.install(prepared.targets)
        self._state.apply_values(prepared.values)

    def _all_damage(self, mine: dict[int, str]) -> set[int]:
        """The ranks whose images any rank found damaged. Collective."""
        for rank, reason in mine.items():
            _log.error("the image of rank %d cannot be used: %s", rank, reason)
        said = json.dumps(sorted(mine)).encode()
        return {r for part in self._ranks.gather(said, "comparing damage", self._timeout_s) for r in json.loads(part)}

    def _compare(self, shared: frozenset[str]) -> None:
        """Replicas must hold the same bytes now. Raises ``RestoreDiverged`` otherwise. Collective."""
        items = [i for i in self._state.survey().items if i.slice.members and i.slice.name in shared] if shared else []
        said = json.dumps(sums(items)).encode()
        gathered = [json.loads(part) for part in self._ranks.gather(said, "comparing restored state", self._timeout_s)]
        if split := disagreeing(gathered, {item.slice.members for item in items}):
            raise RestoreDiverged(f"after the restore, ranks {list(split[0])} hold different bytes of what they share")
