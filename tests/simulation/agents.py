"""Agents: the real ``guard`` and ``protocol``; modelled are their drivers, ``protector`` and ``service``, in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from holdfast.agent import guard, protocol
from holdfast.agent.guard import Cell, Guard, Offer, Stage, Table
from holdfast.erasure.placement import Node, Protection, groups
from holdfast.snapshot.beat import NONE
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import HeldParity

from .memory import Memory, Page, Parity, SlotMemory

if TYPE_CHECKING:
    from .trainers import Rank
    from .world import Place, World

TICK_S = 0.1
REPEAT_FROM_S = 0.05
REPEAT_UP_TO_S = 1.0


@dataclass(frozen=True, slots=True)
class Peer:
    """One agent as the roster has it."""

    agent: str
    ranks: tuple[int, ...]
    rack: str


@dataclass(frozen=True, slots=True)
class Roster:
    """As ``wire.Roster``."""

    run: str
    protect: str
    peers: tuple[Peer, ...]
    slots: int
    floor: SnapshotId | None
    kept: tuple[HeldParity, ...] = ()


@cache
def members(peers: tuple[Peer, ...], protect: str) -> tuple[tuple[tuple[Peer, ...], int], ...]:
    """The groups, each with how many may be lost: as ``Protector._table`` makes them."""
    by_node = {f"{min(peer.ranks):09d}": peer for peer in peers}
    nodes = [Node(name, (("host", peer.agent), ("rack", peer.rack))) for name, peer in by_node.items()]
    found = groups(nodes, Protection.parse(protect))
    return tuple((tuple(by_node[name] for name in sorted(group.members)), group.m) for group in found)


def table_of(name: str, roster: Roster) -> Table | None:
    """The group of agent *name*; None if there is none."""
    for peers, m in members(roster.peers, roster.protect):
        agents = tuple(peer.agent for peer in peers)
        if name in agents:
            return Table(agents, tuple(tuple(sorted(peer.ranks)) for peer in peers), agents.index(name), m)
    return None


class Stream:
    """A trainer's connection with its agent. Each direction keeps its order."""

    __slots__ = ("agent", "broken", "down_at", "pending", "rank", "up_at")

    def __init__(self, rank: Rank, agent: Agent) -> None:
        self.rank, self.agent = rank, agent
        self.broken = False
        self.pending: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()  # on its way to the agent
        self.up_at = self.down_at = 0.0


@dataclass(slots=True)
class Session:
    """As ``service._Trainer``: one life of a rank's trainer, or one connection of it."""

    rank: int
    world: int
    stream: Stream
    state: protocol.Session = field(default_factory=protocol.Session)
    work: list[tuple[int, int]] = field(default_factory=list)  # slots and nonces being checksummed


@dataclass(slots=True, eq=False)
class Fill:
    """A cell being filled, and where the images come from: member, agent, slot, nonce of its record."""

    action: guard.Accumulate
    table: Table
    sources: list[tuple[int, Agent, SlotMemory, Page]]
    missing: int | None = None  # a member that could not give anything from the first
    cancelled: bool = False
    sealed: bool = False


