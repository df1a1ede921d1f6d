"""What an agent answers, spoken to directly: admission, a snapshot's life, trainers that die, send nonsense, come twice."""

from __future__ import annotations

import os
import queue
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import AgentClient, Attachment, hello, packed, place_of
from holdfast.agent.settings import PROTOCOL
from holdfast.errors import (
    AgentError,
    AgentMismatch,
    AgentUnreachable,
    BudgetExceeded,
    ConfigError,
    HoldfastError,
    RankTaken,
    SnapshotUnknown,
)
from holdfast.snapshot.arena import Slot, Window
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import new_nonce
from holdfast.storage.tiers import Tier, TierSettings
from holdfast.tests.hooks.nodes import WAIT_S, Node, open_slot, until

RUN = uuid.uuid4().hex
LAYOUT = Layout.of(1, [Slice("x", "uint8", (4096,), (0,), (4096,))])


@pytest.fixture(scope="module")
def _served() -> Iterator[Node]:
    node = Node()
    node.start("--idle-exit", "never", "--memory-limit", "16MiB")
    yield node
    node.remove()


@pytest.fixture
def node(_served: Node) -> Iterator[Node]:
    """An agent that holds nothing, and is the same process after the test as before."""
    pid = _served.status().pid
    yield _served
    while Trainer.attached:
        Trainer.attached.pop().die()
    _served.wipe()
    assert _served.status().pid == pid, "the agent did not survive"


def nonce_of(step: int) -> int:
    """What the trainer puts into the commit word for *step*."""
    return new_nonce(random.Random(step))


def copied(slot: int, step: int, **changes: Any) -> wire.Copied:
    """What a trainer says once step *step* lies in *slot*."""
    said = wire.Copied(
        slot=slot, nonce=nonce_of(step), run=RUN, generation=1, step=step, watermark=-1, layout=1, image_bytes=4096
    )
    for name, value in changes.items():
        setattr(said, name, value)
    return said


class Trainer:
    """A trainer that says exactly what it is told to."""

    attached: ClassVar[list[Trainer]] = []

    def __init__(self, node: Node, rank: int = 0, **changes: Any) -> None:
        self.heard: queue.SimpleQueue[wire.FromAgent] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[HoldfastError] = queue.SimpleQueue()
        self.node, self.rank = node, rank
        said = hello(node.settings, "0", rank=rank, world=4, slots=2, image_bytes=8192, table_bytes=4096)
        for name, value in changes.items():
            if isinstance(value, list):
                getattr(said, name).extend(value)
            else:
                setattr(said, name, value)
        self.stream = Attachment(
            node.settings, said, hear=self.heard.put, lost=lambda _, reason: self.lost.put(reason), timeout_s=WAIT_S
        )
        self.attached.append(self)
        self.slots = self.stream.welcome.slots

    def say(self, **kind: Any) -> None:
        self.stream.send(wire.FromTrainer(**kind))

    def hear(self) -> wire.FromAgent:
        return self.heard.get(timeout=WAIT_S)

    def slot(self, index: int = 0) -> Slot:
        return open_slot_at(self.slots[index], self.rank)

    def snapshot(self, step: int, index: int = 0, *, fenced: bool = True) -> None:
        """All that a trainer does: fill the slot, tell the agent, and, if *fenced*, store the commit word."""
        slot = self.slot(index)
        slot.unseal_to_fill()
        slot.image[:4096] = step % 251
        self.say(layout=wire.LayoutText(number=1, text=LAYOUT.to_text()))
        self.say(copied=copied(index, step))
        if fenced:
            slot.commit(nonce_of(step))
        slot.close()

    def sealed(self, step: int, index: int = 0) -> None:
        """A whole snapshot."""
        self.snapshot(step, index)
        prepared = self.hear().prepared
        assert (prepared.slot, prepared.nonce) == (index, nonce_of(step))

    def settle(self) -> None:
        """Until the agent has heard all that was said so far: it answers messages in their order."""
        self.say(grow=wire.Grow(slot=1, image_bytes=1 << 40, table_bytes=4096))
        while self.hear().WhichOneof("kind") != "failed":
            pass

    def die(self) -> None:
        """As a killed process: the stream breaks, without a goodbye."""
        self.stream._closing = True
        self.stream._channel.close()
        self.stream._outbox.put(None)
        self.stream._thread.join(WAIT_S)


