"""What an agent does to protect its group's snapshots. Pure: every method returns what is to be done; ``protector`` does it.

Lane j of a group is the j-th rank of each member. For each lane and snapshot, an agent *offers* its rank's image to the other
members as soon as the image is recorded, and, once it knows of an image of every member, pulls what its own parity needs
and accumulates it in a *cell*. When the cells of all lanes are held, this node has done its share: the snapshot is
*guarded* here. It is protected when it is guarded and sealed on every node, which the beat finds out.

Nothing is ever pushed, so nothing can be applied twice: whatever goes wrong, a cell is filled again from zeros. The only
promise that members make is to keep an image until a newer one is protected; the slots' rule sees to that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from ..snapshot.record import SnapshotId

_RETRY_FROM_S: Final = 0.05
_RETRY_UP_TO_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Offer:
    """An image that its agent has recorded: who has it, of what, and what tells its bytes from any others."""

    member: int
    lane: int
    rank: int
    id: SnapshotId
    nonce: int
    image_bytes: int
    block_bytes: int
    checks_crc: int


@dataclass(frozen=True, slots=True)
class Table:
    """The members of this agent's group.

    Attributes:
        agents: names, in the order that the geometry counts them.
        ranks: of each member, ascending.
        me: the index of this agent.
        tolerance: how many members may be lost (m).
    """

    agents: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    me: int
    tolerance: int

    @property
    def lanes(self) -> int:
        """As many as the member with the most ranks has ranks."""
        return max(map(len, self.ranks))

    def rank_of(self, member: int, lane: int) -> int | None:
        """The rank of *member* in *lane*, None if it has fewer."""
        ranks = self.ranks[member]
        return ranks[lane] if lane < len(ranks) else None

    def find(self, rank: int) -> tuple[int, int] | None:
        """(member, lane) of *rank*, None if it is not of this group."""
        return next(((m, ranks.index(rank)) for m, ranks in enumerate(self.ranks) if rank in ranks), None)


class Stage(Enum):
    """Where a cell stands."""

    FREE = auto()
    FILLING = auto()
    HELD = auto()


@dataclass(frozen=True, slots=True)
class Cell:
    """One of the places for parity of a lane.

    Attributes:
        key: of the images that went into it; 0 if it was made for another place in the group than this agent has now.
        kept: the job relies on it until the floor is protected anew.
    """

    stage: Stage = Stage.FREE
    id: SnapshotId | None = None
    key: int = 0
    kept: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class SendOffer:
    """Action: tell this member of the image, again and again until it answers or the offer is withdrawn."""

    member: int
    offer: Offer


@dataclass(frozen=True, slots=True)
class AskOffers:
    """Action: ask this member what it offers, again and again until it answers."""

    member: int


@dataclass(frozen=True, slots=True)
class Accumulate:
    """Action: fill the cell with the parity of these images; report ``filled`` or ``failed`` with *attempt*.

    ``offers`` has one entry per member, None where it has no rank in this lane.
    """

    lane: int
    cell: int
    id: SnapshotId
    key: int
    attempt: int
    offers: tuple[Offer | None, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Action: stop filling; whatever it still reports is ignored."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Action: what the cell holds is not needed any more."""

    lane: int
    cell: int


@dataclass(frozen=True, slots=True)
class TellGuarded:
    """Action: tell the trainers that this node holds all its parity of the snapshot."""

    id: SnapshotId


@dataclass(frozen=True, slots=True)
class TellUnguarded:
    """Action: tell the trainers that it could not be had in time."""

    id: SnapshotId
    reason: str


Action = SendOffer | AskOffers | Accumulate | Abandon | Drop | TellGuarded | TellUnguarded


@dataclass(slots=True)
class _Wanted:
    """A snapshot that this agent wants guarded: since when, what stood in the way last, and whether it is."""

    since_s: float
    trouble: str = ""
    guarded: bool = False


@dataclass(slots=True)
class _Job:
    """A cell being filled."""

    id: SnapshotId
    cell: int
    attempt: int


