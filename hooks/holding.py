"""This rank's slots, and the connection to the agent that keeps them: re-made in the background whenever it breaks."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..agent import wire_pb2 as wire
from ..agent.client import AgentClient, Attachment, hello, id_of, place_of, told, wire_id
from ..agent.launch import ensure_agent
from ..agent.settings import NodeSettings
from ..crashpoints import reach
from ..errors import AgentUnreachable, DeadlinePassed, HoldfastError, SnapshotSkipped
from ..snapshot.arena import Place, Slot, measure
from ..snapshot.beat import NONE
from ..snapshot.eager import Values
from ..snapshot.layout import Layout
from ..snapshot.record import SnapshotId, new_nonce
from ..snapshot.slots import Event, SlotState, Stage, find, overwritable
from ..snapshot.unchanged import Unchanged

_log = logging.getLogger(__name__)
_RETRY_FROM_S: Final = 0.05
_RETRY_UP_TO_S: Final = 2.0
_ROOM_BYTES: Final = 256 << 10
_NEVER: Final = 1 << 62  # no image is that large
_NO_PINS: Final[frozenset[SnapshotId]] = frozenset()
_OUTCOMES: Final = 8  # answers about spills that are remembered


@dataclass(slots=True)
class _Flight:
    """What is on its way into a slot: its nonce, the watermark when it began, what the agent was told, its answer."""

    nonce: int
    watermark: int
    keep: wire.Id | None
    copied: wire.FromTrainer | None = None
    recorded: bool = False


class Holding:
    """What is held for this rank. Thread safe; only the constructor, ``protect``, ``wait_sealed``, ``inventory``,
    ``materialise``, ``describe_image``, ``read_ranges`` and ``close`` wait.

    Attributes:
        alone: this node has no group, so nothing is protected against its loss.
        welcome: what the agent said of itself.
        persisted: the newest step of this run that all ranks know to lie in the nearest tier, or ``NONE``.
        ending: the job is to end, so the last snapshot comes before what is being spilled.
    """

    welcome: wire.Welcome
    persisted: int = NONE
    ending: bool = False

    def __init__(
        self,
        settings: NodeSettings,
        version: str,
        *,
        rank: int,
        world: int,
        slots: int,
        image_bytes: int,
        table_bytes: int,
        timeout_s: float,
        tiers: Sequence[str] = (),
        grace_s: float = 0.0,
        unmapping: Callable[[Slot], None] = lambda slot: None,
        gave_up: Callable[[str], None] = lambda reason: None,
        heard: Callable[[wire.FromAgent], None] = lambda message: None,
    ) -> None:
        """Attach to the agent, which is started if there is none.

        Args:
            image_bytes, table_bytes: size of each slot; sealed slots keep the size they have.
            timeout_s: how long starting, attaching and prefaulting may take together.
            tiers: as ``TierSettings`` writes them, for the agent.
            grace_s: between a preemption notice and the kill, for the agent; 0 if it is to give none.
            unmapping: called before a slot's memory goes away.
            gave_up: called when a sealed snapshot had to be given up, on another thread.
            heard: what the agent says of spills and preemption, on another thread.

        Raises:
            HoldfastError: no agent, another's agent, another version, or not enough memory.
        """
        self._settings = settings
        self._rank = rank
        self._unmapping = unmapping
        self._gave_up = gave_up
        self._heard = heard
        self._pinned: dict[SnapshotId, float] = {}  # until when at most, by the monotonic clock
        self._spills: dict[SnapshotId, tuple[wire.FromTrainer, set[int]]] = {}  # not answered yet: which tiers
        self._outcomes: dict[SnapshotId, HoldfastError | None] = {}  # of the nearest tier: None if it has the image
        self._obstacle = (
            ""  # what the agent has met last in writing to the nearest tier, until it has written there again
        )
        self._guarded: set[SnapshotId] = set()
        self._complete: SnapshotId | None = None  # the newest snapshot that is never given up
        self._roster: wire.FromTrainer | None = None
        self._floor_stands = False
        self._rostered: wire.Rostered | None = None
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # what the training thread calls takes the lock itself, in C
        self._states: list[SlotState] = []
        self._slots: list[Slot] = []
        self._flights: dict[int, _Flight] = {}
        self._nonce: int | None = None  # of the next flight
        self._refused_bytes = _NEVER
        self._layout: wire.FromTrainer | None = None
        self._layout_text = b""
        self._attachment: Attachment | None = None
        self._closed = False
        self._hello = hello(
            settings, version, rank=rank, world=world, slots=slots, image_bytes=image_bytes, table_bytes=table_bytes,
            tiers=tiers, grace_s=grace_s,
        )  # fmt: skip
        self.alone = True
        self._attach(timeout_s)

    # -- the life of a snapshot, called from the training and copying threads ----------------------------------------

    def objection(self) -> str | None:
        """Why no slot could be filled now, or None. Assumes that what is sealed here soon is complete everywhere."""
        with self._lock:
            if self._attachment is None:
                return "agent-away"
            sealed = [s.id for s in self._states if s.stage is Stage.SEALED and s.id is not None]
            newest = max(sealed, default=None)
            if overwritable(self._states, newest, self._pins()) is not None:
                return None
            if overwritable(self._states, newest) is not None:
                return "spilling"
            growing = any(s.stage is Stage.GROWING for s in self._states)
            return "slot-growing" if growing else "slots-busy"

    def over_budget(self, image_bytes: int) -> bool:
        """Whether the agent has refused a slot for an image of that size."""
        return image_bytes >= self._refused_bytes

    def open(self, id: SnapshotId, *, keep: SnapshotId | None, image_bytes: int, table_bytes: int) -> Slot | None:
        """A slot for snapshot *id*, unsealed; None if there is none, or it must grow first.

        Args:
            id: what it will hold.
            keep: the newest snapshot known complete on all ranks. It, and everything newer, is left alone.
            image_bytes, table_bytes: what must fit.
        """
        with self._lock:
            index = overwritable(self._states, keep, self._pins())
            if index is None or self._attachment is None:
                return None
            slot = self._slots[index]
            if not slot.place.holds(table_bytes, image_bytes):
                self._grow(index, image_bytes, table_bytes)
                return None
            nonce, self._nonce = self._nonce or new_nonce(), None
            watermark = keep.step if keep is not None and keep.run == id.run else NONE
            flight = _Flight(nonce, watermark, wire_id(keep) if keep is not None else None)
            reach("capture.before-open")
            slot.unseal_to_fill()
            reach("capture.opened")
            self._states[index] = self._states[index].after(Event.OPEN, id)
            self._guarded.discard(id)
            self._flights[index] = flight
            return slot

    def describe(self, number: int, text: bytes) -> None:
        """Tell the agent of a layout, before the first image that has it."""
        with self._lock:
            if text is not self._layout_text:
                self._layout_text = text
                self._layout = wire.FromTrainer(layout=wire.LayoutText(number=number, text=text))
                self._send(self._layout)

    def copied(self, id: SnapshotId, layout: Layout, values: Values, unchanged: Unchanged) -> str | None:
        """Every byte of the tensors is in the slot; have *values* there, too. Returns why that could not be, else None; the
        snapshot is given up then.

        Only now does the agent hear of it: a message takes the interpreter for a moment, and on the copying thread that
        moment is not the training's.
        """
        try:
            values.encode()
        except Exception as error:  # noqa: BLE001 - the copying thread must go on, whatever the values are
            _log.warning("the values of %s cannot be encoded: %s", id, error)
            self.discard(id, str(error))
            return f"error: {type(error).__name__}"
        with self._lock:  # also while the values are written: the slot must not get to another snapshot meanwhile
            index = find(self._states, id)
            if index is None:
                return None
            image_bytes = layout.values_offset + values.nbytes
            if image_bytes > self._slots[index].place.image_bytes:
                self.discard(id, "its values have outgrown the slot")
                return "slot-growing"
            values.write(self._slots[index].image[layout.values_offset :])
            flight = self._flights[index]
            copied = wire.Copied(
                slot=index, nonce=flight.nonce, run=id.run, generation=id.generation, step=id.step,
                watermark=flight.watermark, layout=layout.number, image_bytes=image_bytes, keep=flight.keep,
                floor_stands=self._floor_stands, persisted=self.persisted + 1, since=unchanged.since,
                unchanged=[wire.Range(offset=start, nbytes=end - start) for start, end in unchanged.ranges],
            )  # fmt: skip
            flight.copied = wire.FromTrainer(copied=copied)
            self._send(flight.copied)
            self._nonce = self._nonce or new_nonce()  # drawn ahead: the training thread need not ask the system for it
            return None

    def fenced(self, id: SnapshotId) -> None:
        """The copy is exact. With the agent's record, written before or after this, the snapshot is sealed."""
        with self._lock:
            index = find(self._states, id)
            if index is None:
                return
            reach("fence.before-commit")
            self._slots[index].commit(self._flights[index].nonce)
            reach("fence.committed")
            self._happened(index, Event.FENCED)

    def discard(self, id: SnapshotId, reason: str) -> None:
        """Give a snapshot up; its slot is free."""
        with self._changed:
            index = find(self._states, id)
            if index is None:
                return
            self._slots[index].unseal()
            self._states[index] = self._states[index].after(Event.DISCARDED)
            self._guarded.discard(id)
            self._pinned.pop(id, None)
            flight = self._flights.pop(index, None)
            nonce = flight.nonce if flight is not None else 0
            self._send(
                wire.FromTrainer(discarded=wire.Discarded(slot=index, nonce=nonce, reason=reason, id=wire_id(id)))
            )
            self._changed.notify_all()

    def mark_complete(self, id: SnapshotId) -> None:
        """All ranks have *id*: said in its slot, before anything is overwritten that the job would else go back to."""
        with self._lock:
            self._complete = max(filter(None, (id, self._complete)))
            index = find(self._states, id)
            if index is not None and self._states[index].stage is Stage.SEALED:
                reach("complete.unmarked")
                self._slots[index].mark_complete()
                reach("complete.marked")

    def discard_newer(self, than: SnapshotId) -> list[SnapshotId]:
        """Give up everything newer than *than*; returns what that was."""
        with self._changed:
            newer = [s.id for s in self._states if s.id is not None and s.id > than]
            for id in newer:
                self.discard(id, f"the job went back to {than}")
            return newer

    # -- spilling ----------------------------------------------------------------------------------------------------

    def pin(self, id: SnapshotId, timeout_s: float) -> None:
        """Leave the slot of *id* alone until it is spilled, or that long: who spills it may never answer."""
        with self._changed:
            self._pinned[id] = max(self._pinned.get(id, 0.0), time.monotonic() + timeout_s)

    def forget_spills(self) -> None:
        """Another run begins: what the last one was to spill is not waited for."""
        with self._changed:
            self.persisted = NONE
            self._pinned.clear()
            self._spills.clear()

    def wait_able(self, timeout_s: float) -> None:
        """Return once a slot could be filled, or after that time."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self.objection() is not None and (left_s := deadline_s - time.monotonic()) > 0:
                self._changed.wait(left_s)

    def spill(self, id: SnapshotId, tiers: int) -> None:
        """Have the agent write this rank's image of *id*, which is complete on all ranks, to the first *tiers* tiers.

        Raises ``SnapshotSkipped`` if it is not here any more.
        """
        with self._changed:
            if find(self._states, id) is None:
                raise SnapshotSkipped(f"{id} cannot be spilled: a newer snapshot has taken its slot")
            message = wire.FromTrainer(spill=wire.Spill(id=wire_id(id), tiers=tiers))
            self._outcomes.pop(id, None)
            self._spills[id] = message, set(range(tiers))
            self._send(message)

    def wait_spilled(self, id: SnapshotId, timeout_s: float) -> None:
        """Return once the nearest tier has this rank's image of *id*.

        Raises:
            HoldfastError: why the agent could not write it.
            DeadlinePassed: it did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while id not in self._outcomes:
                if not self._changed.wait(deadline_s - time.monotonic()):
                    why = f": {self._obstacle}" if self._obstacle else ""
                    raise DeadlinePassed(f"{id} of rank {self._rank} was not spilled within {timeout_s:g} s{why}")
            if (error := self._outcomes[id]) is not None:
                raise error

    def _pins(self) -> frozenset[SnapshotId]:
        if not self._pinned:
            return _NO_PINS
        now_s = time.monotonic()
        self._pinned = {id: until_s for id, until_s in self._pinned.items() if until_s > now_s}
        return frozenset() if self.ending else frozenset(self._pinned)

    def _spilled(self, spilled: wire.Spilled) -> None:
        id = id_of(spilled.id)
        with self._changed:
            if spilled.tier == 0:
                self._obstacle = str(told(spilled.error)) if spilled.error else ""
            if spilled.trying:
                self._pinned.pop(id, None)
                return
            _, outstanding = self._spills.get(id, (None, set()))
            outstanding.discard(spilled.tier)
            if not outstanding:
                self._spills.pop(id, None)
            if not spilled.error or not outstanding:  # the slower tiers copy from the one that has it
                self._pinned.pop(id, None)
            if spilled.tier == 0:
                kept = sorted(self._outcomes)[-_OUTCOMES:]
                self._outcomes = {old: self._outcomes[old] for old in kept}
                self._outcomes[id] = told(spilled.error) if spilled.error else None
            self._changed.notify_all()

    def report(self, report: wire.Report) -> None:
        """Figures for ``holdfast status``."""
        with self._changed:
            self._send(wire.FromTrainer(report=report))

    @property
    def slots(self) -> list[Slot]:
        """The mapped slots."""
        with self._changed:
            return list(self._slots)

    # -- questions ---------------------------------------------------------------------------------------------------

    def held(self) -> dict[SnapshotId, bool]:
        """What is in this rank's slots, or on its way there; and whether this node has done all it can to keep it."""
        with self._lock:
            return {s.id: s.stage is Stage.SEALED and self._is_guarded(s.id) for s in self._states if s.id is not None}

    def _is_guarded(self, id: SnapshotId) -> bool:
        return self.alone or id in self._guarded

    def wait_sealed(self, id: SnapshotId, timeout_s: float, *, guarded: bool = False) -> None:
        """Return once *id* is sealed here; with *guarded*, once this node also holds all its parity.

        Raises:
            SnapshotSkipped: it was given up, or its slot holds something newer already.
            DeadlinePassed: neither happened in time.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                index = find(self._states, id)
                if index is None:
                    raise SnapshotSkipped(f"{id} is not held: it was given up, or a newer snapshot has taken its slot")
                if self._states[index].stage is Stage.SEALED and (self._is_guarded(id) or not guarded):
                    return
                if not self._changed.wait(deadline_s - time.monotonic()):
                    whom = (
                        "the agent is away" if self._attachment is None else f"stage {self._states[index].stage.name}"
                    )
                    raise DeadlinePassed(f"{id} of rank {self._rank} was not sealed within {timeout_s:g} s ({whom})")

    def protect(self, roster: wire.Roster, timeout_s: float) -> None:
        """Tell the agent who is there; it reserves memory for parity.

        Raises:
            BudgetExceeded, ConfigError: why the agent cannot protect.
            DeadlinePassed: it did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._roster, self._rostered = wire.FromTrainer(roster=roster), None
            self._floor_stands = False
            self._guarded.clear()
            self._complete = id_of(roster.floor) if roster.HasField("floor") else None
            self._send(self._roster)
            while (answer := self._answered()) is None:
                if not self._changed.wait(deadline_s - time.monotonic()):
                    raise DeadlinePassed(f"the agent did not say within {timeout_s:g} s whether it can protect")
            if answer.error:
                raise told(answer.error)
            self.alone = answer.alone

    def floor_stands(self) -> None:
        """The roster's floor is protected everywhere. The agent hears of it with the first image that may replace the floor."""
        self._floor_stands = True

    def _answered(self) -> wire.Rostered | None:
        return self._rostered

    def refresh(self) -> None:
        """Look at the slots again: the agent has put images there, for a restore."""
        with self._changed:
            for index, slot in enumerate(self._slots):
                place = None if slot.in_place else measure(Path(slot.place.path), self._rank, index, parity=False)
                if place is not None:  # a larger one has taken its place
                    fresh = Slot.open(place)
                    fresh.prefault()
                    self._adopt(index, fresh)
                elif self._flights.get(index) is None and self._states[index].stage is not Stage.GROWING:
                    record = slot.sealed_record()
                    self._states[index] = SlotState(Stage.SEALED, record.id) if record else SlotState()

    def materialise(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.MaterialiseReply:
        """Have the agent bring an image here, from wherever it can be had. Raises ``SnapshotLost``."""
        with AgentClient.at(self._settings) as client:
            return client.materialise(request, timeout_s)

    def describe_image(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.Description:
        """What the layout of an image is, from whoever can say. Raises ``SnapshotLost``."""
        with AgentClient.at(self._settings) as client:
            return client.describe_image(request, timeout_s)

    def read_ranges(self, request: wire.ReadRequest, timeout_s: float) -> wire.ReadReply:
        """Have the agent lay ranges of an image out in a window of this rank; without ranges, take its windows back.

        Raises ``SnapshotLost``, ``BudgetExceeded``, ``ConfigError``.
        """
        with AgentClient.at(self._settings) as client:
            return client.read_ranges(request, timeout_s)

    def inventory(self, timeout_s: float) -> wire.ImageList:
        """Every sealed image that this node's agent holds."""
        with AgentClient.at(self._settings) as client:
            return client.inventory(timeout_s)

    def elsewhere(self, addresses: Sequence[str], timeout_s: float) -> wire.ImageLists:
        """What the agents at these addresses hold, as far as they answer."""
        with AgentClient.at(self._settings) as client:
            return client.elsewhere(addresses, timeout_s)

    def stored(self, timeout_s: float) -> wire.TierList:
        """What this node's agent finds in the tiers."""
        if not self._hello.tiers:
            return wire.TierList()
        with AgentClient.at(self._settings) as client:
            return client.stored(timeout_s)

    def close(self, *, ended: bool) -> None:
        """Let go. *ended*: the job is done; otherwise the agent keeps the snapshots for whoever comes back."""
        with self._changed:
            self._closed = True
            attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.close(goodbye=ended)
        for slot in self._slots:
            self._unmapping(slot)
            slot.close()

    # -- sealing and growing -----------------------------------------------------------------------------------------

    def _happened(self, index: int, event: Event) -> None:
        self._states[index] = self._states[index].after(event)
        if self._states[index].stage is Stage.SEALED:
            self._flights.pop(index, None)
            self._changed.notify_all()

    def _grow(self, index: int, image_bytes: int, table_bytes: int) -> None:
        """Have the agent replace the slot. Ours is unmapped first, so that its memory is free for the new one."""
        if image_bytes >= self._refused_bytes:
            return
        slot = self._slots[index]
        slot.unseal()
        self._states[index] = self._states[index].after(Event.OUTGROWN)
        self._unmapping(slot)
        slot.close()
        roomy = image_bytes + image_bytes // 20 + _ROOM_BYTES  # values that grow do so again
        larger = (max(roomy, slot.place.image_bytes), max(table_bytes, slot.place.table_bytes))
        self._hello.image_bytes, self._hello.table_bytes = larger
        _log.info("slot %d of rank %d grows to %d bytes", index, self._rank, larger[0])
        self._send(wire.FromTrainer(grow=wire.Grow(slot=index, image_bytes=larger[0], table_bytes=larger[1])))

    def _grown(self, place: Place) -> None:
        """The agent has replaced the slot, or could not and left it as it was: map it again."""
        slot = Slot.open(place)
        slot.prefault()
        with self._changed:
            self._slots[place.index] = slot
            self._states[place.index] = self._states[place.index].after(Event.DISCARDED)
            self._changed.notify_all()

    # -- the connection ----------------------------------------------------------------------------------------------

    def _send(self, message: wire.FromTrainer) -> None:
        if self._attachment is not None:
            self._attachment.send(message)

    def _attach(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        ensure_agent(self._settings, timeout_s)
        attachment = Attachment(
            self._settings,
            self._hello,
            hear=self._hear,
            lost=self._lost,
            timeout_s=max(deadline_s - time.monotonic(), 1.0),
        )
        try:
            # Mapping takes its time, and the training thread must not wait for it: the lock comes after.
            fresh = [self._map(place_of(slot, self._rank)) for slot in attachment.welcome.slots]
            self._take_on(attachment, fresh)
        except BaseException:
            attachment.close(goodbye=False)
            raise

    def _map(self, place: Place) -> Slot | None:
        """The slot that the agent offers, mapped; None if it is the one that is mapped already."""
        if place.index < len(self._slots):
            old = self._slots[place.index]
            if old.in_place and place == old.place and old.image.nbytes:
                return None
        slot = Slot.open(place)
        slot.prefault()
        return slot

    def _take_on(self, attachment: Attachment, fresh: list[Slot | None]) -> None:
        with self._changed:
            if self._closed:
                raise AgentUnreachable("this trainer has detached meanwhile")
            if attachment.ended:
                raise AgentUnreachable("the agent went away while its slots were being mapped")
            for index, slot in enumerate(fresh):
                if slot is not None:
                    self._adopt(index, slot)
            self.welcome = attachment.welcome
            self._attachment = attachment
            self._refused_bytes = _NEVER
            if self._layout is not None:
                self._send(self._layout)
            if self._roster is not None:
                self._send(self._roster)
            for spill, _ in self._spills.values():
                self._send(spill)
            for index in range(len(self._states)):
                flight = self._flights.get(index)
                if (
                    flight and flight.copied
                ):  # even if it is recorded: the new agent does not look at what is not sealed yet
                    self._send(flight.copied)
            self._changed.notify_all()

    def _adopt(self, index: int, slot: Slot) -> None:
        """Take the slot in place of what was there. A flight in it is gone; the next beat tells the other ranks."""
        if index < len(self._slots):
            self._unmapping(self._slots[index])
            self._slots[index].close()
        record = slot.sealed_record()
        self._slots[index : index + 1] = [slot]
        self._states[index : index + 1] = [SlotState(Stage.SEALED, record.id) if record else SlotState()]
        self._flights.pop(index, None)

    def _hear(self, message: wire.FromAgent) -> None:
        kind = message.WhichOneof("kind")
        if kind == "prepared":
            self._prepared(message.prepared)
        elif kind == "grown":
            self._grown(place_of(message.grown.slot, self._rank))
        elif kind == "failed":
            self._failed(message.failed)
        elif kind == "rostered":
            self._has_answered(message.rostered)
        elif kind == "guarded":
            self._has_guarded(id_of(message.guarded.id))
        elif kind == "unguarded":
            self._cannot_guard(id_of(message.unguarded.id), message.unguarded.reason)
        elif kind in ("spilled", "due", "stop"):
            if kind == "spilled":
                self._spilled(message.spilled)
            self._heard(message)

    def _has_answered(self, answer: wire.Rostered) -> None:
        if answer.error:
            _log.warning("the agent cannot protect: %s", told(answer.error))
        with self._changed:
            asked = self._roster.roster if self._roster is not None else wire.Roster()
            if (answer.run, answer.floor) == (asked.run, asked.floor.step):
                self._rostered = answer
                self._changed.notify_all()

    def _has_guarded(self, id: SnapshotId) -> None:
        with self._changed:
            reach("guarded.heard")
            self._guarded = {held for held in self._guarded if find(self._states, held) is not None} | {id}
            self._changed.notify_all()

    def _cannot_guard(self, id: SnapshotId, reason: str) -> None:
        """Protection failed for good: give the snapshot up, so that its slot serves a newer one. Others learn by the beat.

        An agent that has not heard of this run yet may mean one of the last run: that is for the restore to judge.
        """
        with self._changed:
            ours = self._roster is not None and self._roster.roster.run == id.run
            newer = ours and (self._complete is None or id > self._complete)
            if newer and id not in self._guarded and find(self._states, id) is not None:
                _log.warning("%s is given up: %s", id, reason)
                self.discard(id, reason)
                self._gave_up("unprotected")

    def _prepared(self, prepared: wire.Prepared) -> None:
        with self._changed:
            flight = self._flights.get(prepared.slot)
            if flight is not None and flight.nonce == prepared.nonce and not flight.recorded:
                flight.recorded = True
                self._happened(prepared.slot, Event.PREPARED)

    def _failed(self, failed: wire.Failed) -> None:
        _log.warning("the agent could not do its part for slot %d: %s", failed.slot, failed.reason)
        if not failed.nonce:
            self._refused_bytes = self._hello.image_bytes
            if failed.HasField("left"):
                self._hello.image_bytes, self._hello.table_bytes = failed.left.image_bytes, failed.left.table_bytes
                self._grown(place_of(failed.left, self._rank))
            return
        with self._changed:
            flight, id = self._flights.get(failed.slot), self._states[failed.slot].id
            if flight is not None and id is not None and flight.nonce == failed.nonce:
                self.discard(id, failed.reason)

    def _lost(self, attachment: Attachment, reason: HoldfastError) -> None:
        with self._changed:
            if self._closed or self._attachment is not attachment:
                return  # one that was never taken on
            self._attachment = None
        _log.warning("%s; snapshots are skipped until it is back", reason)
        threading.Thread(target=self._reattach, name="holdfast-reattach", daemon=True).start()

    def _reattach(self) -> None:
        """Try until it works or the job ends. Training goes on meanwhile."""
        pause_s, last = _RETRY_FROM_S, ""
        while not self._closed:
            try:
                self._attach(timeout_s=30.0)
            except Exception as error:  # noqa: BLE001 - a thread ends here, and with it all hope of another agent
                if str(error) != last:
                    _log.warning("the agent is still away: %s", error)
                last = str(error)
            else:
                _log.warning("attached to the agent again")
                return
            # Jitter: the ranks of a node lose their agent at the same instant.
            with self._changed:
                self._changed.wait(pause_s * random.uniform(0.5, 1.5))  # noqa: S311
            pause_s = min(2 * pause_s, _RETRY_UP_TO_S)
