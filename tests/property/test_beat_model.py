"""Ranks, beats, slots and agents under one random schedule: whatever dies at whatever instant, a complete snapshot is left.

Real here: ``hooks.pulse`` and ``snapshot.beat``, ``hooks.binder``, ``snapshot.slots``, ``agent.protocol``,
``snapshot.recovery``. Modelled: shared memory (``Cell``), the agent's driver (``Agent``), ``hooks.holding`` (``Holding``),
the copying thread (``Copier``), what ``hooks.checkpointer`` does with them all (``Rank``), and the network (``Network``),
which tells each rank of a beat when the schedule says so, in order.

A schedule is a list of events ``(name, rank)``; an event that cannot happen where it stands does nothing, so any part of
a schedule is one too, and a failing one is cut down before it is shown. After every event all of ``World.check`` holds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import NamedTuple, cast

import pytest
import torch
from holdfast.agent import protocol
from holdfast.erasure.kernel import crc32c
from holdfast.errors import HoldfastError, StateRefused
from holdfast.hooks.binder import Binder
from holdfast.hooks.pulse import Pulse, Standing
from holdfast.hooks.ranks import Pending, Ranks
from holdfast.snapshot.beat import NONE, VECTOR_LENGTH, Agreed
from holdfast.snapshot.layout import Slice
from holdfast.snapshot.record import FREE_WORD, OPEN_WORD, SnapshotId
from holdfast.snapshot.recovery import Held, plan
from holdfast.snapshot.slots import Event, SlotState, Stage, find, overwritable
from holdfast.snapshot.state import Item, Survey, TrainingState

Schedule = list[tuple[str, int]]

# -- shared memory and the agent -----------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A slot's record, as far as it matters here."""

    id: SnapshotId
    watermark: int
    nonce: int


class Truth(NamedTuple):
    """Whose bytes an image has: nobody can read that in shared memory, and no sealed image may differ from it."""

    id: SnapshotId
    real_step: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One slot in shared memory. ``content`` is None while the image is partial, torn or mixed; ``filling`` is the nonce
    under which it was last filled, which is not in memory either."""

    word: int = FREE_WORD
    page: Page | None = None
    content: Truth | None = None
    filling: int = 0

    @property
    def sealed(self) -> Page | None:
        return self.page if self.page is not None and self.page.nonce == self.word else None


@dataclass(frozen=True, slots=True)
class Grow:
    """Trainer to agent: replace this slot by a larger one."""

    slot: int


@dataclass(frozen=True, slots=True)
class Grown:
    """Agent to trainer: done."""

    slot: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Agent to trainer: that image cannot be sealed; or (nonce 0) the slot cannot grow, and is as it was."""

    slot: int
    nonce: int


ToAgent = protocol.Event | Grow
ToTrainer = protocol.TellPrepared | Grown | Failed


@dataclass(slots=True)
class Agent:
    """One rank's agent: the real protocol; its actions done on cells. ``work`` is being checksummed."""

    cells: list[Cell]
    session: protocol.Session = field(default_factory=protocol.Session)
    work: list[protocol.Checksum] = field(default_factory=list)
    told: deque[ToTrainer] = field(default_factory=deque)
    over_budget: bool = False

    def hear(self, event: ToAgent) -> None:
        if isinstance(event, Grow):
            self.cells[event.slot] = Cell()
            self.told.append(Failed(event.slot, 0) if self.over_budget else Grown(event.slot))
            return
        self.session, actions = protocol.advance(self.session, event)
        for action in actions:
            match action:
                case protocol.Checksum():
                    self.work.append(action)
                case protocol.TellPrepared():
                    self.told.append(action)
                case protocol.WriteRecord(slot, flight):
                    self.cells[slot] = replace(self.cells[slot], page=Page(flight.id, flight.watermark, flight.nonce))

    def checksum(self, which: int = 0) -> None:
        """One image is through."""
        if self.work:
            done = self.work.pop(which)
            self.hear(protocol.Checksummed(done.slot, done.nonce))

    def fail(self) -> None:
        """One image cannot be sealed, as ``service._checksum`` treats it."""
        if self.work:
            done = self.work.pop(0)
            self.hear(protocol.Discarded(done.slot, done.nonce))
            self.told.append(Failed(done.slot, done.nonce))

    def end(self, heard: Iterable[ToAgent]) -> list[Cell]:
        """The cells after the trainer's death, if the agent still hears *heard*. This agent itself is left alone."""
        last = Agent(list(self.cells), self.session, list(self.work))
        for event in heard:
            last.hear(event)
        while last.work:
            last.checksum()
        return last.cells


# -- the trainer ---------------------------------------------------------------------------------------------------------


