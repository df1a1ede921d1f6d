"""Bringing a snapshot back into the live state: plan, check, apply, compare; each stage together with all ranks.

Every stage ends with a gathering of outcomes, so no rank goes on alone: if one cannot, all learn why. A copy that turns
out damaged is struck from the plan; the image is then had from elsewhere, and if it cannot be, the next best snapshot is tried.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from ..agent import wire_pb2 as wire
from ..agent.client import wire_id
from ..agent.inventory import held_images, held_parities, in_tiers, parity_source
from ..crashpoints import reach
from ..errors import (
    ConfigError,
    Corrupt,
    HoldfastError,
    LayoutMismatch,
    PeerFailed,
    RestoreDiverged,
    SnapshotLost,
    TierUnreachable,
)
from ..snapshot.arena import Slot
from ..snapshot.assembly import Read, assemble
from ..snapshot.beat import NONE
from ..snapshot.codec import decode
from ..snapshot.live import SourceImage, apply
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, InTier, Persisted, Plan, Rebuilt, plan
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


class _Bad(NamedTuple):
    """An image that some rank cannot use.

    Attributes:
        agent, path: the copy that it read; empty if that was brought to its node for it.
        nowhere: no source could give it: no copy, and not the group.
    """

    rank: int
    agent: str
    path: str
    nowhere: bool


@dataclass(slots=True)
class _Attempt:
    """What one rank reads in one attempt, and what it cannot use of that.

    Attributes:
        read: the copy of each rank's image that is read where it lies; what was brought here for this is not among them.
        damage: why the image of a rank cannot be used.
        nowhere: ranks whose images no source could give: every copy, and the group.
    """

    read: dict[int, Held] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    nowhere: set[int] = field(default_factory=set)

    def bad(self) -> list[_Bad]:
        """The damage, as it is told to other ranks."""
        copies = {rank: self.read.get(rank) for rank in sorted(self.damage)}
        return [
            _Bad(rank, copy.agent if copy else "", copy.path if copy else "", rank in self.nowhere)
            for rank, copy in copies.items()
        ]


@dataclass(slots=True)
class _Struck:
    """What the attempts so far have shown to be of no use.

    Attributes:
        copies: damaged, each by itself: other copies of the same image are as good as before.
        hopeless: images that their groups could not compute.
        unread: images that could not be read from a tier, and from which.
    """

    copies: set[Held] = field(default_factory=set)
    hopeless: set[tuple[SnapshotId, int]] = field(default_factory=set)
    unread: set[tuple[SnapshotId, int, int]] = field(default_factory=set)

    def left(self, images: Iterable[Held]) -> list[Held]:
        """Those of *images* that may be good."""
        bad = {copy.where for copy in self.copies}
        return [image for image in images if image.where not in bad]

    def strike(self, decision: Plan, found: Found, bad: Iterable[_Bad]) -> None:
        """*bad*, as the ranks said it, came of *decision* and *found*. Every attempt that fails strikes something."""
        id = decision.chosen
        assert id is not None
        for rank, agent, path, nowhere in bad:
            copies = [image for image in self.left(found.images) if (image.id, image.rank) == (id, rank)]
            source = decision.sources[rank]
            if nowhere:
                self.copies.update(copies)
                self.hopeless.add((id, rank))
                self.unread.update((id, rank, part.tier) for part in found.stored if part.id == id)
            elif read := [copy for copy in copies if (copy.agent, copy.path) == (agent, path)]:
                self.copies.update(read)
            elif isinstance(source, Rebuilt):
                self.hopeless.add((id, rank))
            elif isinstance(source, Persisted):
                self.unread.add((id, rank, source.tier))
            elif not path:  # it had been brought here, from there in all likelihood
                self.copies.add(source)


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
    """

    images: tuple[Held, ...]
    spoiled: tuple[str, ...]
    parities: tuple[HeldParity, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    stored: tuple[InTier, ...] = ()
    silent: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


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
        self._unread: frozenset[tuple[SnapshotId, int, int]] = frozenset()

    def newest(self, found: Found) -> SnapshotId | None:
        """Restore the newest snapshot that can be had; None if none was ever complete.

        Raises:
            SnapshotLost: one was complete, and neither it nor an older one can be had. The live tensors may be partly
                overwritten if its images proved damaged only then.
            LayoutMismatch: it does not fit the live state, or this number of ranks; nothing is changed.
            ConfigError: there is nothing, and tiers hold another job's snapshots: perhaps it is this one, under another name.
            TierUnreachable: nothing is to be had, or not what was complete last, and a tier may have it that cannot be read now.
            RestoreDiverged: ranks that must agree do not.
        """
        struck = _Struck()
        while True:
            decision = plan(
                found.images,
                self._ranks.world,
                struck.copies,
                found.parities,
                struck.hopeless,
                found.stored,
                struck.unread,
            )
            self._refuse_to_go_far_back(decision, found)
            if decision.chosen is None:
                self._nothing_left(decision, found, struck)
                return None
            _log.log(logging.WARNING if decision.loss else logging.INFO, "%s", decision.explain())
            reach("restore.planned")
            self._unread = frozenset(struck.unread)
            left = replace(found, images=tuple(struck.left(found.images)))
            bad = self._attempt(decision, self._read_once(decision, left))
            if not bad:
                return decision.chosen
            struck.strike(decision, found, bad)

    def _read_once(self, decision: Plan, found: Found) -> Found:
        """*found*, with the images that come from tiers in the memory of their own ranks' nodes, as far as that goes. Collective.

        Replicas need each other's images. A tier may be slow and far away, so each image is read there once; the other nodes
        fetch it from the one that has it then.
        """
        rank, id = self._ranks.rank, decision.chosen
        if self._ranks.world == 1 or self._bring is None or not any(isinstance(s, Persisted) for s in decision.sources):
            return found
        assert id is not None
        mine: list[dict[str, Any]] = []
        if isinstance(decision.sources[rank], Persisted):
            try:
                reply = self._bring(self._request(id, rank, found), self._timeout_s)
            except HoldfastError as error:  # ``_prepare`` will meet it again, and judge
                _log.warning("%s of rank %d: %s", id, rank, error)
            else:
                _log.info("%s of rank %d: %s", id, rank, reply.how)
                mine = [{"rank": rank, "agent": self._agent, "path": reply.path, "checks_crc": reply.checks_crc}]
        gathered = self._ranks.gather(json.dumps(mine).encode(), "reading tiers", self._timeout_s)
        brought = [
            Held(id=id, world=self._ranks.world, watermark=NONE, image_bytes=0, **entry)
            for part in gathered
            for entry in json.loads(part)
        ]
        return replace(found, images=(*found.images, *brought))

    def _refuse_to_go_far_back(self, decision: Plan, found: Found) -> None:
        """Raise if a newer snapshot is passed over for a reason that somebody can do something about.

        Tiers keep milestones for ever; without this, a job that comes back with another number of ranks would go on from one.
        """
        if decision.lost is None:
            return
        worlds = {part.world for parts in (found.images, found.stored) for part in parts if part.id == decision.lost}
        if worlds and self._ranks.world not in worlds:
            raise LayoutMismatch(decision.explain())
        if found.silent:
            raise TierUnreachable("\n".join([decision.explain(), "these tiers may have it:", *found.silent]))

    def _nothing_left(self, decision: Plan, found: Found, struck: _Struck) -> None:
        """Raise unless it is certain that no snapshot ever was complete: starting afresh must not be an accident."""
        if found.silent:
            raise TierUnreachable("\n".join([decision.explain(), "these tiers may have more:", *found.silent]))
        if decision.loss or struck.copies or found.spoiled:
            lines = [f"{path}: it was sealed, and its record cannot be read" for path in found.spoiled]
            raise SnapshotLost("\n".join([decision.explain(), *lines]))
        if found.others:
            raise ConfigError(
                f"there is nothing of this job, but {'; '.join(found.others)}; if that is this job, name it so (job=, "
                f"HOLDFAST_JOB), or let it go on from there, Tier(…, any_job=True); else give it a tier of its own"
            )
        _log.info("%s", decision.explain())

    def _attempt(self, decision: Plan, found: Found) -> list[_Bad]:
        """Restore as planned; returns what proved damaged on any rank, nothing on success."""
        attempt = _Attempt()
        with ExitStack() as stack:
            prepared = together(
                self._ranks,
                "preparing the restore",
                self._timeout_s,
                lambda: self._prepare(decision, found, stack, attempt),
            )
            if bad := self._all_damage(attempt):
                return bad
            assert prepared is not None
            together(self._ranks, "restoring", self._timeout_s, lambda: self._apply(prepared, attempt.damage))
            if bad := self._all_damage(attempt):
                return bad
            together(self._ranks, "restoring values", self._timeout_s, lambda: self._finish(prepared))
        self._compare(prepared.shared)
        reach("restore.applied")
        return []

    def _prepare(self, decision: Plan, found: Found, stack: ExitStack, attempt: _Attempt) -> _Prepared | None:
        rank, id = self._ranks.rank, decision.chosen
        assert id is not None
        images: dict[int, SourceImage] = {}
        for needed in self._needed():
            image = self._open(id, needed, decision, found, attempt)
            if image is not None:
                stack.callback(image.close)
                images[needed] = image
        if attempt.damage:
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
            attempt.damage[rank] = str(error)
            return None
        if not isinstance(values, dict):
            raise LayoutMismatch(f"the values of {decision.chosen} are a {type(values).__name__}, not a state")
        self._state.check_values(values)
        shared = frozenset(piece.name for piece in held if piece.members)
        return _Prepared(images, targets, reads, values, shared)

    def _open(self, id: SnapshotId, rank: int, decision: Plan, found: Found, attempt: _Attempt) -> SourceImage | None:
        """The image, to be read where it lies on this node, brought here if it is not yet; None if that failed."""
        here = self._copy_here(id, rank, decision, found)
        try:
            if here is not None:
                attempt.read[rank] = here
            path = here.path if here is not None else self._brought(id, rank, found)
            return SourceImage(path, rank, id, self._mapped.get(path))
        except SnapshotLost as error:
            attempt.damage[rank] = str(error)
            attempt.nowhere.add(rank)
        except (Corrupt, OSError) as error:
            attempt.damage[rank] = str(error)
        return None

    def _needed(self) -> list[int]:
        """The ranks whose images hold something of this rank's state: its own, and those of its replicas."""
        if self._ranks.world == 1:
            return [0]
        members = {rank for item in self._state.survey().items for rank in item.slice.members}
        return sorted(members | {self._ranks.rank})

    def _copy_here(self, id: SnapshotId, rank: int, decision: Plan, found: Found) -> Held | None:
        """The copy on this node, if there is one."""
        if not isinstance(decision.sources[rank], Held):
            return None
        copies = [image for image in found.images if (image.id, image.rank) == (id, rank)]
        return next((image for image in copies if self._bring is None or image.agent == self._agent), None)

    def _brought(self, id: SnapshotId, rank: int, found: Found) -> str:
        """Where the image lies on this node, now that its agent has brought it. Raises ``SnapshotLost``."""
        if self._bring is None:
            raise SnapshotLost(f"the image of {id} of rank {rank} is not on this node")
        reply = self._bring(self._request(id, rank, found), self._timeout_s)
        _log.info("%s of rank %d: %s", id, rank, reply.how)
        return reply.path

    def _request(self, id: SnapshotId, rank: int, found: Found) -> wire.MaterialiseRequest:
        """What the agent must know to bring an image here: everybody who has it, or can compute it."""
        return wire.MaterialiseRequest(
            id=wire_id(id),
            rank=rank,
            world=self._ranks.world,
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

    def _all_damage(self, mine: _Attempt) -> list[_Bad]:
        """What any rank found damaged. Collective."""
        for rank, reason in mine.damage.items():
            _log.error("the image of rank %d cannot be used: %s", rank, reason)
        said = json.dumps(mine.bad()).encode()
        gathered = self._ranks.gather(said, "comparing damage", self._timeout_s)
        return sorted({_Bad(*entry) for part in gathered for entry in json.loads(part)})

    def _compare(self, shared: frozenset[str]) -> None:
        """Replicas must hold the same bytes now. Raises ``RestoreDiverged`` otherwise. Collective."""
        items = [i for i in self._state.survey().items if i.slice.members and i.slice.name in shared] if shared else []
        said = json.dumps(sums(items)).encode()
        gathered = [json.loads(part) for part in self._ranks.gather(said, "comparing restored state", self._timeout_s)]
        if split := disagreeing(gathered, {item.slice.members for item in items}):
            raise RestoreDiverged(f"after the restore, ranks {list(split[0])} hold different bytes of what they share")