def open_slot_at(place: wire.SlotPlace, rank: int) -> Slot:
    return Slot.open(place_of(place, rank))


@pytest.fixture
def trainer(node: Node) -> Trainer:
    return Trainer(node)


def held(node: Node) -> list[tuple[int, int]]:
    """(rank, step) of all that the agent says it holds."""
    with AgentClient.at(node.settings) as client:
        return sorted((image.rank, image.step) for image in client.inventory(WAIT_S).images)


# -- admission -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"protocol": PROTOCOL + 1}, AgentMismatch, f"protocol {PROTOCOL + 1}.*restart the agent"),
        ({"protocol": 0}, AgentMismatch, "protocol 0"),
        ({"job": "somebody-elses"}, AgentMismatch, "somebody-elses"),
        ({"slots": 0}, ConfigError, "0 slots"),
        ({"slots": 17}, ConfigError, "17 slots"),
        ({"world": 0}, ConfigError, "rank 0 of 0"),
        ({"rank": 4}, ConfigError, "rank 4 of 4"),
        ({"image_bytes": 1 << 30}, BudgetExceeded, "16777216 are allowed.*HOLDFAST_MEMORY_LIMIT"),
        ({"image_bytes": (1 << 64) - 1}, BudgetExceeded, "are allowed"),
        ({"table_bytes": 1 << 50}, BudgetExceeded, "are allowed"),
    ],
)
def test_who_is_turned_away(node: Node, changes: dict[str, Any], error: type[HoldfastError], message: str) -> None:
    before = sorted(path.name for path in node.shm.iterdir())
    with pytest.raises(error, match=message):
        Trainer(node, **changes)
    assert sorted(path.name for path in node.shm.iterdir()) == before, "nothing was made"


def test_a_tier_that_cannot_hold_what_is_kept_is_refused_once(node: Node, tmp_path: Path) -> None:
    """Not when the trainer comes back, to an agent that was started again: it trains already."""
    tiers = [TierSettings.parse(Tier(str(tmp_path), limit="1MiB")).to_json()]
    with pytest.raises(BudgetExceeded, match="its limit is 1048576"):
        Trainer(node, tiers=tiers)
    trainer = Trainer(node, tiers=tiers, again=True)
    assert len(trainer.slots) == 2
    assert [tier.url for tier in node.status().tiers] == [tmp_path.as_uri()]


def test_the_first_message_must_be_hello(node: Node) -> None:
    with grpc.insecure_channel(f"unix:{node.settings.socket}") as channel:
        call = channel.stream_stream("/holdfast.v1.Agent/Attach", lambda message: message, wire.FromAgent.FromString)
        for said in ([wire.FromTrainer(goodbye=wire.Goodbye()).SerializeToString()], [], [b"\xff\xff garbage"]):
            with pytest.raises(grpc.RpcError):
                next(call(iter(said), timeout=WAIT_S))


def test_trainers_attach_by_the_unix_socket_only(node: Node) -> None:
    """Over TCP questions are answered, but nobody gets at slots."""
    with AgentClient(node.status().listen) as client:
        assert client.status().job == node.job
        with pytest.raises(AgentUnreachable, match="Method not found"):
            client._ask("Attach", wire.Nothing(), wire.Nothing, WAIT_S)