@dataclass(slots=True)
class _Lane:
    """One lane: its cells, what fills one of them now, and how often that failed, by snapshot, and when to try again."""

    cells: list[Cell]
    job: _Job | None = None
    failures: dict[SnapshotId, tuple[int, float]] = field(default_factory=dict)

    def may_try(self, id: SnapshotId, now_s: float) -> bool:
        """Whether the pause after the last failure is over."""
        return now_s >= self.failures.get(id, (0, now_s))[1]

    def failed(self, id: SnapshotId, now_s: float) -> None:
        """Pause longer each time."""
        count = self.failures.get(id, (0, 0.0))[0]
        self.failures[id] = count + 1, now_s + min(_RETRY_FROM_S * 2**count, _RETRY_UP_TO_S)


@dataclass(slots=True)
class Guard:
    """The state of one agent's protection. Times are seconds of any clock that never goes back."""

    timeout_s: float = 60.0
    table: Table | None = None
    run: str = ""
    keep: SnapshotId | None = None
    _lanes: list[_Lane] = field(default_factory=list)
    _offers: dict[tuple[int, int, SnapshotId], Offer] = field(default_factory=dict)  # by member, lane and snapshot
    _wanted: dict[SnapshotId, _Wanted] = field(default_factory=dict)
    _attempts: int = 0
    _kept_alone: bool = (
        False  # no floor is protected anew: what the job goes back to stands by kept parity, and no other
    )

    # -- who is there ------------------------------------------------------------------------------------------------

    def assemble(
        self,
        table: Table | None,
        run: str,
        floor: SnapshotId | None,
        cells: Sequence[Sequence[Cell]],
        timeout_s: float,
        *,
        kept: bool = False,
    ) -> list[Action]:
        """The job has told who is there. Whatever was known of other agents' images may be of another life of theirs.

        Args:
            table: the group; None if there is none.
            run, floor: the run, and the snapshot that it started from.
            cells: of each lane, as they lie in memory.
            timeout_s: how long a snapshot may take to be guarded.
            kept: whether the job relies on parity of former groups, here or elsewhere.
        """
        actions: list[Action] = [Abandon(lane.job.attempt) for lane in self._lanes if lane.job]
        self.table, self.run, self.keep, self.timeout_s = table, run, floor, timeout_s
        self._lanes = [_Lane(list(lane)) for lane in cells]
        self._kept_alone = kept and floor is None
        self._offers.clear()
        self._wanted.clear()
        return actions + [AskOffers(member) for member in self._others()]

    def _others(self) -> list[int]:
        return [] if self.table is None else [m for m in range(len(self.table.agents)) if m != self.table.me]

    # -- images ------------------------------------------------------------------------------------------------------

    def recorded(self, offer: Offer, keep: SnapshotId | None, now_s: float) -> list[Action]:
        """An image of this node is recorded. *keep*: what must stay protected until this is."""
        self.keep = max(filter(None, (keep, self.keep)), default=None)
        self._offers[offer.member, offer.lane, offer.id] = offer
        self._wanted.setdefault(offer.id, _Wanted(now_s))
        self._forget_old()
        return [*(SendOffer(member, offer) for member in self._others()), *self._begin(now_s)]

    def offered(self, offer: Offer, now_s: float) -> list[Action]:
        """Another member has an image."""
        before = self._offers.get((offer.member, offer.lane, offer.id))
        self._offers[offer.member, offer.lane, offer.id] = offer
        self._forget_old()
        actions: list[Action] = []
        if before is not None and before != offer:  # what was pulled of it is of other bytes
            actions = self._abandon(offer.id, "another image took the place of one that was being pulled")
        return actions + self._begin(now_s)

    def withdrawn(self, id: SnapshotId) -> list[Action]:
        """A rank of this node gave the snapshot up."""
        actions = self._abandon(id, "given up")
        self._wanted.pop(id, None)
        self._offers = {key: offer for key, offer in self._offers.items() if key[2] != id}
        for lane, place in enumerate(self._lanes):
            for index, cell in enumerate(place.cells):
                if cell.id == id != self.keep:
                    place.cells[index] = Cell()
                    actions.append(Drop(lane, index))
        return actions

    def floor_stands(self) -> None:
        """The floor is protected everywhere, in the groups of this run: nobody relies on older parity any more."""
        for place in self._lanes:
            place.cells = [replace(cell, kept=False) for cell in place.cells]

    def mine(self) -> list[Offer]:
        """What this agent offers now."""
        return [] if self.table is None else [o for o in self._offers.values() if o.member == self.table.me]

    def offers(self) -> list[Offer]:
        """All images that are known of, here and at the other members."""
        return list(self._offers.values())

    def guarded(self) -> list[SnapshotId]:
        """The snapshots of which all parity of this node is held, oldest first."""
        return sorted(id for id, wanted in self._wanted.items() if wanted.guarded)

    def trouble(self) -> str:
        """Why the newest snapshot is not guarded, if that is known."""
        newest = max(self._wanted, default=None)
        return "" if newest is None or self._wanted[newest].guarded else self._wanted[newest].trouble

    def _forget_old(self) -> None:
        """Offers older than what must be kept are of no use any more."""
        if self.keep is not None:
            self._offers = {key: offer for key, offer in self._offers.items() if key[2] >= self.keep}
            self._wanted = {id: wanted for id, wanted in self._wanted.items() if id >= self.keep}

    # -- filling cells -----------------------------------------------------------------------------------------------

    def filled(self, lane: int, attempt: int, now_s: float) -> list[Action]:
        """The cell is complete, and says so in memory."""
        job = self._job(lane, attempt)
        if job is None:
            return []
        place = self._lanes[lane]
        place.job = None
        place.failures.pop(job.id, None)
        place.cells[job.cell] = Cell(Stage.HELD, job.id, place.cells[job.cell].key)
        return self._begin(now_s)

    def failed(self, lane: int, attempt: int, reason: str, now_s: float, gone: int | None = None) -> list[Action]:
        """The cell could not be filled. *gone*: the member whose image was no longer there, if that is why."""
        job = self._job(lane, attempt)
        if job is None:
            return []
        place = self._lanes[lane]
        place.job = None
        place.cells[job.cell] = Cell()
        place.failed(job.id, now_s)
        if job.id in self._wanted:
            self._wanted[job.id].trouble = reason
        if gone is not None and self.table is not None and gone != self.table.me:
            self._offers.pop((gone, lane, job.id), None)
            return [AskOffers(gone), *self._begin(now_s)]
        return self._begin(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed: tries that are due again, and snapshots that took too long."""
        actions: list[Action] = []
        for id, wanted in sorted(self._wanted.items()):
            if not wanted.guarded and now_s - wanted.since_s > self.timeout_s:
                reason = wanted.trouble or self._missing(id) or "pulling took too long"
                actions += [TellUnguarded(id, f"not protected within {self.timeout_s:g} s: {reason}")]
                wanted.since_s = now_s  # told again should the trainers not have heard
        return actions + self._begin(now_s)

    def _begin(self, now_s: float) -> list[Action]:
        """Fill what can be filled; tell what has become guarded."""
        if self.table is None:
            return []
        actions: list[Action] = []
        for id in sorted(self._wanted):
            wanted = self._wanted[id]
            if wanted.guarded or not self._mine_recorded(id):
                continue
            held = [self._begin_lane(lane, id, now_s, actions) for lane in range(len(self._lanes))]
            if all(held):
                wanted.guarded = True
                actions.append(TellGuarded(id))
        return actions

    def _begin_lane(self, lane: int, id: SnapshotId, now_s: float, actions: list[Action]) -> bool:
        """Whether the lane's parity of *id* is held; if not, and it can be filled now, *actions* has one more."""
        place = self._lanes[lane]
        offers = self._complete(lane, id)
        if offers is None:
            return False
        key = key_of(offers, self._tolerance)
        if Cell(Stage.HELD, id, key) in place.cells:
            return True
        if place.job is not None or not place.may_try(id, now_s):
            return False
        cell = self._overwritable(lane, id)
        if cell is not None:
            self._attempts += 1
            place.job = _Job(id, cell, self._attempts)
            place.cells[cell] = Cell(Stage.FILLING, id, key)
            actions.append(Accumulate(lane, cell, id, key, self._attempts, offers))
        return False

    def _overwritable(self, lane: int, id: SnapshotId) -> int | None:
        """The cell to fill with *id*: a free one, else the oldest that may go, those first that nobody wants."""
        cells = self._lanes[lane].cells
        free = next((i for i, cell in enumerate(cells) if cell.stage is Stage.FREE), None)
        if free is not None:
            return free
        may_go = [i for i, cell in enumerate(cells) if self._may_go(cell, lane, id)]
        return min(may_go, key=lambda i: (cells[i].id in self._wanted, cells[i].id), default=None)

    def _may_go(self, cell: Cell, lane: int, id: SnapshotId) -> bool:
        """Whether *cell* is of no use any more once *id* is guarded.

        Not if it is newer, and of this run: it may be the watermark, although nobody has told us yet. And not if it is of
        ``keep``; but of that there may be parity of a group that is no more, which goes when there is no other place.
        """
        if cell.stage is not Stage.HELD or cell.id is None:
            return False
        going_back = self.keep is None or self.keep.run != self.run  # the floor is the newest that is protected
        if going_back and cell.kept:
            return False
        if cell.id == self.keep:
            kept = self._kept_alone or any(other.kept for other in self._lanes[lane].cells)
            if going_back and id > cell.id and kept:
                return True  # the job began to train although not all could protect the floor anew: what is kept counts
            key = self._key(lane, cell.id)
            return key is not None and cell.key != key
        return cell.id < id or cell.id.run != self.run

    def _complete(self, lane: int, id: SnapshotId) -> tuple[Offer | None, ...] | None:
        """An offer of every member that has a rank in this lane; None if one is missing."""
        assert self.table is not None
        found: list[Offer | None] = []
        for member in range(len(self.table.agents)):
            offer = self._offers.get((member, lane, id))
            if offer is None and self.table.rank_of(member, lane) is not None:
                return None
            found.append(offer)
        return tuple(found)

    def _mine_recorded(self, id: SnapshotId) -> bool:
        """Whether all ranks of this node have recorded *id*: then what is older than their ``keep`` may go."""
        table = self.table
        assert table is not None
        return all((table.me, lane, id) in self._offers for lane in range(len(table.ranks[table.me])))

    def _key(self, lane: int, id: SnapshotId) -> int | None:
        """What names the lane's parity of *id*; None while an image is not known of."""
        offers = self._complete(lane, id)
        return None if offers is None else key_of(offers, self._tolerance)

    @property
    def _tolerance(self) -> int:
        assert self.table is not None
        return self.table.tolerance

    def _missing(self, id: SnapshotId) -> str:
        """Whose images are not known."""
        table = self.table
        if table is None:
            return "no group"
        members = {
            table.agents[m]
            for lane in range(len(self._lanes))
            for m in range(len(table.agents))
            if table.rank_of(m, lane) is not None and (m, lane, id) not in self._offers
        }
        return f"no image was offered by {', '.join(sorted(members))}" if members else ""

    def _abandon(self, id: SnapshotId, reason: str) -> list[Action]:
        actions: list[Action] = []
        for place in self._lanes:
            if place.job is not None and place.job.id == id:
                actions.append(Abandon(place.job.attempt))
                place.cells[place.job.cell] = Cell()
                place.job = None
        if id in self._wanted:
            self._wanted[id] = _Wanted(self._wanted[id].since_s, reason)
        return actions

    def _job(self, lane: int, attempt: int) -> _Job | None:
        job = self._lanes[lane].job if lane < len(self._lanes) else None
        return job if job is not None and job.attempt == attempt else None


def key_of(offers: Iterable[Offer | None], tolerance: int) -> int:
    """Names the parity of these images, in this order, under this code: cells of equal keys belong together."""
    parts = ("-" if o is None else f"{o.rank}:{o.id.run}:{o.id.step}:{o.image_bytes}:{o.checks_crc}" for o in offers)
    digest = hashlib.sha256(f"{tolerance}/{'/'.join(parts)}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
