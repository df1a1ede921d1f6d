"""Where a restore takes images from when copies prove damaged, and that every image that is held is told of."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.arenas import Arenas
from holdfast.agent.budget import measure
from holdfast.agent.protocol import Flight
from holdfast.agent.settings import NodeSettings
from holdfast.errors import SnapshotLost
from holdfast.hooks.found import Found, gather_inventories
from holdfast.hooks.ranks import Alone, Pending, Ranks
from holdfast.hooks.restore import Restorer
from holdfast.snapshot.capture import Capture, CpuCopier, bind
from holdfast.snapshot.codec import encode
from holdfast.snapshot.layout import Layout
from holdfast.snapshot.partition import share
from holdfast.snapshot.record import SnapshotId, new_nonce
from holdfast.snapshot.recovery import Held, HeldParity
from holdfast.snapshot.state import TrainingState, to_leaf
from holdfast.tests.hooks.nodes import bits_of_models
from torch import nn

RUN = uuid.uuid4().hex
WAIT_S = 120.0
Result = TypeVar("Result")


# -- ranks that are threads ----------------------------------------------------------------------------------------------


class _Table:
    """Where ranks meet."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.said = [b""] * world


class _Rank(Ranks):
    def __init__(self, rank: int, world: int, table: _Table) -> None:
        self.rank, self.world = rank, world
        self._table = table

    def gather(self, payload: bytes, what: str, timeout_s: float) -> list[bytes]:
        self._table.said[self.rank] = payload
        self._table.barrier.wait(WAIT_S)
        said = list(self._table.said)
        self._table.barrier.wait(WAIT_S)
        return said

    def reduce_min(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        raise NotImplementedError

    def exchange(self, vector: Sequence[int]) -> Pending[list[list[int]]]:
        raise NotImplementedError


def on_all(world: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """What *work* returns on each of so many ranks."""
    table = _Table(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(_Rank(rank, world, table)), range(world)))


def nobody(addresses: Sequence[str], timeout_s: float) -> wire.ImageLists:
    """There are no agents elsewhere."""
    raise AssertionError(addresses)


# -- what is held --------------------------------------------------------------------------------------------------------


def _image(rank: int, agent: str, *, alive: bool) -> wire.Image:
    return wire.Image(
        run=RUN, generation=1, step=5, rank=rank, world=2, watermark=-1, path=f"/{agent}/{rank}", trainer_alive=alive
    )


def _reply(agent: str, *images: wire.Image) -> wire.ImageList:
    return wire.ImageList(agent=agent, images=images, address=f"{agent}:1")


def test_each_image_is_told_of_by_its_own_rank() -> None:
    reply = _reply("a", _image(0, "a", alive=True), _image(1, "a", alive=True))
    for found in on_all(2, lambda ranks: gather_inventories(ranks, reply, wire.TierList(), WAIT_S, nobody)):
        assert [(held.rank, held.agent) for held in found.images] == [(0, "a"), (1, "a")]


def test_images_of_ranks_that_are_elsewhere_are_told_of() -> None:
    """Also where the agent has not noticed yet that their trainers are gone; and of ranks that are no more."""
    replies = [
        _reply("a", _image(1, "a", alive=True), _image(7, "a", alive=True)),
        _reply("b", _image(0, "b", alive=True), _image(5, "b", alive=False)),
    ]
    for found in on_all(
        2, lambda ranks: gather_inventories(ranks, replies[ranks.rank], wire.TierList(), WAIT_S, nobody)
    ):
        assert {(held.rank, held.agent) for held in found.images} == {(1, "a"), (7, "a"), (0, "b"), (5, "b")}


# -- damaged copies ------------------------------------------------------------------------------------------------------


@dataclass
class Copies:
    """One model's snapshots, each held by several agents, and what was asked of the one of this node, ``here``."""

    folder: Path
    model: nn.Module = field(default_factory=lambda: nn.Linear(64, 64))
    arenas: dict[str, Arenas] = field(default_factory=dict)
    asked: list[wire.MaterialiseRequest] = field(default_factory=list)
    rebuilds: bool = False

    @property
    def state(self) -> TrainingState:
        return TrainingState({"": self.model}, {}, {})

    def take(self, step: int, *agents: str) -> Any:
        """A snapshot of random weights, held by these agents; the weights."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_()
        survey = self.state.survey()
        layout = Layout.of(1, share([item.slice for item in survey.items], 0))
        encoded, text = encode(self.state.values(survey), "state", to_leaf), layout.to_text()
        image_bytes, nonce = layout.values_offset + encoded.nbytes, new_nonce()
        for agent in agents:
            arenas = self._of(agent)
            arenas.reserve(0, 2, image_bytes=image_bytes, table_bytes=4096 + len(text))
            slot, copier = arenas.slot(0, step % 2), CpuCopier()
            slot.unseal_to_fill()
            encoded.write_into(slot.image[layout.values_offset :])
            capture = Capture(bind(layout, survey), copier)
            capture.start(slot, lambda seconds: None)
            capture.fence(WAIT_S)
            copier.close()
            flight = Flight(nonce, SnapshotId(1, step, RUN), watermark=-1, layout=1)
            sums = arenas.checksum(0, step % 2, image_bytes)
            arenas.write_record(step % 2, flight, sums, rank=0, world=1, layout=text)
            slot.commit(nonce)
            slot.mark_complete()
        return bits_of_models({"": self.model})

    def _of(self, agent: str) -> Arenas:
        if agent not in self.arenas:
            folder = self.folder / agent
            folder.mkdir(mode=0o700, parents=True)
            self.arenas[agent] = Arenas(NodeSettings("j", folder, folder / "agent.sock", False), agent, None, measure)
        return self.arenas[agent]

    def damage(self, step: int, agent: str) -> None:
        slot = self.arenas[agent].image(0, SnapshotId(1, step, RUN))
        assert slot is not None
        slot.image[7] ^= 1

    def found(self, parities: tuple[HeldParity, ...] = ()) -> Found:
        images = tuple(held for arenas in self.arenas.values() for held in arenas.inventory())
        return Found(images, (), parities, dict.fromkeys(self.arenas, ""))

    def materialise(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.MaterialiseReply:
        """As an agent would: from the first source, unverified, else rebuilt; here, its own memory serves as what it made."""
        self.asked.append(request)
        for image in request.images:
            held = next(held for held in self._held(image.agent) if held.id.step == request.id.step)
            return wire.MaterialiseReply(path=held.path, how=f"fetched from agent {image.agent}")
        if self.rebuilds:
            (held,) = (held for held in self._held("group") if held.id.step == request.id.step)
            return wire.MaterialiseReply(path=held.path, how="rebuilt")
        raise SnapshotLost("no source")

    def describe_image(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.Description:
        """All copies are of this rank's own image, which comes whole."""
        raise AssertionError(request)

    def read_ranges(self, request: wire.ReadRequest, timeout_s: float) -> wire.ReadReply:
        raise AssertionError(request)

    def _held(self, agent: str) -> list[Held]:
        return self.arenas[agent].inventory()

    def restore(self, found: Found) -> int | None:
        """The step that comes back."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        done = Restorer(self.state, Alone(), WAIT_S, (), "here", self).newest(found)
        return done[0].step if done else None


@pytest.fixture
def copies() -> Iterator[Copies]:
    copies = Copies(Path(f"/dev/shm/copies-{uuid.uuid4().hex[:10]}"))
    yield copies
    for arenas in copies.arenas.values():
        arenas.close()
    shutil.rmtree(copies.folder)


def test_a_good_copy_elsewhere_is_not_given_up_with_a_damaged_one_here(copies: Copies) -> None:
    copies.take(4, "here")
    taken = copies.take(5, "here", "there")
    copies.damage(5, "here")
    assert copies.restore(copies.found()) == 5
    assert bits_of_models({"": copies.model}) == taken
    (request,) = copies.asked
    assert [image.agent for image in request.images] == ["there"]


def test_copies_then_the_group_then_an_older_snapshot(copies: Copies) -> None:
    """Each source is tried before the next, nearest first; and every one that fails is not tried again."""
    older = copies.take(4, "here")
    taken = copies.take(5, "here", "there", "yonder", "group")
    for agent in ("here", "there", "yonder"):
        copies.damage(5, agent)
    copies.rebuilds = True
    parity = HeldParity(SnapshotId(1, 5, RUN), 1, 0, (0, -1), 1, "group")
    found = copies.found((parity, replace(parity, index=1)))
    found = replace(found, images=tuple(held for held in found.images if held.agent != "group"))
    assert copies.restore(found) == 5
    assert bits_of_models({"": copies.model}) == taken
    assert [[image.agent for image in request.images] for request in copies.asked] == [
        ["there", "yonder"],
        ["yonder"],
        [],
    ]

    copies.damage(5, "group")
    assert copies.restore(found) == 4
    assert bits_of_models({"": copies.model}) == older


def test_what_no_source_can_give_is_not_asked_for_again(copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent has tried all copies and the group: the snapshot is passed over at once."""
    older = copies.take(4, "here")
    copies.take(5, "there", "yonder")

    def lost(request: wire.MaterialiseRequest, timeout_s: float) -> wire.MaterialiseReply:
        copies.asked.append(request)
        raise SnapshotLost("all of them are damaged")

    monkeypatch.setattr(copies, "materialise", lost)
    assert copies.restore(copies.found()) == 4
    assert bits_of_models({"": copies.model}) == older
    assert len(copies.asked) == 1
