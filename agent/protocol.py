"""What the agent does about one rank's snapshots. Pure: events in, actions out; ``service`` performs them in order.

A *flight* is one image from its copy to its sealing. As long as its stream stands, only the trainer stores commit words; what
it had fenced before that broke is sealed by the agent, everything else in flight is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ..snapshot.record import SnapshotId


@dataclass(frozen=True, slots=True)
class Copied:
    """The trainer has filled the slot with the image of *id*; *token* names this filling, here and in the commit word."""

    slot: int
    token: int
    id: SnapshotId
    watermark: int
    layout: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """The trainer's torn-copy check has passed."""

    slot: int
    token: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """The trainer gave the snapshot up."""

    slot: int
    token: int


@dataclass(frozen=True, slots=True)
class Checksummed:
    """The agent's own work on the image has ended; *nonce* is the one to put into the record."""

    slot: int
    token: int
    nonce: int


@dataclass(frozen=True, slots=True)
class TrainerLost:
    """The stream broke, with or without a goodbye."""


Event = Copied | Fenced | Discarded | Checksummed | TrainerLost


@dataclass(frozen=True, slots=True)
class Checksum:
    """Action: checksum the image, off the event loop; report ``Checksummed``, or ``Discarded`` if that fails."""

    slot: int
    token: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Action: write tables and record of this flight."""

    slot: int
    flight: Flight
    nonce: int


@dataclass(frozen=True, slots=True)
class TellPrepared:
    """Action: tell the trainer that the record is written."""

    slot: int
    token: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Action: store the commit word, for a trainer that is no more, if the slot is still open for that flight."""

    slot: int
    flight: Flight
    nonce: int


Action = Checksum | WriteRecord | TellPrepared | Commit


@dataclass(frozen=True, slots=True)
class Flight:
    """One image on its way to being sealed: copied, and then fenced and recorded in either order."""

    token: int
    id: SnapshotId
    watermark: int
    layout: int
    fenced: bool = False
    nonce: int | None = None  # once recorded


@dataclass(frozen=True, slots=True)
class Session:
    """One rank's flights, by slot. ``alive`` is false once its trainer is gone."""

    flights: Mapping[int, Flight] = field(default_factory=lambda: MappingProxyType({}))
    alive: bool = True

    def with_flight(self, slot: int, flight: Flight | None) -> Session:
        flights = {k: v for k, v in self.flights.items() if k != slot}
        if flight is not None:
            flights[slot] = flight
        return replace(self, flights=MappingProxyType(flights))

    @property
    def settled(self) -> bool:
        """Nothing more can happen: the trainer is gone and no flight of it can still be sealed."""
        return not self.alive and not self.flights


def advance(session: Session, event: Event) -> tuple[Session, list[Action]]:
    """What *event* leads to. Events about a flight that is over (another token in the slot) change nothing."""
    if isinstance(event, TrainerLost):
        return _lost(session)
    if isinstance(event, Copied):
        flight = Flight(event.token, event.id, event.watermark, event.layout)
        checksum = Checksum(event.slot, event.token, event.image_bytes)
        return (session.with_flight(event.slot, flight), [checksum]) if session.alive else (session, [])
    found = session.flights.get(event.slot)
    if found is None or found.token != event.token:
        return session, []
    match event:
        case Checksummed():
            return _checksummed(session, event.slot, found, event.nonce)
        case Fenced() if session.alive:
            return session.with_flight(event.slot, replace(found, fenced=True)), []
        case Discarded():
            return session.with_flight(event.slot, None), []
    return session, []


def _checksummed(session: Session, slot: int, flight: Flight, nonce: int) -> tuple[Session, list[Action]]:
    write = WriteRecord(slot, flight, nonce)
    if session.alive:
        # The flight stays until the slot is filled again: should the trainer die before it commits, we do.
        recorded = replace(flight, nonce=nonce)
        return session.with_flight(slot, recorded), [write, TellPrepared(slot, flight.token, nonce)]
    return session.with_flight(slot, None), [write, Commit(slot, flight, nonce)]


def _lost(session: Session) -> tuple[Session, list[Action]]:
    """Seal what was fenced; keep what is fenced and still being checksummed; drop what may be torn."""
    fenced = {slot: flight for slot, flight in sorted(session.flights.items()) if flight.fenced}
    commits: list[Action] = [Commit(slot, f, f.nonce) for slot, f in fenced.items() if f.nonce is not None]
    waiting = {slot: flight for slot, flight in fenced.items() if flight.nonce is None}
    return Session(MappingProxyType(waiting), alive=False), commits
