"""The agent's decisions: each transition, and a random trainer that is lost at any moment."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from holdfast.agent.protocol import (
    Action,
    Checksum,
    Checksummed,
    Copied,
    Discarded,
    Event,
    Flight,
    Session,
    TellPrepared,
    WriteRecord,
    advance,
)
from holdfast.snapshot.record import FREE_WORD, OPEN_WORD, SnapshotId
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

ID = SnapshotId(2, 7, "ab" * 16)
FLIGHT = Flight(100, ID, watermark=6, layout=3)
COPIED = Copied(0, 100, ID, watermark=6, layout=3, image_bytes=5000)
DISCARDED, CHECKSUMMED = Discarded(0, 100), Checksummed(0, 100)
NEXT = Copied(0, 101, replace(ID, step=8), watermark=7, layout=3, image_bytes=6000)


def played(*events: Event) -> tuple[Session, list[Action]]:
    """Where *events* lead a new session, and what the last of them made the agent do."""
    session, actions = Session(), list[Action]()
    for event in events:
        session, actions = advance(session, event)
    return session, actions


def test_a_session_begins_with_nothing() -> None:
    assert Session().flights == {}


def test_a_copied_image_is_checksummed() -> None:
    session, actions = played(COPIED)
    assert actions == [Checksum(0, 100, 5000)]
    assert session.flights == {0: FLIGHT}


def test_a_checksummed_image_is_recorded_and_the_trainer_told() -> None:
    """In this order: what a trainer is told is prepared may be counted upon."""
    session, actions = played(COPIED, CHECKSUMMED)
    assert actions == [WriteRecord(0, FLIGHT), TellPrepared(0, 100)]
    assert session.flights == {}


def test_what_is_given_up_is_forgotten() -> None:
    assert played(COPIED, DISCARDED) == (Session(), [])
    assert played(COPIED, DISCARDED, CHECKSUMMED) == (Session(), [])
    assert played(COPIED, CHECKSUMMED, DISCARDED) == (Session(), [])


def test_the_next_flight_takes_the_slot() -> None:
    session, actions = played(COPIED, NEXT)
    assert actions == [Checksum(0, 101, 6000)]
    assert session.flights == {0: Flight(101, replace(ID, step=8), 7, 3)}
    assert advance(session, CHECKSUMMED) == (session, [])


def test_slots_do_not_disturb_each_other() -> None:
    other = replace(NEXT, slot=1)
    session, actions = played(COPIED, other, CHECKSUMMED)
    assert actions == [WriteRecord(0, FLIGHT), TellPrepared(0, 100)]
    assert list(session.flights) == [1]
    assert played(COPIED, other, Discarded(1, 101))[0].flights == {0: FLIGHT}


@pytest.mark.parametrize("stale", [Discarded(0, 99), Checksummed(0, 99), Discarded(1, 100), Checksummed(1, 100)])
def test_what_is_said_of_another_flight_changes_nothing(stale: Event) -> None:
    session, _ = played(COPIED)
    assert advance(session, stale) == (session, [])
    assert advance(Session(), stale) == (Session(), [])


def test_being_told_twice_is_recording_twice_alike() -> None:
    """An agent that takes over is told again of an image whose record its predecessor may have written."""
    first, again = played(COPIED, CHECKSUMMED), played(COPIED, CHECKSUMMED, COPIED, CHECKSUMMED)
    assert first == again


def test_sessions_are_values() -> None:
    before, _ = played(COPIED)
    advance(before, DISCARDED)
    assert before.flights == {0: FLIGHT}
    with pytest.raises(TypeError):
        before.flights[1] = FLIGHT  # type: ignore[index]


# -- a random trainer --------------------------------------------------------------------------------------------------------


class Conversation(RuleBasedStateMachine):
    """A trainer and its agent on three slots, with messages under way between them. Either, or the stream, may go at any time.

    A slot is sealed if its word (the trainer's) is the nonce of its record (the agent's). ``copied``, ``exact``,
    ``checksummed`` and ``given_up`` hold the truth about each filling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.session = Session()
        self.words = [FREE_WORD] * 3
        self.records = [0] * 3  # nonces
        self.sent: deque[Event] = deque()
        self.told: deque[TellPrepared] = deque()
        self.work: list[Checksum] = []
        self.filled: dict[int, int] = {}  # slot to nonce
        self.announced: dict[int, Copied] = {}
        self.copied, self.exact, self.checksummed, self.given_up = (set[int]() for _ in range(4))
        self.prepared: set[int] = set()
        self.nonce = OPEN_WORD

    def hear(self, event: Event) -> None:
        """The agent hears *event*, and does what it decides."""
        self.session, actions = advance(self.session, event)
        for action in actions:
            match action:
                case Checksum():
                    assert action.nonce in self.copied
                    self.work.append(action)
                case WriteRecord(slot, flight):
                    assert flight.nonce in self.checksummed, "recorded before its own checksums were there"
                    assert self.records[slot] <= flight.nonce, "an old record over a newer one"
                    self.records[slot] = flight.nonce
                case TellPrepared(slot, nonce):
                    assert self.records[slot] == nonce, "told of a record that is not written"
                    self.told.append(action)

    @rule(slot=st.integers(0, 2))
    def fill(self, slot: int) -> None:
        nonce = self.filled.get(slot)
        if nonce is not None and not {nonce} <= self.exact & self.prepared:  # in flight: it is not filled again before
            return
        self.nonce += 1
        self.words[slot], self.filled[slot] = OPEN_WORD, self.nonce

    @rule(slot=st.integers(0, 2))
    def copy(self, slot: int) -> None:
        nonce = self.filled.get(slot)
        if nonce is not None and nonce not in self.copied:
            self.copied.add(nonce)
            self.announced[slot] = Copied(slot, nonce, replace(ID, step=nonce), nonce - 1, 1, 10)
            self.sent.append(self.announced[slot])

    @rule(slot=st.integers(0, 2))
    def fence(self, slot: int) -> None:
        """The copy has landed; whether the agent knows of it or not."""
        nonce = self.filled.get(slot)
        if nonce is not None and self.words[slot] == OPEN_WORD:
            self.exact.add(nonce)
            self.words[slot] = nonce

    @rule(slot=st.integers(0, 2))
    def give_up(self, slot: int) -> None:
        nonce = self.filled.pop(slot, None)
        if nonce is not None:
            self.words[slot] = FREE_WORD
            self.given_up.add(nonce)
            if nonce in self.copied:
                self.sent.append(Discarded(slot, nonce))

    @rule(times=st.integers(1, 3))
    def agent_hears(self, times: int) -> None:
        for _ in range(min(times, len(self.sent))):
            self.hear(self.sent.popleft())

    @rule(last=st.booleans())
    def agent_checksums(self, last: bool) -> None:
        if self.work:
            done = self.work.pop(-1 if last else 0)
            self.checksummed.add(done.nonce)
            self.hear(Checksummed(done.slot, done.nonce))

    @rule()
    def agent_cannot(self) -> None:
        if self.work:
            done = self.work.pop(0)
            self.hear(Discarded(done.slot, done.nonce))

    @rule()
    def trainer_hears(self) -> None:
        if self.told:
            told = self.told.popleft()
            if self.filled.get(told.slot) == told.nonce:
                self.prepared.add(told.nonce)

    @rule(lives=st.booleans())
    def agent_is_lost(self, lives: bool) -> None:
        """Another takes over (or the same one, once it is done), and is told again of what is copied and not recorded."""
        while lives and self.work:
            self.agent_checksums(last=False)
        self.session = Session()
        self.work.clear()
        self.told.clear()
        self.sent = deque(
            copied
            for slot, copied in self.announced.items()
            if self.filled.get(slot) == copied.nonce not in self.prepared
        )

    @rule(heard=st.booleans())
    def trainer_is_lost(self, heard: bool) -> None:
        """The agent may still hear what was under way, and ends what it has begun; then a new trainer finds the slots."""
        while heard and self.sent:
            self.hear(self.sent.popleft())
        while self.work:
            self.agent_checksums(last=False)
        assert not self.session.flights, "a flight that nobody will end"
        for slot, (word, record) in enumerate(zip(self.words, self.records, strict=True)):
            if word != record:
                self.words[slot] = FREE_WORD
                self.filled.pop(slot, None)
        self.agent_is_lost(lives=False)

    @invariant()
    def sealed_is_exact_and_checksummed(self) -> None:
        for word, record in zip(self.words, self.records, strict=True):
            if word == record != FREE_WORD:
                assert word in self.exact & self.copied & self.checksummed
                assert word not in self.given_up

    @invariant()
    def every_flight_is_being_worked_at(self) -> None:
        under_way = {(work.slot, work.nonce) for work in self.work}
        assert {(slot, flight.nonce) for slot, flight in self.session.flights.items()} <= under_way

    @invariant()
    def what_a_trainer_counts_upon_is_sealed(self) -> None:
        for slot, nonce in self.filled.items():
            if nonce in self.exact & self.prepared:
                assert self.words[slot] == self.records[slot] == nonce


TestConversation = Conversation.TestCase
TestConversation.settings = settings(derandomize=True, deadline=None, max_examples=150, stateful_step_count=40)
