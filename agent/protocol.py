"""What the agent does about one rank's snapshots. Pure: events in, actions out; ``service`` performs them in order.

A *flight* is one snapshot between the opening of its slot and its sealing. While the trainer lives, only it stores
commit words; a flight that it had fenced before it died is sealed by the agent, everything else in flight is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ..snapshot.record import SnapshotId


@dataclass(frozen=True, slots=True)
class Opened:
    """The trainer unsealed the slot and fills it with *id*."""

    slot: int
    id: SnapshotId
    watermark: int


@dataclass(frozen=True, slots=True)
class Copied:
    """The trainer's copy has ended."""

    slot: int
    step: int
    layout: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """The trainer's torn-copy check has passed."""

    slot: int
    step: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """The trainer gave the snapshot up."""

    slot: int
    step: int


@dataclass(frozen=True, slots=True)
class Checksummed:
    """The agent's own work on the image has ended; *nonce* is the one to put into the record."""

    slot: int
    id: SnapshotId
    nonce: int


@dataclass(frozen=True, slots=True)
class TrainerLost:
    """The stream broke, with or without a goodbye."""


Event = Opened | Copied | Fenced | Discarded | Checksummed | TrainerLost


@dataclass(frozen=True, slots=True)
class Checksum:
    """Action: checksum the image, off the event loop; report ``Checksummed`` or drop it."""

    slot: int
    id: SnapshotId
    image_bytes: int


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Action: write tables and record, with this layout, watermark and nonce."""

    slot: int
    id: SnapshotId
    layout: int
    watermark: int
    nonce: int


@dataclass(frozen=True, slots=True)
class TellPrepared:
    """Action: tell the trainer that the record is written."""

    slot: int
    step: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Action: store the commit word, for a trainer that is no more, if the slot is still open for that step."""

    slot: int
    step: int
    nonce: int


Action = Checksum | WriteRecord | TellPrepared | Commit


@dataclass(frozen=True, slots=True)
class Flight:
    """One snapshot on its way to being sealed."""

    id: SnapshotId
    watermark: int
    layout: int | None = None  # known once copied
    fenced: bool = False
    nonce: int | None = None  # known once prepared


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
    """What *event* leads to. Events about a flight that is over (another step in the slot) change nothing."""
    match event:
        case Opened(slot, id, watermark):
            return session.with_flight(slot, Flight(id, watermark)), []
        case TrainerLost():
            return _lost(session)
        case Checksummed(slot, id, nonce):
            return _checksummed(session, slot, id, nonce)
    flight = session.flights.get(event.slot)
    if flight is None or flight.id.step != event.step:
        return session, []
    match event:
        case Copied(slot, _, layout, image_bytes):
            return session.with_flight(slot, replace(flight, layout=layout)), [Checksum(slot, flight.id, image_bytes)]
        case Fenced(slot):
            return session.with_flight(slot, replace(flight, fenced=True)), []
        case Discarded(slot):
            return session.with_flight(slot, None), []


def _checksummed(session: Session, slot: int, id: SnapshotId, nonce: int) -> tuple[Session, list[Action]]:
    flight = session.flights.get(slot)
    if flight is None or flight.id != id or flight.layout is None:
        return session, []
    write = WriteRecord(slot, id, flight.layout, flight.watermark, nonce)
    if session.alive:
        # The flight stays until the slot is opened again: should the trainer die before it commits, we do.
        return session.with_flight(slot, replace(flight, nonce=nonce)), [write, TellPrepared(slot, id.step, nonce)]
    return session.with_flight(slot, None), [write, Commit(slot, id.step, nonce)]


def _lost(session: Session) -> tuple[Session, list[Action]]:
    """Seal what was fenced; keep what is fenced and still being checksummed; drop what may be torn."""
    actions: list[Action] = []
    waiting: dict[int, Flight] = {}
    for slot, flight in sorted(session.flights.items()):
        if not flight.fenced or flight.layout is None:
            continue
        if flight.nonce is None:
            waiting[slot] = flight
        else:
            actions.append(Commit(slot, flight.id.step, flight.nonce))
    return Session(MappingProxyType(waiting), alive=False), actions
