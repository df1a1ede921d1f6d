"""What the agent does about one rank's snapshots. Pure: events in, actions out; ``service`` performs them in order.

A *flight* is an image on its way to being sealed: copied by the trainer, then checksummed and recorded here. Whether it may
be used is not for the agent to decide: the trainer's commit word in the slot says so, and counts whether or not the
trainer is still there. So flights go on unchanged when their trainer dies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..snapshot.record import SnapshotId
from ..snapshot.unchanged import Unchanged


@dataclass(frozen=True, slots=True)
class Copied:
    """The trainer has filled the slot with the image of *id*; *nonce* names this filling, here and in the slot."""

    slot: int
    nonce: int
    id: SnapshotId
    watermark: int
    layout: int
    image_bytes: int
    keep: SnapshotId | None = None  # what must not be lost before this is protected
    unchanged: Unchanged | None = None  # what of it the slot held before


@dataclass(frozen=True, slots=True)
class Discarded:
    """The trainer gave the snapshot up, or it cannot be checksummed."""

    slot: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Checksummed:
    """The work that ``Checksum`` asked for is done."""

    slot: int
    nonce: int


Event = Copied | Discarded | Checksummed


@dataclass(frozen=True, slots=True)
class Checksum:
    """Action: checksum the image, off the event loop; report ``Checksummed``, or ``Discarded`` if that fails."""

    slot: int
    nonce: int
    image_bytes: int
    unchanged: Unchanged | None = None


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Action: write the tables and the record of this flight."""

    slot: int
    flight: Flight


@dataclass(frozen=True, slots=True)
class TellPrepared:
    """Action: tell the trainer, if it is still there, that the record is written."""

    slot: int
    nonce: int


Action = Checksum | WriteRecord | TellPrepared


@dataclass(frozen=True, slots=True)
class Flight:
    """An image that is copied and not yet recorded."""

    nonce: int
    id: SnapshotId
    watermark: int
    layout: int
    keep: SnapshotId | None = None
    unchanged: Unchanged | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """One rank's flights, by slot."""

    flights: Mapping[int, Flight] = field(default_factory=lambda: MappingProxyType({}))

    def with_flight(self, slot: int, flight: Flight | None) -> Session:
        """The session with another flight, or none, in that slot."""
        flights = {k: v for k, v in self.flights.items() if k != slot}
        if flight is not None:
            flights[slot] = flight
        return Session(MappingProxyType(flights))


def advance(session: Session, event: Event) -> tuple[Session, list[Action]]:
    """What *event* leads to. Events about a flight that is over (another nonce in the slot) change nothing."""
    if isinstance(event, Copied):
        flight = Flight(event.nonce, event.id, event.watermark, event.layout, event.keep, event.unchanged)
        checksum = Checksum(event.slot, event.nonce, event.image_bytes, event.unchanged)
        return session.with_flight(event.slot, flight), [checksum]
    found = session.flights.get(event.slot)
    if found is None or found.nonce != event.nonce:
        return session, []
    landed = session.with_flight(event.slot, None)
    if isinstance(event, Discarded):
        return landed, []
    return landed, [WriteRecord(event.slot, found), TellPrepared(event.slot, found.nonce)]