def test_slots_are_private_and_as_large_as_asked(node: Node, trainer: Trainer) -> None:
    assert [(s.index, s.image_bytes >= 8192, s.table_bytes >= 4096) for s in trainer.slots] == [
        (0, True, True), (1, True, True),
    ]  # fmt: skip
    for path in (*node.shm.iterdir(), node.shm):
        assert path.stat().st_mode & 0o077 == 0, path


# -- a snapshot's life ---------------------------------------------------------------------------------------------------


def test_a_snapshot_is_held_once_it_is_sealed(node: Node, trainer: Trainer) -> None:
    trainer.snapshot(7, fenced=False)
    prepared = trainer.hear().prepared
    assert (prepared.slot, prepared.nonce) == (0, nonce_of(7))
    assert held(node) == []
    slot = trainer.slot()
    slot.commit(prepared.nonce)
    record = slot.sealed_record()
    slot.close()
    assert record is not None
    assert (record.id.step, record.id.run, record.rank, record.world, record.image_bytes) == (7, RUN, 0, 4, 4096)
    assert held(node) == [(0, 7)]
    with AgentClient.at(node.settings) as client:
        detail = client.inspect(RUN[:6], 7).images[0]
        assert not detail.bad_blocks
        assert Layout.from_text(detail.layout) == LAYOUT
        with pytest.raises(SnapshotUnknown, match="holds no snapshot"):
            client.inspect(RUN, 8)


def test_what_was_fenced_is_recorded_for_a_trainer_that_died(node: Node) -> None:
    trainer = Trainer(node)
    trainer.snapshot(5)
    trainer.say(report=wire.Report(step=5))
    until(lambda: any(t.report.step == 5 for t in node.status().trainers), "the agent to have heard")
    trainer.die()
    until(lambda: held(node) == [(0, 5)], "the agent to record")


def test_what_was_not_fenced_is_dropped(node: Node) -> None:
    trainer = Trainer(node)
    trainer.sealed(4, index=1)
    trainer.snapshot(5, fenced=False)
    trainer.hear()
    trainer.die()
    again = Trainer(node)  # waits until the former one is settled
    assert held(node) == [(0, 4)]
    again.die()


def test_a_discarded_snapshot_is_not_sealed(node: Node, trainer: Trainer) -> None:
    trainer.snapshot(5, fenced=False)
    trainer.hear()
    slot = trainer.slot()
    slot.unseal()
    slot.close()
    trainer.say(discarded=wire.Discarded(slot=0, nonce=nonce_of(5), reason="torn"))
    trainer.settle()
    assert held(node) == []


def test_a_slot_grows_and_its_neighbour_stays(node: Node, trainer: Trainer) -> None:
    trainer.sealed(3, index=1)
    trainer.say(grow=wire.Grow(slot=0, image_bytes=100_000, table_bytes=5000))
    place = trainer.hear().grown.slot
    assert place.index == 0
    assert place.image_bytes >= 100_000
    assert place.table_bytes >= 5000
    assert held(node) == [(0, 3)]


def test_growing_beyond_the_budget_fails_and_loses_nothing(node: Node, trainer: Trainer) -> None:
    trainer.sealed(3, index=1)
    trainer.say(grow=wire.Grow(slot=0, image_bytes=1 << 30, table_bytes=4096))
    failed = trainer.hear().failed
    assert (failed.slot, failed.nonce) == (0, 0)
    assert "are allowed" in failed.reason
    assert held(node) == [(0, 3)]
    trainer.sealed(4, index=0)


def test_no_answer_is_lost_where_many_are_due(node: Node, trainer: Trainer) -> None:
    """gRPC takes one message at a time. One that is refused would leave its slot waiting for as long as the trainer lives."""
    for step in range(200):
        trainer.say(grow=wire.Grow(slot=1, image_bytes=1 << 40, table_bytes=4096))
        trainer.say(copied=copied(0, step))
    failed = 0
    while failed < 200:
        try:
            failed += trainer.heard.get(timeout=WAIT_S).WhichOneof("kind") == "failed"
        except queue.Empty:
            pytest.fail(f"{200 - failed} of 200 answers were lost")


