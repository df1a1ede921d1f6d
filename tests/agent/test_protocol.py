"""The agent's decisions: each transition, and a random trainer that is lost at any moment."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import permutations

import pytest
from holdfast.agent.protocol import (
    Action,
    Checksum,
    Checksummed,
    Commit,
    Copied,
    Discarded,
    Event,
    Fenced,
    Flight,
    Session,
    TellPrepared,
    TrainerLost,
    WriteRecord,
    advance,
)
from holdfast.snapshot.record import SnapshotId
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

ID = SnapshotId(2, 7, "ab" * 16)
FLIGHT = Flight(100, ID, watermark=6, layout=3)
COPIED = Copied(0, 100, ID, watermark=6, layout=3, image_bytes=5000)
FENCED, DISCARDED, CHECKSUMMED, LOST = Fenced(0, 100), Discarded(0, 100), Checksummed(0, 100, 77), TrainerLost()
WRITE, TELL = WriteRecord(0, FLIGHT, 77), TellPrepared(0, 100, 77)


def played(*events: Event) -> tuple[Session, list[Action]]:
    """Where *events* lead a new session, and what the last of them made the agent do."""
    session, actions = Session(), list[Action]()
    for event in events:
        session, actions = advance(session, event)
    return session, actions


def test_a_session_begins_with_nothing() -> None:
    assert Session().flights == {}
    assert Session().alive
    assert not Session().settled


def test_a_copied_image_is_checksummed() -> None:
    session, actions = played(COPIED)
    assert actions == [Checksum(0, 100, 5000)]
    assert session.flights == {0: FLIGHT}


def test_a_checksummed_image_is_recorded_and_the_trainer_told() -> None:
    """In this order: a trainer that is told before the record is there would seal nothing. The flight stays."""
    session, actions = played(COPIED, CHECKSUMMED)
    assert actions == [WRITE, TELL]
    assert session.flights == {0: replace(FLIGHT, nonce=77)}


def test_fencing_makes_nothing_happen_while_the_trainer_lives() -> None:
    for events in permutations([FENCED, CHECKSUMMED]):
        session, actions = played(COPIED, *events)
        assert session.flights == {0: replace(FLIGHT, fenced=True, nonce=77)}
        assert not any(isinstance(action, Commit) for action in actions)


def test_what_is_given_up_is_forgotten() -> None:
    for events in ([COPIED], [COPIED, FENCED], [COPIED, CHECKSUMMED], [COPIED, FENCED, CHECKSUMMED]):
        assert played(*events, DISCARDED) == (Session(), [])
        assert played(*events, DISCARDED, CHECKSUMMED) == (Session(), [])


def test_the_next_flight_takes_the_slot() -> None:
    again = Copied(0, 101, replace(ID, step=8), watermark=7, layout=3, image_bytes=5000)
    session, actions = played(COPIED, FENCED, CHECKSUMMED, again)
    assert actions == [Checksum(0, 101, 5000)]
    assert session.flights == {0: Flight(101, replace(ID, step=8), 7, 3)}


def test_slots_do_not_disturb_each_other() -> None:
    other = Copied(1, 200, replace(ID, step=8), watermark=6, layout=3, image_bytes=1)
    session, actions = played(COPIED, other, Fenced(1, 200), CHECKSUMMED)
    assert actions == [WRITE, TELL]
    assert session.flights[1].fenced
    assert not session.flights[0].fenced


@pytest.mark.parametrize(
    "stale",
    [Fenced(0, 99), Discarded(0, 99), Checksummed(0, 99, 5), Fenced(1, 100), Discarded(1, 100), Checksummed(1, 100, 5)],
)
@pytest.mark.parametrize("alive", [True, False])
def test_what_is_said_of_another_flight_changes_nothing(stale: Event, alive: bool) -> None:
    session, _ = played(COPIED, FENCED, *([] if alive else [LOST]))
    assert advance(session, stale) == (session, [])


# -- the trainer is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [[], [COPIED], [COPIED, CHECKSUMMED], [COPIED, FENCED, DISCARDED]])
def test_what_may_be_torn_dies_with_its_trainer(events: list[Event]) -> None:
    session, actions = played(*events, LOST)
    assert (session.settled, actions) == (True, [])
    assert advance(session, CHECKSUMMED) == (session, [])


@pytest.mark.parametrize("events", [[FENCED, CHECKSUMMED], [CHECKSUMMED, FENCED]])
def test_what_is_fenced_and_recorded_is_sealed_at_once(events: list[Event]) -> None:
    session, actions = played(COPIED, *events, LOST)
    assert actions == [Commit(0, replace(FLIGHT, fenced=True, nonce=77), 77)]
    assert session.settled


def test_what_is_fenced_is_waited_for() -> None:
    session, actions = played(COPIED, FENCED, LOST)
    assert (session.settled, actions) == (False, [])
    session, actions = advance(session, CHECKSUMMED)
    fenced = replace(FLIGHT, fenced=True)
    assert actions == [WriteRecord(0, fenced, 77), Commit(0, fenced, 77)]  # the record first
    assert session.settled


def test_what_is_waited_for_and_cannot_be_sealed_is_dropped() -> None:
    session, actions = played(COPIED, FENCED, LOST, DISCARDED)
    assert (session.settled, actions) == (True, [])


def test_losing_it_twice_is_losing_it_once() -> None:
    session, _ = played(COPIED, FENCED, LOST)
    assert advance(session, LOST) == (session, [])


@pytest.mark.parametrize("late", [COPIED, Copied(1, 200, ID, 6, 3, 1)])
def test_what_still_arrives_from_a_lost_trainer_begins_nothing(late: Event) -> None:
    """Messages of a stream that broke can be read after its end was noticed; nobody will fence what they begin."""
    for events in ([LOST], [COPIED, FENCED, LOST]):
        session, _ = played(*events)
        assert advance(session, late) == (session, [])


def test_a_fence_that_arrives_too_late_is_no_fence() -> None:
    session, _ = played(COPIED, LOST, FENCED, CHECKSUMMED)
    assert session.settled
    assert played(COPIED, LOST, FENCED, CHECKSUMMED)[1] == []


# -- a random trainer --------------------------------------------------------------------------------------------------------


class Conversation(RuleBasedStateMachine):
    """A trainer and an agent on three slots, messages under way between them; the trainer, or the stream, may go at any time.

    A trainer fills a slot under a new token, says ``Copied``, fences, and stores the nonce it is told; a slot is sealed if
    its word is the nonce of its record. ``fenced`` and ``given_up`` hold the truth about each token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.session = Session()
        self.words = [0, 0, 0]
        self.records: list[tuple[int, int] | None] = [None, None, None]  # token and nonce
        self.sent: deque[Event] = deque()
        self.told: deque[TellPrepared] = deque()
        self.work: list[Checksum] = []
        self.filled: dict[int, int] = {}  # slot to token
        self.copied: set[int] = set()
        self.fenced: set[int] = set()
        self.given_up: set[int] = set()
        self.nonces: dict[int, int] = {}
        self.token = 0

    def hear(self, event: Event) -> None:
        """The agent hears *event*, and does what it decides."""
        before, heard_lost = self.session, isinstance(event, TrainerLost)
        self.session, actions = advance(before, event)
        assert all(flight.fenced for flight in self.session.flights.values()) or not heard_lost
        for action in actions:
            self.perform(action)

    def perform(self, action: Action) -> None:
        match action:
            case Checksum():
                self.work.append(action)
            case WriteRecord(slot, flight, nonce):
                assert self.words[slot] != (self.records[slot] or (0, -1))[1], (
                    "the record of a sealed slot is overwritten"
                )
                self.records[slot] = (flight.token, nonce)
            case TellPrepared(slot, token, nonce):
                assert self.records[slot] == (token, nonce), "told of a record that is not written"
                self.told.append(action)
            case Commit(slot, flight, nonce):
                assert flight.token in self.fenced, "ordered to commit what was never fenced"
                assert self.records[slot] == (flight.token, nonce), "ordered to commit what is not recorded"
                assert not self.session.alive
                if self.words[slot] == flight.token:
                    self.words[slot] = nonce

    def commit_if_due(self, token: int) -> None:
        if token in self.fenced and token in self.nonces:
            (slot,) = (slot for slot, held in self.filled.items() if held == token)
            self.words[slot] = self.nonces.pop(token)

    def say(self, event: Event) -> None:
        if self.session.alive:
            self.sent.append(event)

    @precondition(lambda self: self.session.alive)
    @rule(slot=st.integers(0, 2))
    def fill(self, slot: int) -> None:
        if slot in self.filled and self.words[slot] < 1 << 32:  # in flight: as slots.overwritable has it, not before
            return
        self.token += 1
        self.words[slot] = self.filled[slot] = self.token

    @precondition(lambda self: self.session.alive)
    @rule(slot=st.integers(0, 2))
    def copy(self, slot: int) -> None:
        token = self.filled.get(slot)
        if token is not None and token not in self.copied:
            self.copied.add(token)
            self.say(Copied(slot, token, replace(ID, step=token), token - 1, 1, 10))

    @precondition(lambda self: self.session.alive)
    @rule(slot=st.integers(0, 2))
    def fence(self, slot: int) -> None:
        token = self.filled.get(slot)
        if token is not None and token in self.copied and token not in self.fenced:
            self.fenced.add(token)
            if token in self.nonces:
                self.commit_if_due(token)
            else:
                self.say(Fenced(slot, token))

    @precondition(lambda self: self.session.alive)
    @rule(slot=st.integers(0, 2))
    def give_up(self, slot: int) -> None:
        token = self.filled.pop(slot, None)
        if token is not None:
            self.words[slot] = 0
            self.given_up.add(token)
            self.nonces.pop(token, None)
            self.say(Discarded(slot, token))

    @rule(times=st.integers(1, 3))
    def agent_hears(self, times: int) -> None:
        """Also after the loss: what was under way then."""
        for _ in range(min(times, len(self.sent))):
            self.hear(self.sent.popleft())

    @rule(last=st.booleans())
    def agent_checksums(self, last: bool) -> None:
        if self.work:
            done = self.work.pop(-1 if last else 0)
            self.hear(Checksummed(done.slot, done.token, (1 << 40) + done.token))

    @rule()
    def agent_cannot(self) -> None:
        if self.work:
            done = self.work.pop(0)
            self.hear(Discarded(done.slot, done.token))

    @precondition(lambda self: self.session.alive)
    @rule()
    def trainer_hears(self) -> None:
        if self.told:
            told = self.told.popleft()
            if self.filled.get(told.slot) == told.token:
                self.nonces[told.token] = told.nonce
                self.commit_if_due(told.token)

    @precondition(lambda self: self.token > 2)
    @rule(heard=st.booleans())
    def lose(self, heard: bool) -> None:
        """The trainer is lost; what it had said last is read before, after, or never."""
        while heard and self.sent:
            self.hear(self.sent.popleft())
        self.hear(TrainerLost())

    @invariant()
    def sealed_is_fenced(self) -> None:
        for word, record in zip(self.words, self.records, strict=True):
            if record is not None and word == record[1]:
                assert record[0] in self.fenced
                assert record[0] not in self.given_up

    @invariant()
    def a_dead_session_only_shrinks(self) -> None:
        if not self.session.alive:
            assert all(f.fenced and f.nonce is None for f in self.session.flights.values())
            under_way = {work.token for work in self.work}
            assert {f.token for f in self.session.flights.values()} <= under_way

    def teardown(self) -> None:
        """Once the trainer is gone and the work done, nothing is left to wait for."""
        self.hear(TrainerLost())
        while self.work:
            self.agent_checksums(last=False)
        assert self.session.settled
        self.sealed_is_fenced()


TestConversation = Conversation.TestCase
TestConversation.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