class Network:
    """Collectives: the i-th of each rank are one, over when all have begun it; a rank learns of that in its own time."""

    def __init__(self, world: int) -> None:
        self.begun: list[list[list[int]]] = [[] for _ in range(world)]
        self.delivered = [0] * world

    @property
    def over(self) -> int:
        return min(map(len, self.begun))

    def deliver(self, rank: int) -> None:
        self.delivered[rank] = min(self.delivered[rank] + 1, self.over)

    def answer(self, number: int) -> list[list[int]]:
        vectors = [begun[number] for begun in self.begun]
        assert len({len(vector) for vector in vectors}) == 1, "ranks meet in different collectives"
        return [[min(column) for column in zip(*vectors, strict=True)]] if is_beat(vectors[0]) else vectors


def is_beat(vector: Sequence[int]) -> bool:
    return len(vector) == VECTOR_LENGTH


class Line(Ranks):
    """One rank's end of the network. ``settled`` counts the beats whose answers it has been given."""

    def __init__(self, network: Network, rank: int) -> None:
        self.rank, self.world = rank, len(network.begun)
        self.network = network
        self.settled = 0

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        raise NotImplementedError

    def reduce_min(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        assert is_beat(vector)
        return self._begin(list(vector))

    def exchange(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        assert not is_beat(vector)
        return self._begin(list(vector))

    def _begin(self, vector: list[int]) -> Pending[list[list[int]]]:
        begun = self.network.begun[self.rank]
        begun.append(vector)
        return Late(self, len(begun) - 1)

    @property
    def waits(self) -> bool:
        """Whether what this rank began last is not over yet."""
        return len(self.network.begun[self.rank]) > self.network.over


class Late(Pending[list[list[int]]]):
    """An answer that is there once it was delivered. A patient wait lets it be delivered, if all have begun."""

    def __init__(self, line: Line, number: int) -> None:
        super().__init__(None, list)
        self._line, self._number = line, number

    def result(self, timeout_s: float) -> list[list[int]] | None:
        network, rank = self._line.network, self._line.rank
        if timeout_s > 0 and network.over > self._number:
            network.delivered[rank] = max(network.delivered[rank], self._number + 1)
        if network.delivered[rank] <= self._number:
            return None
        self._line.settled += is_beat(network.begun[rank][self._number])
        return network.answer(self._number)


@dataclass(slots=True)
class Copy:
    """A copy into a slot, and its window. ``touched``: what is copied was changed since it began.

    ``true``: it was begun from the tensors that are the state, which ``still_true`` asks once it has landed.
    """

    truth: Truth
    slot: int
    nonce: int
    true: bool
    still_true: Callable[[], bool]
    touched: bool = False
    landed: bool = False
    restructured: bool = False


@dataclass(slots=True)
class Flight:
    """As ``hooks.holding._Flight``."""

    nonce: int
    watermark: int
    copied: protocol.Copied | None = None
    recorded: bool = False


class Holding:
    """As ``hooks.holding.Holding``, method by method, without threads."""

    nonces = count(OPEN_WORD + 1)

    def __init__(self, agent: Agent) -> None:
        self.agent: Agent | None = agent
        self.cells = agent.cells
        self.sent: deque[ToAgent] = deque()
        self.attached = True
        self.fits = [True] * len(agent.cells)
        self.refused = False
        self.flights: dict[int, Flight] = {}
        self.states: list[SlotState] = [SlotState()] * len(agent.cells)
        for index in range(len(self.cells)):
            self._adopt(index)

    def objection(self) -> str | None:
        if not self.attached:
            return "agent-away"
        sealed = [id for id, is_sealed in self.held().items() if is_sealed]
        return None if overwritable(self.states, max(sealed, default=None)) is not None else "slots-busy"

    def open(self, id: SnapshotId, keep: SnapshotId | None) -> int | None:
        index = overwritable(self.states, keep)
        if index is None or not self.attached:
            return None
        if not self.fits[index]:
            if not self.refused:
                self.store(index, FREE_WORD)
                self.states[index] = self.states[index].after(Event.OUTGROWN)
                self.sent.append(Grow(index))
            return None
        watermark = keep.step if keep is not None and keep.run == id.run else NONE
        flight = self.flights[index] = Flight(next(self.nonces), watermark)
        self.cells[index] = replace(self.cells[index], word=OPEN_WORD, content=None, filling=flight.nonce)
        self.states[index] = self.states[index].after(Event.OPEN, id)
        return index

    def copied(self, id: SnapshotId) -> None:
        if (index := find(self.states, id)) is not None:
            flight = self.flights[index]
            flight.copied = protocol.Copied(index, flight.nonce, id, flight.watermark, layout=1, image_bytes=1)
            self._send(flight.copied)

    def fenced(self, id: SnapshotId) -> None:
        if (index := find(self.states, id)) is not None:
            self.store(index, self.flights[index].nonce)
            self._happened(index, Event.FENCED)

    def discard(self, id: SnapshotId) -> None:
        if (index := find(self.states, id)) is not None:
            self.store(index, FREE_WORD)
            self.states[index] = self.states[index].after(Event.DISCARDED)
            flight = self.flights.pop(index, None)
            if flight is not None and flight.copied is not None:
                self._send(protocol.Discarded(index, flight.nonce))

    def held(self) -> dict[SnapshotId, bool]:
        return {state.id: state.stage is Stage.SEALED for state in self.states if state.id is not None}

    def hear(self, message: ToTrainer) -> None:
        state, flight = self.states[message.slot], self.flights.get(message.slot)
        match message:
            case Grown(slot):
                self.states[slot], self.fits[slot] = state.after(Event.DISCARDED), True
            case Failed(slot, 0):
                self.states[slot], self.refused = state.after(Event.DISCARDED), True
            case Failed(_, nonce) if flight is not None and flight.nonce == nonce and state.id is not None:
                self.discard(state.id)
            case protocol.TellPrepared(slot, nonce):
                if flight is not None and flight.nonce == nonce and not flight.recorded:
                    flight.recorded = True
                    self._happened(slot, Event.PREPARED)

    def lose(self) -> None:
        """The stream breaks, and what was under way in it is lost."""
        self.attached = False
        self.sent.clear()

    def reattach(self, agent: Agent) -> None:
        """*agent* offers its cells: the ones mapped already, or others, if it had to make them anew."""
        anew = agent.cells is not self.cells
        self.agent, self.cells, self.attached, self.refused = agent, agent.cells, True, False
        for index, state in enumerate(self.states):
            flight = self.flights.get(index)
            if anew or state.stage is Stage.GROWING:
                self._adopt(index)
            elif flight and flight.copied and state.stage is not Stage.RECORDED:
                self._send(flight.copied)

    def store(self, index: int, word: int) -> None:
        self.cells[index] = replace(self.cells[index], word=word)

    def _adopt(self, index: int) -> None:
        sealed = self.cells[index].sealed
        if sealed is None:
            self.store(index, FREE_WORD)
        self.states[index] = SlotState(Stage.SEALED, sealed.id) if sealed else SlotState()
        self.flights.pop(index, None)
        self.fits[index] = True

    def _happened(self, index: int, event: Event) -> None:
        self.states[index] = self.states[index].after(event)
        if self.states[index].stage is Stage.SEALED:
            self.flights.pop(index, None)

    def _send(self, event: protocol.Event) -> None:
        if self.attached:
            self.sent.append(event)


class Copier:
    """As ``capture.CpuCopier``: one copy after the other; each lands, and then says so."""

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.copies: deque[Copy] = deque()

    @property
    def busy(self) -> bool:
        return any(not copy.landed for copy in self.copies)

    def land(self) -> None:
        if self.copies and not self.copies[0].landed:
            copy = self.copies[0]
            copy.landed, copy.restructured = True, not copy.still_true()
            cell = self.holding.cells[copy.slot]
            exact = copy.true and not copy.touched and cell.filling == copy.nonce
            self.holding.cells[copy.slot] = replace(cell, content=copy.truth if exact else None)

    def tell(self) -> None:
        if self.copies and self.copies[0].landed:
            self.holding.copied(self.copies.popleft().truth.id)

    def finish(self) -> None:
        while self.busy:
            self.tell()
            self.land()


class State:
    """As ``snapshot.state.TrainingState``, of one tensor that all ranks should hold alike.

    ``version`` changes with the structure, ``grown`` if there is more of it; ``drift`` is what this rank's bytes differ by
    from what they should be.
    """

    shuffles = False

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members if len(members) > 1 else ()
        self.tensor = torch.zeros(8, dtype=torch.uint8)
        self.version = self.grown = 0
        self.drift = 0
        self.refuses = False

    def size(self) -> int:
        return self.grown

    def survey(self) -> Survey:
        if self.refuses:
            raise StateRefused("whatever it is")
        box = Slice(f"v{self.version}", "uint8", (8,), (0,), (8,), "cpu", self.members)
        return Survey(
            (Item(box, self.tensor, self.tensor, lazy=True),), (), (), {}, {}, plain=False, loose=False, size=self.grown
        )

    def unchanged(self, survey: Survey) -> bool:
        return survey.items[0].slice.name == f"v{self.version}"

    def advance(self, step: int) -> None:
        self.tensor.fill_((step + self.drift) % 251)


class Rank:
    """As ``hooks.checkpointer.Checkpointer``, with its real pulse and binder.

    ``step`` is the one running; ``name_shift`` what the user misnames it by.
    """

    def __init__(self, network: Network, number: int, agent: Agent, run: tuple[int, str], restored: SnapshotId | None):
        self.number = number
        self.line = Line(network, number)
        self.holding = Holding(agent)
        if restored is not None:
            for newer in [id for id in self.holding.held() if id > restored]:
                self.holding.discard(newer)
        self.copier = Copier(self.holding)
        self.state = State(tuple(range(self.line.world)))
        self.binder = Binder(cast(TrainingState, self.state), self.line)
        self.generation, self.run = run
        self.restored = restored
        self.floor = restored or max(self.holding.held(), default=None)
        self.step = restored.step + 1 if restored else 1
        self.state.advance(self.step)
        self.name_shift = 0
        self.copy: Copy | None = None  # whose window is open
        self.fenced = False
        self.asked_at = 0  # the step in which the last beat was begun
        self.able = self.well = True
        self.fails_at = ""  # the stage of the next snapshot's beginning that raises
        self.digest: tuple[int, int] | None = None
        self.taken: list[int] = []
        self.layouts = 0  # begun since the first
        self.pulse = Pulse(
            self.line,
            len(agent.cells),
            Agreed(watermark=restored.step if restored else NONE),
            dropped=lambda step: self.holding.discard(self.id(step)),
            relayout=self.relayout,
        )

    def fence(self, *, stuck: bool = False) -> None:
        self.close_window(stuck=stuck)
        self.fenced = True
        if self.binder.started:
            self._guard(self._start)
        for copy in self.copier.copies:  # the optimizer changes what is being copied
            copy.touched = copy.touched or not copy.landed
        self.state.advance(self.step)

    def end(self, *, patient: bool, wanted: bool) -> None:
        self.close_window()
        name, timeout_s = self.step + self.name_shift, 1.0 if patient else 0.0
        self.state.advance(self.step)  # if it was not fenced
        if not self.binder.started:
            self._guard(lambda: self.binder.first(timeout_s))
        self._guard(lambda: self._harvest(name, timeout_s, wanted=wanted))
        self.step, self.fenced = self.step + 1, False

    def _start(self) -> None:
        beats = self._beats()
        try:
            self.pulse.start(self.standing)
        finally:
            if self._beats() > beats:
                self.asked_at = self.step

    def _beats(self) -> int:
        return sum(map(is_beat, self.line.network.begun[self.number]))

    def _harvest(self, name: int, timeout_s: float, *, wanted: bool) -> None:
        if self.pulse.harvest(name, wanted, self.standing, timeout_s).take:
            self.take(self.id(name))

    def _guard(self, work: Callable[[], None]) -> None:
        with suppress(RuntimeError, HoldfastError):
            work()

    def close_window(self, *, stuck: bool = False) -> None:
        copy, self.copy = self.copy, None
        if copy is None:
            return
        if stuck and self.copier.busy:  # the fence's deadline passes
            self.holding.discard(copy.truth.id)
            return
        self.copier.finish()
        if copy.restructured:
            self.holding.discard(copy.truth.id)
            self.binder.note_changed()
            return
        if copy.touched:
            self.holding.discard(copy.truth.id)
            return
        self.holding.fenced(copy.truth.id)

    def take(self, id: SnapshotId) -> None:
        fails_at, self.fails_at = self.fails_at, ""
        binding = self.binder.current()
        slot = self.holding.open(id, self.keep()) if binding and fails_at != "open" else None
        if binding is None or slot is None or fails_at == "start":
            self.holding.discard(id)
            return
        nonce, true = self.holding.flights[slot].nonce, self.state.unchanged(binding.survey)
        self.copy = Copy(Truth(id, self.step), slot, nonce, true, lambda: self.binder.still_true(binding))
        self.copier.copies.append(self.copy)
        samples = binding.shared.take(id.step)
        self.digest = None if samples is None else (id.step, crc32c(samples))
        self.taken.append(id.step)

    def standing(self) -> Standing:
        if not self.well:
            raise RuntimeError("whatever it is")
        finished = self.binder.finish(0.0)
        objects = self.copier.busy or not finished or self.holding.objection() is not None
        held = {id.step: sealed for id, sealed in self.holding.held().items() if id.run == self.run}
        return Standing(held, self.able and not objects, self.binder.stale, 0, self.digest)

    def relayout(self, ordinal: int) -> None:
        self.digest = None
        self.layouts += 1
        self.binder.begin(ordinal)

    def id(self, step: int) -> SnapshotId:
        return SnapshotId(self.generation, step, self.run)

    def keep(self) -> SnapshotId | None:
        started_from = self.restored.step if self.restored else NONE
        return self.floor if self.pulse.agreed.watermark == started_from else self.id(self.pulse.agreed.watermark)


# -- the world -----------------------------------------------------------------------------------------------------------


class World:
    """All ranks of a job, over as many runs as the schedule makes of it.

    Attributes:
        best: the newest snapshot that a restore would have found after the last event.
        agreed: what was agreed after so many beats, by the first rank that settled them.
        restores: how often the job was killed and started again.
        unknown_may_go: whether what is complete, but not yet known to be, may be given up for something older.
        layout_due: whether anything has happened in this run that makes a new layout necessary.
        memory_gone: whether memory was lost that no process of ours gave away: nothing need be restorable then.
    """

    def __init__(self, ranks: int, slots: int, *, skew: int = 0, every: int = 1, alike: bool = False) -> None:
        """*skew*: by how many steps a rank may be ahead. *alike*: the ranks hold the same bytes, and share the copying."""
        self.skew, self.every, self.alike = skew, every, alike
        self.best: SnapshotId | None = None
        self.restores = 0
        self.run_number = 0
        self.misnamed = self.unknown_may_go = self.memory_gone = False
        self.wiped: set[int] = set()
        self._begin([[Cell()] * slots for _ in range(ranks)])

    def _begin(self, cells: list[list[Cell]]) -> None:
        """A run begins, as ``Checkpointer.restore`` does it."""
        found = inventory(cells)
        chosen = plan(found).chosen
        assert self.memory_gone or self.best is None or (chosen is not None and chosen >= self.best)
        self.run_number += 1
        run = (1 + max((held.id.generation for held in found), default=0), f"{self.run_number:032x}")
        self.network = Network(len(cells))
        self.agreed: dict[int, Agreed] = {}
        self.ranks = [Rank(self.network, number, Agent(own), run, chosen) for number, own in enumerate(cells)]
        self.layout_due = False
        for rank in self.ranks:
            rank.state.members = rank.state.members if self.alike else ()
            rank.binder.begin(0)
        for rank in self.ranks:
            rank.binder.first(1.0)

    def happen(self, event: str, number: int) -> None:
        """Let one event happen, if it can, and check everything."""
        rank = self.ranks[number % len(self.ranks)]
        getattr(self, f"on_{event}")(rank)
        self.check()

    def play(self, schedule: Schedule) -> None:
        for event, number in schedule:
            self.happen(event, number)

    # -- events of the training loop --

    def on_fence(self, rank: Rank) -> None:
        if not rank.fenced:
            rank.fence()

    def on_fence_again(self, rank: Rank) -> None:
        rank.fence()

    def on_end(self, rank: Rank) -> None:
        """The step ends as it should: fenced, and having waited for the beat that was begun in it."""
        self.on_fence(rank)
        if not (rank.asked_at == rank.step and rank.line.waits):
            self._end(rank, patient=True)

    def on_end_late(self, rank: Rank) -> None:
        self._end(rank, patient=False)

    def on_end_unfenced(self, rank: Rank) -> None:
        if not rank.fenced:
            self._end(rank, patient=True)

    def _end(self, rank: Rank, *, patient: bool) -> None:
        if rank.step <= min(r.step for r in self.ranks) + self.skew:
            rank.end(patient=patient, wanted=rank.step % self.every == 0)

    def on_deliver(self, rank: Rank) -> None:
        self.network.deliver(rank.number)

    def on_land(self, rank: Rank) -> None:
        rank.copier.land()

    def on_tell(self, rank: Rank) -> None:
        rank.copier.tell()

    def on_agent(self, rank: Rank) -> None:
        if rank.holding.sent and rank.holding.agent is not None:
            rank.holding.agent.hear(rank.holding.sent.popleft())

    def on_checksum(self, rank: Rank) -> None:
        if rank.holding.agent is not None:
            rank.holding.agent.checksum()

    def on_checksum_last(self, rank: Rank) -> None:
        """Checksums are computed side by side, so the last may be through first."""
        if rank.holding.agent is not None:
            rank.holding.agent.checksum(-1)

    def on_trainer(self, rank: Rank) -> None:
        if rank.holding.attached and rank.holding.agent is not None and rank.holding.agent.told:
            rank.holding.hear(rank.holding.agent.told.popleft())

    def on_announce(self, rank: Rank) -> None:
        """All copies land, and the agent hears all there is to hear."""
        while rank.copier.copies:
            rank.copier.land()
            rank.copier.tell()
        while rank.holding.sent and rank.holding.agent is not None:
            self.on_agent(rank)

    def on_seal(self, rank: Rank) -> None:
        """Copy, agent and trainer do all that there is to do."""
        holding = rank.holding
        self.on_announce(rank)
        while holding.agent is not None and (holding.sent or holding.agent.work or self._hears(holding)):
            self.on_agent(rank)
            self.on_checksum(rank)
            self.on_trainer(rank)

    @staticmethod
    def _hears(holding: Holding) -> bool:
        return holding.attached and holding.agent is not None and bool(holding.agent.told)

    def on_round(self, _: Rank) -> None:
        """One whole step on all ranks, with everything in time; ranks that lag are waited for."""
        for rank in self.ranks:
            self.on_fence(rank)
        for rank in self.ranks:
            self.on_end(rank)
            self.on_seal(rank)

    # -- faults --

    def on_touch(self, rank: Rank) -> None:
        if rank.copy is not None:
            rank.copy.touched = True

    def on_fence_stuck(self, rank: Rank) -> None:
        rank.fence(stuck=True)

    def on_open_fails(self, rank: Rank) -> None:
        rank.fails_at = "open"

    def on_start_fails(self, rank: Rank) -> None:
        rank.fails_at = "start"

    def on_unable(self, rank: Rank) -> None:
        rank.able = not rank.able

    def on_outgrow(self, rank: Rank) -> None:
        rank.holding.fits = [False] * len(rank.holding.fits)

    def on_grow_fails(self, rank: Rank) -> None:
        if rank.holding.agent is not None:
            rank.holding.agent.over_budget = True

    def on_relayout(self, rank: Rank) -> None:
        rank.state.version += 1
        self.layout_due = True

    def on_outlay(self, rank: Rank) -> None:
        """As above, and more tensors than before."""
        rank.state.grown += 1
        self.on_relayout(rank)

    def on_refuse(self, rank: Rank) -> None:
        rank.state.refuses = not rank.state.refuses
        self.layout_due = True

    def on_drift(self, rank: Rank) -> None:
        """What this rank should hold as the others do is not the same any more."""
        self.unknown_may_go = self.layout_due = True
        rank.state.drift += 1

    def on_kill_agent(self, rank: Rank) -> None:
        rank.holding.agent = None
        rank.holding.lose()

    def on_wipe(self, rank: Rank) -> None:
        """The agent dies, and somebody cleans up its shared memory before it comes back."""
        self.on_kill_agent(rank)
        self.wiped.add(rank.number)
        self.memory_gone = True

    def on_break_stream(self, rank: Rank) -> None:
        """Trainer and agent live; the stream between them does not."""
        rank.holding.lose()

    def on_reattach(self, rank: Rank) -> None:
        """The agent lets the trainer in again once it is done with what it had before."""
        holding = rank.holding
        if not holding.attached and not (holding.agent and holding.agent.work):
            cells = [Cell()] * len(holding.cells) if rank.number in self.wiped else holding.cells
            self.wiped.discard(rank.number)
            holding.reattach(Agent(cells))

    def on_crash(self, _: Rank) -> None:
        """Everything is killed and started again."""
        self._begin([rank.holding.cells for rank in self.ranks])
        self.restores += 1

    def on_trainers_die(self, rank: Rank) -> None:
        """All trainers are killed and started again; agents live. *rank*'s agent does not hear what was under way."""
        self._begin([r.holding.agent.end(() if r is rank else r.holding.sent) if r.holding.agent else r.holding.cells
                     for r in self.ranks])  # fmt: skip
        self.restores += 1

    def on_unwell(self, rank: Rank) -> None:
        rank.well = not rank.well

    def on_agent_fails(self, rank: Rank) -> None:
        if rank.holding.agent is not None:
            rank.holding.agent.fail()

    def on_misname(self, rank: Rank) -> None:
        """From here on the user gives this rank's steps wrong names."""
        self.misnamed = self.unknown_may_go = True
        rank.name_shift += 1

    # -- what must hold --

    def check(self) -> None:
        self._check_memory()
        self._check_agreement()
        assert self.layout_due or not any(rank.layouts for rank in self.ranks), "laid out anew without need"
        if self.memory_gone:
            return
        watermarks = (rank.keep() for rank in self.ranks if rank.pulse.agreed.watermark != NONE)
        known = max((id for id in watermarks if id is not None), default=None)
        as_it_is = [rank.holding.cells for rank in self.ranks]
        self._check_restorable(as_it_is, known)
        for heard in (True, False):
            cells = [self._after_trainer(rank, heard=heard) for rank in self.ranks]
            if cells != as_it_is:
                self._check_restorable(cells, known)
        self._note_best(plan(inventory(as_it_is)).chosen)

    def _note_best(self, best: SnapshotId | None) -> None:
        """What was complete once is given up for something newer only."""
        if not self.unknown_may_go:
            assert self.best is None or (best is not None and best >= self.best), f"{self.best} is lost, {best} is left"
        self.best = best

    def _after_trainer(self, rank: Rank, *, heard: bool) -> list[Cell]:
        holding = rank.holding
        return holding.agent.end(holding.sent if heard else ()) if holding.agent is not None else holding.cells

    def _check_memory(self) -> None:
        """What a trainer takes for sealed is; what is sealed is the exact copy of what it says it is."""
        for rank in self.ranks:
            for cell, state in zip(rank.holding.cells, rank.holding.states, strict=True):
                if state.stage is Stage.SEALED:
                    assert cell.sealed is not None, f"rank {rank.number}: {state.id} is not sealed in memory"
                    assert cell.sealed.id == state.id

    def _check_agreement(self) -> None:
        for rank in self.ranks:
            agreed = rank.pulse.agreed
            after = self.agreed.setdefault(rank.line.settled, agreed)
            assert self.misnamed or agreed == after, f"after {rank.line.settled} beats: {after}, {agreed}"

    def _check_restorable(self, cells: list[list[Cell]], known: SnapshotId | None) -> None:
        """A restore after a kill at this instant finds one exact, complete step, none older than is *known* complete."""
        for own in cells:
            for cell in own:
                assert cell.sealed is None or (cell.content is not None and cell.content.id == cell.sealed.id), "torn"
        found = plan(inventory(cells))
        assert found.loss is None, found.explain()
        if known is not None:
            assert found.chosen is not None, f"{known} is known complete, nothing is left"
            assert found.chosen >= known, f"{known} is known complete, {found.chosen} is left"
        if found.chosen is not None:
            contents = [c.content for own in cells for c in own if c.sealed and c.sealed.id == found.chosen]
            real = {content.real_step for content in contents if content}
            assert len(real) == 1, f"{found.chosen} mixes steps {real}"


def inventory(cells: list[list[Cell]]) -> list[Held]:
    """What the agents would report of such memory."""
    return [
        Held(cell.sealed.id, rank, len(cells), cell.sealed.watermark, "agent", f"{rank}/{index}", 1)
        for rank, own in enumerate(cells)
        for index, cell in enumerate(own)
        if cell.sealed is not None
    ]


def calm(world: World, rounds: int) -> list[int]:
    """No more faults from here on: *rounds* steps in which everything is in time. Returns the watermark after each."""
    for rank in world.ranks:
        rank.able = rank.well = True
        rank.state.refuses, rank.fails_at = False, ""
        rank.holding.fits = [True] * len(rank.holding.fits)  # whatever was too large is small again
        world.happen("seal", rank.number)
        world.happen("reattach", rank.number)
        world.happen("seal", rank.number)
    last = max(rank.step for rank in world.ranks)
    while any(rank.step < last for rank in world.ranks):  # those behind catch up; those ahead wait in training itself
        behind = min(world.ranks, key=lambda rank: rank.step)
        world.happen("end_late", behind.number)
    watermarks = []
    for _ in range(rounds):
        for event in ("fence", "deliver", "deliver", "end", "seal"):
            for rank in world.ranks:
                world.happen(event, rank.number)
        for rank in world.ranks:  # whom a beat kept waiting that somebody could not join
            if rank.step == min(r.step for r in world.ranks) != max(r.step for r in world.ranks):
                world.happen("end_late", rank.number)
        watermarks.append(min(rank.pulse.agreed.watermark for rank in world.ranks))
    return watermarks


# -- schedules -----------------------------------------------------------------------------------------------------------

# How often each event is drawn.
TRAINING: dict[str, float] = {
    "fence": 10, "end": 12, "end_late": 0.4, "end_unfenced": 0.4, "fence_again": 0.5, "round": 1.5,
    "deliver": 6, "land": 8, "tell": 8, "agent": 12, "announce": 2, "checksum": 5, "checksum_last": 3, "trainer": 8, "seal": 1,
}  # fmt: skip
FAULTS: dict[str, float] = {
    "touch": 0.4, "fence_stuck": 0.2, "open_fails": 0.2, "start_fails": 0.2, "unable": 0.4, "unwell": 0.2,
    "outgrow": 0.1, "grow_fails": 0.05, "kill_agent": 0.2, "break_stream": 0.2,
    "agent_fails": 0.2, "reattach": 2, "crash": 0.15, "trainers_die": 0.15,
}  # fmt: skip
LAYOUTS: dict[str, float] = {"relayout": 0.6, "outlay": 0.3, "refuse": 0.3}


def schedule(seed: int, length: int, ranks: int, weights: dict[str, float]) -> Schedule:
    """Random events; each seed has its own taste, so that rare meetings of rare events come about in some."""
    rng = random.Random(seed)
    tastes = [weight * rng.choice([0.02, 0.2, 1, 1, 4]) for weight in weights.values()]
    events = rng.choices(list(weights), tastes, k=length)
    return [(event, rng.randrange(ranks)) for event in events]


def cut_down(events: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """A schedule that still fails, and of which no event can be left out."""
    size = len(events) // 2
    while size:
        start = 0
        while start < len(events):
            shorter = events[:start] + events[start + size :]
            if fails(shorter):
                events = shorter
            else:
                start += size
        size //= 2
    return events


def run(make: Callable[[], World], events: Schedule, then: Callable[[World], object] = lambda world: None) -> World:
    """Play *events* in a new world, and *then* what has to hold of it; a failure shows the schedule, cut down."""

    def attempt(part: Schedule) -> World:
        world = make()
        world.play(part)
        then(world)
        return world

    def fails(part: Schedule) -> bool:
        try:
            attempt(part)
        except AssertionError:
            return True
        return False

    try:
        return attempt(events)
    except AssertionError:
        short = cut_down(events, fails)
    try:
        attempt(short)
    except AssertionError as error:
        raise AssertionError(f"{error}\n  after {short}") from error
    raise AssertionError("not deterministic")


SHAPES = [(1, 2, 0), (2, 2, 0), (2, 2, 1), (2, 3, 0), (3, 2, 1), (3, 3, 2), (4, 2, 0)]  # ranks, slots, skew
SHAPE_IDS = [f"{ranks}-ranks-{slots}-slots-{skew}-skew" for ranks, slots, skew in SHAPES]
# Steps without faults within which a snapshot becomes known complete; the worst of 3000 schedules took 10.
LIVELY = 12


def comes_back(world: World) -> None:
    watermarks = calm(world, LIVELY * world.every)
    assert max(watermarks) > watermarks[0], f"no snapshot in {len(watermarks)} good steps: {watermarks}"


@pytest.mark.parametrize(("ranks", "slots", "skew"), SHAPES, ids=SHAPE_IDS)
def test_whatever_dies_when_a_complete_snapshot_is_left(ranks: int, slots: int, skew: int) -> None:
    """At every instant; and snapshots go on as soon as faults stop. Every second seed takes only every second step."""
    restores = 0
    for seed in range(40):
        events = schedule(seed, 200, ranks, TRAINING | FAULTS)
        restores += run(partial(World, ranks, slots, skew=skew, every=1 + seed % 2), events, comes_back).restores
    assert restores > 20  # the schedules are not idle


@pytest.mark.parametrize("slots", [2, 3])
def test_misnamed_steps_are_never_mixed(slots: int) -> None:
    """Ranks that call the same step by different names may get no snapshots, but never one of different steps."""
    for seed in range(20):
        run(partial(World, 2, slots, skew=1), schedule(seed, 200, 2, TRAINING | FAULTS | {"misname": 0.2}))


def test_memory_that_is_wiped_is_filled_again() -> None:
    """Somebody removes an agent's shared memory. Nothing can be promised of what was there, but nothing waits for it."""
    for seed in range(25):
        events = schedule(seed, 120, 2, TRAINING | {"wipe": 0.4, "reattach": 2})
        run(partial(World, 2, 2 + seed % 2), events, comes_back)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_hold_the_same_share_the_copying(ranks: int) -> None:
    """And compare what they share; nothing of that changes what a restore finds."""
    for seed in range(25):
        run(partial(World, ranks, 2, alike=True), schedule(seed, 150, ranks, TRAINING | FAULTS), comes_back)


def test_ranks_that_drift_apart_share_nothing_any_more() -> None:
    for seed in range(25):
        run(partial(World, 3, 2, alike=True), schedule(seed, 120, 3, TRAINING | FAULTS | {"drift": 0.4}), comes_back)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_state_that_changes_its_structure_is_laid_out_anew(ranks: int) -> None:
    """By all ranks, at the same place in the sequence of collectives, however late one of them learns of it."""
    for seed in range(50):
        run(partial(World, ranks, 2, skew=1), schedule(seed, 150, ranks, TRAINING | FAULTS | LAYOUTS), comes_back)


def test_one_rank_that_cannot_describe_its_state_any_more() -> None:
    """It takes part in the exchange with nothing to show, and asks for another one as everybody does: with a beat."""
    both: Schedule = [("fence", 0), ("fence", 1), ("end", 0), ("end", 1), ("seal", 0), ("seal", 1)]
    run(partial(World, 2, 2), [("relayout", 1), *both, *both, ("refuse", 0), *both, *both, *both], comes_back)


def test_one_rank_that_is_late_for_a_snapshot_has_not_drifted() -> None:
    """It has no digest of that step; that of an older one says nothing."""
    taken: Schedule = [("fence", 0), ("fence", 1), ("end", 0), ("end", 1), ("seal", 0), ("seal", 1)]
    late: Schedule = [("fence", 0), ("fence", 1), ("end", 0), ("end_late", 1)]
    run(partial(World, 2, 2, alike=True), [*taken, *taken, *late, *taken, *taken], comes_back)


def test_cutting_down() -> None:
    events = [("noise", i) for i in range(50)]
    events[17], events[42] = ("cause", 1), ("effect", 2)
    assert cut_down(events, lambda part: events[17] in part and events[42] in part) == [("cause", 1), ("effect", 2)]


@pytest.mark.parametrize(
    ("slots", "late", "per_12"), [(2, 0, 12), (2, 1, 6), (2, 2, 4), (3, 1, 12), (3, 2, 8), (3, 3, 6)]
)
def test_snapshots_come_as_often_as_sealing_allows(slots: int, late: int, per_12: int) -> None:
    """With an agent that is *late* by so many steps, of 12 steps so many are taken. Nothing is given up."""
    world = World(2, slots)
    for _ in range(36):
        for event in ("fence", "end", "announce"):
            for rank in world.ranks:
                world.happen(event, rank.number)
        for rank in world.ranks:
            agent = rank.holding.agent
            while agent and agent.work and agent.session.flights[agent.work[0].slot].id.step + late < rank.step:
                world.happen("checksum", rank.number)
                world.happen("trainer", rank.number)
    first, second = (rank.taken for rank in world.ranks)
    assert first == second
    assert len([step for step in first if step > 24]) == per_12
    assert world.ranks[0].pulse.agreed.watermark in first[-4:]


def test_one_rank_sealing_out_of_order_makes_nothing_complete() -> None:
    """Rank 0 has sealed step 2 and not step 1, rank 1 step 1 and not step 2: the lesser of the two is not complete."""
    world = World(2, 2)
    both: Schedule = [("fence", 0), ("fence", 1), ("end", 0), ("end", 1)]
    world.play([*both, *both, ("announce", 0), ("announce", 1)])
    world.play([("checksum_last", 0), ("checksum", 1), ("trainer", 0), ("trainer", 1), *both])
    assert [rank.pulse.agreed for rank in world.ranks] == [Agreed(outstanding=(1, 2))] * 2
    world.play([("checksum", 0), ("checksum", 1), ("trainer", 0), ("trainer", 1), *both])
    assert [rank.pulse.agreed for rank in world.ranks] == [Agreed(2, outstanding=(4,))] * 2