# -- comings and goings --------------------------------------------------------------------------------------------------


def test_a_rank_is_taken_while_its_trainer_lives(node: Node, trainer: Trainer) -> None:
    with pytest.raises(RankTaken, match=r"rank 0 .* is held by pid"):
        Trainer(node, pid=1)
    trainer.sealed(1)
    assert held(node) == [(0, 1)]


def test_a_rank_is_free_as_soon_as_its_trainer_is_gone(node: Node) -> None:
    Trainer(node).die()
    Trainer(node, pid=1).die()


def test_a_stream_that_was_replaced_is_not_listened_to(node: Node) -> None:
    """The same trainer attached again: what still arrives by its old stream must not touch the slots.

    Else a late message would have the record of a sealed snapshot overwritten by that of one given up long ago.
    """
    old = Trainer(node, life="one")
    new = Trainer(node, life="one")
    new.sealed(3, index=0)
    old.say(copied=copied(0, 2))
    old.say(grow=wire.Grow(slot=0, image_bytes=100_000, table_bytes=4096))
    try:
        assert "ended" in str(old.lost.get(timeout=WAIT_S))
    except queue.Empty:
        pytest.fail("the agent still listens to the stream that was replaced")
    assert held(node) == [(0, 3)]


def test_a_returning_trainer_finds_what_is_sealed(node: Node) -> None:
    first = Trainer(node)
    first.sealed(1, index=0)
    first.sealed(2, index=1)
    first.die()
    again = Trainer(node, image_bytes=100_000)
    assert held(node) == [(0, 1), (0, 2)]
    assert again.slots == first.slots, "sealed slots keep the size they have"
    again.die()


def test_goodbye_is_remembered(node: Node) -> None:
    trainer = Trainer(node, rank=2)
    trainer.sealed(1)
    trainer.stream.close(goodbye=True)
    until(lambda: all(not t.alive for t in node.status().trainers), "the trainer to leave")
    assert {t.rank: t.ended for t in node.status().trainers}[2]


# -- nonsense ------------------------------------------------------------------------------------------------------------


