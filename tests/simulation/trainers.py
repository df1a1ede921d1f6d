"""Trainers: the real ``hooks.pulse`` and ``snapshot.slots``; modelled are ``holding`` and ``checkpointer``, in virtual time.

Steps are kept together by the training's own collectives: no rank reaches the optimizer's step before all have ended the
step before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.agent import protocol
from holdfast.hooks.pulse import Pulse, Standing
from holdfast.hooks.ranks import Pending, Ranks
from holdfast.snapshot.beat import NONE, Agreed
from holdfast.snapshot.record import FREE_WORD, OPEN_WORD, SnapshotId
from holdfast.snapshot.slots import Event, SlotState, Stage, find, overwritable

from .agents import Agent, Roster, Stream
from .memory import PARTIAL, Memory, SlotMemory, content_of

if TYPE_CHECKING:
    from .jobs import Job
    from .world import World


class Beat:
    """One all-reduce: who has begun it with what, and when each rank is told of its end."""

    __slots__ = ("minimum", "missing", "told_at", "vectors")

    def __init__(self, size: int) -> None:
        self.vectors: list[Sequence[int]] = []
        self.minimum: list[int] = []  # once none is missing
        self.missing = size
        self.told_at = [0.0] * size


class Line(Ranks):
    """One rank's end of the trainers' network. ``begun`` and ``settled`` count its beats."""

    def __init__(self, job: Job, rank: int) -> None:
        self.rank, self.world = rank, job.size
        self.job = job
        self.begun = self.settled = 0

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        raise NotImplementedError

    def exchange(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        raise NotImplementedError

    def reduce_min(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        beat = self.job.beat(self.begun)
        self.begun += 1
        beat.vectors.append(vector)
        beat.missing -= 1
        if not beat.missing:
            beat.minimum = [min(values) for values in zip(*beat.vectors, strict=True)]
            self.job.beat_over(beat)
        return Answer(self, beat)


class Answer(Pending[list[list[int]]]):
    """An answer that is there once this rank was told."""

    def __init__(self, line: Line, beat: Beat) -> None:
        super().__init__(None, list)
        self._line, self._beat = line, beat

    def result(self, timeout_s: float) -> list[list[int]] | None:
        beat, line = self._beat, self._line
        if beat.missing or (timeout_s <= 0 and line.job.world.now < beat.told_at[line.rank]):
            return None
        line.settled += 1
        return [list(beat.minimum)]


@dataclass(slots=True)
class Flight:
    """As ``holding._Flight``."""

    nonce: int
    watermark: int
    keep: SnapshotId | None
    copied: protocol.Copied | None = None
    recorded: bool = False


@dataclass(slots=True)
class Copy:
    """A copy into a slot, and its window. *touched*: what is copied was changed since it began."""

    id: SnapshotId
    slot: SlotMemory
    nonce: int
    touched: bool = False
    landed: bool = False


class Rank:
    """One life of one rank's trainer: ``Holding`` and ``Checkpointer`` together."""

    def __init__(self, job: Job, number: int, agent: Agent, slots: int) -> None:
        self.world: World = job.world
        self.job, self.number = job, number
        self.dead = False
        self.agent, self.memory = agent, agent.memory
        self.stream: Stream | None = None
        self.states: list[SlotState] = [SlotState()] * slots
        self.slots: list[SlotMemory] = [SlotMemory()] * slots
        self.flights: dict[int, Flight] = {}
        self.guarded: set[SnapshotId] = set()
        self.complete: SnapshotId | None = None
        self.roster: Roster | None = None
        self.rostered = False
        self.floor_stands = False
        self.alone = True
        self.line = Line(job, number)
        self.pulse = self._pulse(NONE)
        self.restored: SnapshotId | None = None
        self.floor: SnapshotId | None = None
        self.copy: Copy | None = None
        self.step = 1
        self.asked = -1  # the step in which the last beat was begun
        self.waiting = False
        self.able = True
        self.torn_next = False
        self.attach(agent, agent.memory)

    # -- holding -------------------------------------------------------------------------------------------------------

    def attach(self, agent: Agent, mapped: Memory | None = None) -> None:
        """The agent offers its slots: those mapped already, or others, if it had to make them anew."""
        self.stream = agent.attach(self, len(self.states))
        anew = agent.memory is not self.memory or mapped is not None
        self.agent, self.memory = agent, agent.memory
        if anew:
            for index in range(len(self.states)):
                self._adopt(index)
        if self.roster is not None:
            self._send(agent.hear_roster, self.roster)
        for index in range(len(self.states)):
            flight = self.flights.get(index)
            if flight and flight.copied:
                self._send(agent.hear_copied, flight.copied, self.floor_stands)

    def _adopt(self, index: int) -> None:
        slot = self.slots[index] = self.memory.slots[self.number, index]
        page = slot.sealed
        self.states[index] = SlotState(Stage.SEALED, page.id) if page is not None else SlotState()
        self.flights.pop(index, None)

    def lose(self) -> None:
        """The stream to the agent breaks: what was on its way is lost."""
        if self.stream is not None:
            self.stream.broken = True
            self.stream.pending.clear()
            self.stream = None

    def _send(self, hear: Callable[..., None], *what: object) -> None:
        if self.stream is not None:
            self.world.up(self.stream, hear, *what)

    def objection(self) -> str | None:
        """As ``Holding.objection``."""
        if self.stream is None:
            return "agent-away"
        sealed = [state.id for state in self.states if state.stage is Stage.SEALED and state.id is not None]
        return None if overwritable(self.states, max(sealed, default=None)) is not None else "slots-busy"

    def open(self, id: SnapshotId, keep: SnapshotId | None) -> int | None:
        """As ``Holding.open``."""
        index = overwritable(self.states, keep)
        if index is None or self.stream is None:
            return None
        slot = self.slots[index]
        self.world.truth.may_overwrite_slot(self, slot)
        watermark = keep.step if keep is not None and keep.run == id.run else NONE
        flight = self.flights[index] = Flight(self.world.nonce(), watermark, keep)
        slot.word, slot.content, slot.filling = OPEN_WORD, PARTIAL, flight.nonce
        self.memory.touch()
        self.states[index] = self.states[index].after(Event.OPEN, id)
        return index

    def copied(self, id: SnapshotId) -> None:
        if (index := find(self.states, id)) is not None:
            flight = self.flights[index]
            flight.copied = protocol.Copied(index, flight.nonce, id, flight.watermark, 1, 1, flight.keep)
            self._send(self.agent.hear_copied, flight.copied, self.floor_stands)

    def fenced(self, id: SnapshotId) -> None:
        if (index := find(self.states, id)) is not None:
            self.slots[index].word = self.flights[index].nonce
            self.memory.touch()
            self._happened(index, Event.FENCED)

    def discard(self, id: SnapshotId, why: str) -> None:
        if (index := find(self.states, id)) is not None:
            self.world.say("rank %d: gives %s up: %s", self.number, id, why)
            self.slots[index].word = FREE_WORD
            self.memory.touch()
            self.states[index] = self.states[index].after(Event.DISCARDED)
            flight = self.flights.pop(index, None)
            nonce = flight.nonce if flight is not None else 0
            self._send(self.agent.hear_discarded, protocol.Discarded(index, nonce), id)

    def mark_complete(self, id: SnapshotId) -> None:
        self.complete = max(filter(None, (id, self.complete)))
        index = find(self.states, id)
        if index is not None and self.states[index].stage is Stage.SEALED:
            self.slots[index].complete = self.slots[index].word
            self.memory.touch()

    def held(self) -> dict[SnapshotId, bool]:
        return {
            s.id: s.stage is Stage.SEALED and (self.alone or s.id in self.guarded)
            for s in self.states
            if s.id is not None
        }

    def protect(self, roster: Roster) -> None:
        """As ``Holding.protect``; it returns when ``rostered``."""
        self.roster, self.rostered, self.floor_stands = roster, False, False
        self.guarded.clear()
        self.complete = roster.floor
        self._send(self.agent.hear_roster, roster)

    def refresh(self) -> None:
        """As ``Holding.refresh``."""
        for index, slot in enumerate(self.slots):
            if index not in self.flights:
                page = slot.sealed
                self.states[index] = SlotState(Stage.SEALED, page.id) if page is not None else SlotState()

    def _happened(self, index: int, event: Event) -> None:
        self.states[index] = self.states[index].after(event)
        if self.states[index].stage is Stage.SEALED:
            self.flights.pop(index, None)
            self.job.poll()

    # -- what the agent says -------------------------------------------------------------------------------------------

    def hear_prepared(self, slot: int, nonce: int) -> None:
        flight = self.flights.get(slot)
        if flight is not None and flight.nonce == nonce and not flight.recorded:
            flight.recorded = True
            self._happened(slot, Event.PREPARED)

    def hear_failed(self, slot: int, nonce: int) -> None:
        flight, id = self.flights.get(slot), self.states[slot].id
        if flight is not None and id is not None and flight.nonce == nonce:
            self.discard(id, "the agent cannot seal it")

    def hear_rostered(self, roster: Roster, alone: bool) -> None:
        self.rostered, self.alone = True, alone
        self.job.poll()

    def hear_guarded(self, id: SnapshotId) -> None:
        self.guarded = {held for held in self.guarded if find(self.states, held) is not None} | {id}
        self.job.poll()

    def hear_unguarded(self, id: SnapshotId) -> None:
        ours = self.roster is not None and self.roster.run == id.run
        newer = ours and (self.complete is None or id > self.complete)
        if newer and id not in self.guarded and find(self.states, id) is not None:
            self.discard(id, "unprotected")

    # -- the training loop ---------------------------------------------------------------------------------------------

    def begin(self, restored: SnapshotId | None, floor: SnapshotId | None) -> None:
        """As ``Checkpointer._go_on_from``."""
        self.restored, self.floor = restored, floor
        self.step = restored.step + 1 if restored else 1
        self.pulse = self._pulse(restored.step if restored else NONE)

    def _pulse(self, watermark: int) -> Pulse:
        return Pulse(
            self.line, len(self.states), Agreed(watermark),
            dropped=self._drop, relayout=_never, advanced=lambda step: self.mark_complete(self.id(step)),
        )  # fmt: skip

    def fence(self) -> None:
        """The optimizer is about to change what is being copied."""
        if self.dead:
            return
        self._close_window()
        self._start()
        self.world.after(self.world.pace.compute_s * 0.2, self.end)

    def _start(self) -> None:
        begun = self.line.begun
        self.pulse.start(self.standing)
        if self.line.begun > begun:
            self.asked = self.step

    def end(self) -> None:
        """The step ends, as soon as this rank knows of the beat that it began in it, or has waited for long enough."""
        if self.dead:
            return
        self._start()
        beat = self.job.beat(self.line.begun - 1) if self.line.begun else None
        if beat is None or self.asked != self.step or not (beat.missing or self.world.now < beat.told_at[self.number]):
            self._harvest(1.0)
            return
        self.waiting = True
        if not beat.missing:
            self.world.at(beat.told_at[self.number], self.told, self.step)
        self.world.at(self.world.now + self.world.pace.beat_s, self.late, self.step)

    def told(self, step: int) -> None:
        """The beat that this rank waits for is over."""
        if self.waiting and self.step == step and not self.dead:
            self._harvest(1.0)

    def late(self, step: int) -> None:
        """It does not wait any longer."""
        if self.waiting and self.step == step and not self.dead:
            self.world.say("rank %d: the beat of step %d is late", self.number, step)
            self._harvest(0.0)

    def _harvest(self, timeout_s: float) -> None:
        self.waiting = False
        step = self.step
        wanted = step % self.world.taste.every == 0
        verdict = self.pulse.harvest(step, wanted, self.standing, timeout_s)
        self.world.truth.settled(self)
        if verdict.take:
            self.take(self.id(step))
        self.step += 1
        self.job.arrived(self)

    def take(self, id: SnapshotId) -> None:
        index = self.open(id, self.keep())
        if index is None:
            return
        self.world.truth.begun(id)
        self.world.say("rank %d: takes %s into slot %d", self.number, id, index)
        self.copy = Copy(id, self.slots[index], self.flights[index].nonce, self.torn_next)
        self.torn_next = False
        self.world.after(self.world.pace.copy_s, self.land, self.copy)

    def land(self, copy: Copy) -> None:
        """Every byte has been copied."""
        if self.dead or copy.landed:
            return
        copy.landed = True
        if copy.slot.filling == copy.nonce:
            copy.slot.content = content_of(copy.id, self.number, torn=copy.touched)
        self.copied(copy.id)

    def _close_window(self) -> None:
        copy, self.copy = self.copy, None
        if copy is None:
            return
        self.land(copy)
        if copy.touched:
            self.discard(copy.id, "torn")
        else:
            self.fenced(copy.id)

    def standing(self) -> Standing:
        held = {id.step: sealed for id, sealed in self.held().items() if id.run == self.job.run}
        return Standing(held, self.able and self.objection() is None, False, 0)

    def id(self, step: int) -> SnapshotId:
        return SnapshotId(self.job.generation, step, self.job.run)

    def keep(self) -> SnapshotId | None:
        watermark = self.pulse.agreed.watermark
        started_from = self.restored.step if self.restored else NONE
        return self.floor if watermark == started_from else self.id(watermark)

    def _drop(self, step: int) -> None:
        if self.id(step) in self.held():
            self.discard(self.id(step), "another rank gave it up")


def _never(ordinal: int) -> None:
    raise AssertionError("nobody asked for a new layout")