class Agent:
    """One life of one agent."""

    def __init__(self, world: World, place: Place, memory: Memory, name: str) -> None:
        self.world, self.place, self.memory, self.name = world, place, memory, name
        self.dead = False
        self.guard = Guard()
        self.roster: Roster | None = None
        self.alone = True
        self.sessions: dict[int, Session] = {}
        self.filling: dict[int, Fill] = {}
        self.sealing: dict[tuple[int, int], Fill] = {}  # by lane and cell
        self.reclaimable: tuple[int, ...] = ()
        self.ticking = False
        self.fails_next = False

    # -- trainers ------------------------------------------------------------------------------------------------------

    def attach(self, rank: Rank, slots: int) -> Stream:
        """A trainer comes, or comes back: what a dead one said last is heard, and what was in work is done, first."""
        former = self.sessions.get(rank.number)
        if former is not None:
            while former.stream.pending:
                self.hear(former)
            while former.work:
                self.checksummed(former, *former.work[0])
        stream = Stream(rank, self)
        self.sessions[rank.number] = Session(rank.number, rank.job.size, stream)
        self.memory.reserve(rank.number, slots)
        return stream

    def hear(self, session: Session) -> None:
        """The next message of a trainer."""
        if session.stream.pending:
            hear, what = session.stream.pending.popleft()
            hear(session, *what)

    def hear_copied(self, session: Session, event: protocol.Copied, floor_stands: bool) -> None:
        if event.keep is not None:
            self.complete(event.keep)
        self.world.tally["copied", event.id] += 1
        if floor_stands:
            self.guard.floor_stands()
        self.advance(session, event)

    def hear_discarded(self, session: Session, event: protocol.Discarded, id: SnapshotId) -> None:
        self.perform(self.guard.withdrawn(id))
        self.advance(session, event)

    def hear_roster(self, session: Session, roster: Roster) -> None:
        if roster == self.roster:
            self.perform([guard.TellGuarded(id) for id in self.guard.guarded()])
        else:
            self.roster = roster
            self.alone = self.assemble(roster)
        session.stream.rank.world.down(session.stream, session.stream.rank.hear_rostered, roster, self.alone)

    def advance(self, session: Session, event: protocol.Event) -> None:
        session.state, actions = protocol.advance(session.state, event)
        for action in actions:
            match action:
                case protocol.Checksum(slot, nonce):
                    session.work.append((slot, nonce))
                    self.world.after(
                        self.world.pace.checksum_s * self.place.slow, self.checksummed, session, slot, nonce
                    )
                case protocol.WriteRecord(slot, flight):
                    self.write_record(session, slot, flight)
                case protocol.TellPrepared(slot, nonce):
                    self.world.down(session.stream, session.stream.rank.hear_prepared, slot, nonce)

    def checksummed(self, session: Session, slot: int, nonce: int) -> None:
        if not self.dead and (slot, nonce) in session.work:
            session.work.remove((slot, nonce))
            if self.fails_next:
                self.fails_next = False
                self.advance(session, protocol.Discarded(slot, nonce))
                self.world.down(session.stream, session.stream.rank.hear_failed, slot, nonce)
            else:
                self.advance(session, protocol.Checksummed(slot, nonce))

    def write_record(self, session: Session, index: int, flight: protocol.Flight) -> None:
        slot = self.memory.slots.get((session.rank, index))
        if slot is None:  # its rank is elsewhere now, and the memory was given back
            return
        content = slot.content if slot.filling == flight.nonce else -flight.nonce  # else of bytes that were changing
        page = slot.page = Page(flight.id, session.rank, session.world, flight.watermark, flight.nonce, content)
        self.world.truth.pages[content, flight.nonce] = page
        self.memory.touch()
        self.world.say("%s: record of %s of rank %d", self.name, flight.id, session.rank)
        self.world.tally["prepared", flight.id] += 1
        self.recorded(session.rank, flight.id, flight.keep)

    # -- protector -----------------------------------------------------------------------------------------------------

    def assemble(self, roster: Roster) -> bool:
        """As ``Protector._assemble``; whether this agent is alone."""
        table = table_of(self.name, roster)
        self.reclaimable = next(peer.ranks for peer in roster.peers if peer.agent == self.name)
        for fill in self.filling.values():
            fill.cancelled = True
        self.filling.clear()
        if table is None:
            self.perform(self.guard.assemble(None, roster.run, roster.floor, [], self.world.pace.timeout_s))
            return True
        self.memory.reserve_cells(table.lanes, roster.slots)
        self.memory.mark_complete({parity.id for parity in roster.kept})
        self.world.say("%s: group of %s with floor %s", self.name, ", ".join(table.agents), roster.floor)
        self.perform(
            self.guard.assemble(table, roster.run, roster.floor, self.cells(table, roster), self.world.pace.timeout_s)
        )
        for rank, page in self.memory.sealed():
            if page.id.run == roster.run or page.id == roster.floor:
                keep = SnapshotId(page.id.generation, page.watermark, page.id.run) if page.watermark != NONE else None
                self.recorded(rank, page.id, (keep or roster.floor) if page.id.run == roster.run else roster.floor)
        self.tick_soon()
        return False

    def cells(self, table: Table, roster: Roster) -> list[list[Cell]]:
        """As ``Arenas.cells``."""
        kept = {(p.lane, p.id, p.key, p.index) for p in roster.kept if p.agent == self.name}
        found: list[list[Cell]] = [[] for _ in range(table.lanes)]
        for (lane, _), p in sorted(self.memory.cells.items(), key=lambda item: item[0]):
            if lane < table.lanes:
                found[lane].append(
                    Cell()
                    if p is None
                    else Cell(
                        Stage.HELD, p.id, p.key if p.index == table.me else 0, (lane, p.id, p.key, p.index) in kept
                    )
                )
        return found

    def recorded(self, rank: int, id: SnapshotId, keep: SnapshotId | None) -> None:
        table = self.guard.table
        place = table.find(rank) if table is not None else None
        slot = self.memory.image(rank, id)
        if table is None or place is None or place[0] != table.me or slot is None or slot.page is None:
            return
        offer = Offer(*place, rank, id, slot.page.nonce, 1, 1, slot.page.content)
        self.perform(self.guard.recorded(offer, keep, self.world.now))
        self.tick_soon()

    def complete(self, id: SnapshotId) -> None:
        """As ``Protector.complete``."""
        if id.run == self.guard.run and self.reclaimable:
            self.memory.reclaim(self.reclaimable, self.guard.table.lanes if self.guard.table else 0)
            self.reclaimable = ()

    def perform(self, actions: list[guard.Action]) -> None:
        for action in actions:
            match action:
                case guard.SendOffer(member, offer):
                    self.send_offer(self.peer(member), offer, REPEAT_FROM_S)
                case guard.Accumulate():
                    self.fill(action)
                case guard.TellGuarded(id):
                    self.world.say("%s: %s is guarded", self.name, id)
                    self.tell(id, None)
                case guard.AskOffers(member):
                    self.ask_offers(self.guard.table, self.peer(member), REPEAT_FROM_S)
                case guard.TellUnguarded(id, reason):
                    self.world.say("%s: %s is not guarded: %s", self.name, id, reason)
                    self.tell(id, reason)
                case guard.Drop(lane, cell):
                    self.memory.cells[lane, cell] = None
                    self.memory.touch()
                case guard.Abandon(attempt):
                    if attempt in self.filling:
                        self.filling.pop(attempt).cancelled = True

    def peer(self, member: int) -> str:
        assert self.guard.table is not None
        return self.guard.table.agents[member]

    def tell(self, id: SnapshotId, unguarded: str | None) -> None:
        for session in self.sessions.values():
            rank = session.stream.rank
            self.world.tally["guarded", id] += 1
            self.world.down(session.stream, rank.hear_guarded if unguarded is None else rank.hear_unguarded, id)

    def tick_soon(self) -> None:
        if not self.ticking:
            self.ticking = True
            self.world.at(self.world.now + TICK_S, self.tick)

    def tick(self) -> None:
        self.ticking = False
        if not self.dead and self.guard.table is not None:
            self.perform(self.guard.tick(self.world.now))
            if self.restless:
                self.tick_soon()

    @property
    def restless(self) -> bool:
        """Whether time may still bring something about. (The real driver ticks on and on.)"""
        return any(not wanted.guarded for wanted in self.guard._wanted.values())

    # -- talking to peers ----------------------------------------------------------------------------------------------

    def send_offer(self, peer: str, offer: Offer, pause_s: float) -> None:
        """One try; another follows unless the peer's answer comes back."""
        if not self.dead and offer in self.guard.mine():
            lost, answered = self.world.fate()
            self.world.tally["offer", offer.id] += 1
            self.world.after(self.world.pace.message_s, self.deliver_offer, peer, offer, pause_s, lost, answered)

    def deliver_offer(self, peer: str, offer: Offer, pause_s: float, lost: bool, answered: bool) -> None:
        other = self.world.reach(self, peer)
        if other is not None and not lost:
            other.hear_offer(self.name, offer)
            if self.world.doubles():
                self.world.after(self.world.pace.message_s * 50, other.hear_offer, self.name, offer)
        if other is None or lost or not answered:
            self.world.at(self.world.now + pause_s, self.send_offer, peer, offer, min(2 * pause_s, REPEAT_UP_TO_S))

    def ask_offers(self, table: Table | None, peer: str, pause_s: float) -> None:
        if not self.dead and table is self.guard.table:
            lost, answered = self.world.fate()
            self.world.after(
                self.world.pace.message_s, self.deliver_question, table, peer, pause_s, lost or not answered
            )

    def deliver_question(self, table: Table | None, peer: str, pause_s: float, lost: bool) -> None:
        other = self.world.reach(self, peer)
        if other is None or lost:
            again = min(2 * pause_s, REPEAT_UP_TO_S)
            self.world.at(self.world.now + pause_s, self.ask_offers, table, peer, again)
        elif offers := other.guard.mine():
            self.world.after(self.world.pace.message_s, self.hear_offers, peer, offers)

    def hear_offers(self, peer: str, offers: list[Offer]) -> None:
        for offer in offers:
            self.hear_offer(peer, offer)

    def hear_offer(self, peer: str, offer: Offer) -> None:
        """As ``Protector._hear_offer``."""
        table = self.guard.table
        place = table.find(offer.rank) if table is not None else None
        if self.dead or table is None or place is None or table.agents[place[0]] != peer:
            return
        if place != (offer.member, offer.lane):
            offer = replace(offer, member=place[0], lane=place[1])
        self.perform(self.guard.offered(offer, self.world.now))

    # -- parity --------------------------------------------------------------------------------------------------------

    def fill(self, action: guard.Accumulate) -> None:
        table = self.guard.table
        assert table is not None
        where = action.lane, action.cell
        if where in self.sealing:  # it is waited for
            self.seal(self.sealing[where])
        self.world.truth.may_overwrite_cell(self, *where)
        self.memory.cells[where] = None
        self.memory.touch()
        fill = self.filling[action.attempt] = Fill(action, table, [])
        pace_s = self.world.pace.pull_s * self.place.slow
        for member, offer in enumerate(action.offers):
            if offer is None or member == table.me:
                continue
            self.world.tally["grant", action.id] += 1
            other = self.world.reach(self, table.agents[member])
            slot = other.memory.image(offer.rank, offer.id, offer.checks_crc) if other is not None else None
            if other is None or slot is None or slot.page is None:
                fill.missing = member
                pace_s = self.world.pace.message_s
            else:
                fill.sources.append((member, other, slot, slot.page))
                pace_s = max(pace_s, self.world.pace.pull_s * other.place.slow)
        self.world.say("%s: pulls %s of lane %d into cell %d", self.name, action.id, action.lane, action.cell)
        self.world.after(pace_s, self.pulled, fill)

    def pulled(self, fill: Fill) -> None:
        """All bytes are here, unless a source went away meanwhile."""
        action = fill.action
        if self.dead or fill.cancelled:
            return
        broken, gone = fill.missing, None
        for member, other, slot, page in fill.sources:
            if other.dead or not self.world.linked(self, other):
                broken = member
            elif slot.recorded is not page or slot.content != page.content:
                broken = gone = member
        if broken is not None:
            self.filling.pop(action.attempt)
            self.perform(self.guard.failed(action.lane, action.attempt, f"member {broken}", self.world.now, gone))
            self.tick_soon()
        elif self.world.rng.random() < 0.1:  # sealing is another thread's work, which a cancelled task leaves alone
            self.sealing[action.lane, action.cell] = fill
            self.world.after(self.world.pace.message_s, self.seal, fill)
        else:
            self.seal(fill)

    def seal(self, fill: Fill) -> None:
        action, table = fill.action, fill.table
        where = action.lane, action.cell
        if self.dead or fill.sealed:
            return
        fill.sealed = True
        self.sealing.pop(where, None)
        pages = self.world.truth.pages
        self.memory.cells[where] = Parity(
            action.id,
            action.key,
            table.me,
            tuple(-1 if offer is None else offer.rank for offer in action.offers),
            table.tolerance,
            tuple(None if offer is None else pages[offer.checks_crc, offer.nonce] for offer in action.offers),
        )
        self.memory.touch()
        if fill.cancelled:
            return
        self.filling.pop(action.attempt)
        self.world.say("%s: holds parity of %s of lane %d", self.name, action.id, action.lane)
        self.perform(self.guard.filled(action.lane, action.attempt, self.world.now))