NONSENSE = {
    "a slot that is not there": copied(99, 9),
    "a layout that was never told": copied(0, 9, layout=77),
    "an image larger than its slot": copied(0, 9, image_bytes=1 << 40),
    "an image a little larger": copied(0, 9, image_bytes=8193),
    "no image at all": copied(0, 9, image_bytes=0),
    "a layout beyond its image": copied(0, 9, image_bytes=64),
    "a run that is no run": copied(0, 9, run="no uuid"),
    "a generation beyond all": copied(0, 9, generation=1 << 63),
    "a watermark before all": copied(0, 9, watermark=-(1 << 62)),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("fenced", [False, True])
def test_an_agent_survives_nonsense(node: Node, nonsense: str, fenced: bool) -> None:
    """Nothing of it is ever sealed; what was sealed stays; the next trainer of the rank is served at once."""
    trainer = Trainer(node)
    trainer.sealed(1, index=1)
    said = NONSENSE[nonsense]
    slot = trainer.slot(0)
    slot.unseal_to_fill()
    trainer.say(layout=wire.LayoutText(number=1, text=LAYOUT.to_text()))
    trainer.say(copied=said)
    if fenced:
        slot.commit(said.nonce)
    kind = trainer.hear().WhichOneof("kind")  # never silence: the trainer would wait for ever
    slot.close()
    assert kind in ("failed", "prepared")
    trainer.die()
    again = Trainer(node)
    assert (0, 1) in held(node)
    with AgentClient.at(node.settings) as client:
        for step in {step for rank, step in held(node) if rank == 0}:
            assert not client.inspect(RUN, step).images[0].bad_blocks
    again.sealed(10, index=0)
    again.die()


def test_messages_in_any_order(node: Node, trainer: Trainer) -> None:
    """A seeded shuffle of half-sensible messages: the agent stays, and still serves."""
    draw = np.random.default_rng(3)
    for _ in range(300):
        slot, step = int(draw.integers(0, 2)), int(draw.integers(0, 4))
        kinds: list[dict[str, Any]] = [
            {"discarded": wire.Discarded(slot=slot, nonce=step, reason="x")},
            {"layout": wire.LayoutText(number=step, text=LAYOUT.to_text())},
            {"copied": copied(slot, step, nonce=step, layout=step)},
            {"report": wire.Report(step=step)},
            {"hello": wire.Hello()},
            {"goodbye": wire.Goodbye()},
        ]
        trainer.say(**kinds[int(draw.integers(0, len(kinds)))])
    trainer.settle()
    assert held(node) == [], "only a trainer's commit word seals"


def test_bytes_that_are_no_message(node: Node) -> None:
    with grpc.insecure_channel(f"unix:{node.settings.socket}") as channel:
        call = channel.stream_stream("/holdfast.v1.Agent/Attach", lambda message: message, wire.FromAgent.FromString)
        first = hello(node.settings, "0", rank=3, world=4, slots=2, image_bytes=64, table_bytes=64)
        stream = call(iter([wire.FromTrainer(hello=first).SerializeToString(), b"\x0a\xff\xff\xff"]), timeout=WAIT_S)
        assert next(stream).WhichOneof("kind") == "welcome"
        with pytest.raises((grpc.RpcError, StopIteration)):
            next(stream)
    Trainer(node, rank=3, pid=1).die()


def test_a_slot_file_that_vanished_under_the_agent(node: Node) -> None:
    """Somebody cleaned /dev/shm: the trainer is told, not left waiting, and the next attach makes new slots."""
    trainer = Trainer(node, rank=1)
    paths = [slot.path for slot in trainer.slots]
    trainer.die()
    os.unlink(paths[0])
    again: Trainer | None = None
    try:
        again = Trainer(node, rank=1)
        again.sealed(1, index=0)
        assert (1, 1) in held(node)
        assert open_slot(node.shm / "rank-00001.slot-0").sealed_record() is not None
    except AgentError:
        pytest.fail("a slot that vanished keeps its rank out for as long as the agent lives")
    finally:
        if again is not None:
            again.die()


# -- windows -------------------------------------------------------------------------------------------------------------


def test_parts_of_images_are_for_whoever_is_attached(node: Node, trainer: Trainer) -> None:
    """Over the Unix socket only; and when its stream ends, the windows go with it."""
    trainer.sealed(7)
    image = wire.MaterialiseRequest(id=wire.Id(run=RUN, generation=1, step=7), rank=0, world=4)
    image.images.add(rank=0, agent=node.status().agent)
    request = wire.ReadRequest(image=image, ranges=packed([(4000, 90), (0, 6)]), reader=0)
    with AgentClient.at(node.settings) as client:
        said = client.describe_image(image, WAIT_S)
        assert (said.layout, said.image_bytes) == (LAYOUT.to_text(), 4096)
        window = Window.open(client.read_ranges(request, WAIT_S).path)
        assert bytes(window.bytes[:96]) == bytes([7]) * 96
        assert client.status().reserved_bytes > window.bytes.nbytes
        request.reader = 1
        with pytest.raises(AgentError, match="rank 1 is not attached"):
            client.read_ranges(request, WAIT_S)
        with AgentClient(node.status().listen) as peer, pytest.raises(AgentUnreachable, match="Method not found"):
            peer.read_ranges(request, WAIT_S)
        trainer.die()
        until(lambda: not window.in_place, "the window to go")
        request.reader = 0
        with pytest.raises(AgentError, match="rank 0 is not attached"):
            client.read_ranges(request, WAIT_S)
        assert not list(node.shm.glob("window-*"))
    window.close()
