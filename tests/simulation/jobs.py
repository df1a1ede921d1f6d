"""One life of a job, from finding out what is held to its end: what ``Checkpointer`` does on all ranks together.

Its stages are those of the real one, and faults come between any two of them: the inventories are gathered; every agent is
told who is there; images are brought to where they are needed; every agent is told again, with the floor; the floor is protected,
marked as complete on every rank, and only then does anybody train.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from holdfast.snapshot.beat import Agreed
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import Held, Relied, relied_on
from holdfast.snapshot.slots import find

from .agents import Agent, Peer, Roster
from .memory import SlotMemory
from .trainers import Beat, Rank

if TYPE_CHECKING:
    from .world import Place, World


class Phase(Enum):
    """How far a job has come."""

    FINDING = auto()  # who is there
    BRINGING = auto()  # images to where they are needed
    JOINING = auto()  # telling the agents of the floor
    PROTECTING = auto()  # the floor
    MARKING = auto()  # the floor, as complete
    TRAINING = auto()


class Job:
    """All ranks of one run."""

    def __init__(self, world: World, placement: dict[Place, tuple[int, ...]], number: int) -> None:
        """*placement*: the ranks of each place. All agents are there, and all ranks attach."""
        self.world, self.placement, self.number = world, placement, number
        self.size = sum(map(len, placement.values()))
        self.run = f"{number:032x}"
        self.phase = Phase.FINDING
        self.dying = False
        self.beats: list[Beat] = []
        self.agreed: dict[int, Agreed] = {}  # after so many beats, by the first rank that settled them
        self.outstanding = 0  # parts of the running stage
        self.places = list(placement)
        numbers = sorted((rank, place.index) for place, ranks in placement.items() for rank in ranks)
        self.ranks: list[Rank] = []
        for rank, index in numbers:
            self.ranks.append(Rank(self, rank, world.agent_at(world.places[index]), world.taste.slots))
        self.memories = [place.memory for place in self.places]
        self.found = [held for memory in self.memories for held in memory.held()]
        self.parities = [parity for memory in self.memories for parity in memory.held_parities()]
        self.generation = 1 + max((held.id.generation for held in self.found), default=0)
        self.plan = world.truth.restoring(self)
        self.chosen = self.plan.chosen
        self.relied = relied_on(self.found, self.parities, self.chosen) if self.chosen else Relied(None, ())

    def begin(self) -> None:
        """As ``Checkpointer._begin_run``."""
        world = self.world
        world.say("run %d on %s, from %s", self.number, ", ".join(place.name for place in self.places), self.chosen)
        for rank in self.ranks:
            rank.begin(None, self.chosen or max(rank.held(), default=None))
        self._tell(None)

    def _tell(self, floor: SnapshotId | None) -> None:
        peers = [Peer(place.name, ranks, place.rack) for place, ranks in self.placement.items()]
        roster = Roster(
            self.run, self.world.taste.protect, tuple(sorted(peers, key=lambda peer: min(peer.ranks))),
            self.world.taste.slots, floor, self.relied.parities if floor is not None else (),
        )  # fmt: skip
        self.world.truth.assembled(roster, self.places, floor)
        for rank in self.ranks:
            rank.protect(roster)

    def poll(self) -> None:
        """Something that the running stage waits for may have come."""
        if self.dying:
            return
        if self.phase is Phase.FINDING and all(rank.rostered for rank in self.ranks):
            self._bring()
        elif self.phase is Phase.JOINING and all(rank.rostered for rank in self.ranks):
            self.phase = Phase.PROTECTING
            self.world.at(self.world.now + 2 * self.world.pace.timeout_s, self._unprotected)
        if self.phase is Phase.PROTECTING:
            assert self.chosen is not None
            for rank in self.ranks:
                if find(rank.states, self.chosen) is None:
                    assert rank.memory not in self.memories, f"rank {rank.number} does not know of {self.chosen}"
                    self.world.end_job()  # its memory was removed
                    return
            if all(rank.held()[self.chosen] for rank in self.ranks):
                self._mark()

    # -- bringing ------------------------------------------------------------------------------------------------------

    def _bring(self) -> None:
        self.phase = Phase.BRINGING
        if self.chosen is None:
            self._train()
            return
        if [place.memory for place in self.places] != self.memories:  # one was removed meanwhile
            self.world.end_job()
            return
        begun = [
            (rank, rank.agent, rank.memory.slot_for(rank.number, self.chosen))
            for rank, source in zip(self.ranks, self.plan.sources, strict=True)
            if not (isinstance(source, Held) and self._here(rank, self.chosen))
        ]
        self.outstanding = len(begun)
        for rank, agent, slot in begun:
            self.world.after(self.world.pace.pull_s, self._brought, rank, agent, slot)
        if not begun:
            self._join()

    def _here(self, rank: Rank, id: SnapshotId) -> bool:
        return any((held.id, held.rank, held.agent) == (id, rank.number, rank.memory.name) for held in self.found)

    def _brought(self, rank: Rank, agent: Agent, slot: SlotMemory) -> None:
        """An image has been fetched, or rebuilt; or that was not possible, and the job ends."""
        if self.dying:
            return
        assert self.chosen is not None
        others = [place.agent for place in self.places if place.agent is not None]
        there = [other.memory for other in others if self.world.linked(agent, other)]
        page = None if agent.dead else self.world.truth.obtain(self.chosen, rank.number, there)
        if page is None:
            excuse = agent.dead or not set(self.memories) <= set(there)
            assert excuse, f"the image of {self.chosen} of rank {rank.number} cannot be had, although it was planned"
            self.world.say("rank %d: cannot have its image", rank.number)
            self.world.end_job()
            return
        slot.page, slot.word, slot.content, slot.filling = page, page.nonce, page.content, 0
        rank.memory.touch()
        self.world.say("rank %d: has its image of %s", rank.number, self.chosen)
        self.outstanding -= 1
        if not self.outstanding:
            self._join()

    def _join(self) -> None:
        """Every rank has its image, and applies it."""
        assert self.chosen is not None
        self.phase = Phase.JOINING
        for rank in self.ranks:
            if not rank.memory.lost:
                self.world.truth.applied(rank, self.chosen)
            rank.refresh()
            for newer in [id for id in rank.held() if id > self.chosen]:
                rank.discard(newer, "the job goes back")
            rank.begin(self.chosen, self.chosen)
        if all(rank.alone for rank in self.ranks):
            self.world.truth.restored(self.chosen)
            self._train()
        else:
            self._tell(self.chosen)

    def _mark(self) -> None:
        self.phase = Phase.MARKING
        self.outstanding = len(self.ranks)
        for rank in self.ranks:
            self.world.after(self.world.pace.message_s, self._marked, rank)

    def _marked(self, rank: Rank) -> None:
        if self.dying:
            return
        assert self.chosen is not None
        rank.mark_complete(self.chosen)
        self.outstanding -= 1
        if not self.outstanding:
            for rank in self.ranks:
                rank.floor_stands = True
            self.world.truth.restored(self.chosen)
            self._train()

    def _unprotected(self) -> None:
        """The floor cannot be protected in time; training goes on all the same."""
        if self.phase is Phase.PROTECTING and not self.dying:
            self.world.say("run %d: %s is not protected again", self.number, self.chosen)
            if self.chosen is not None and self.relied.id not in (None, self.chosen):
                for rank in self.ranks:
                    rank.floor = self.relied.id
                    rank.discard(self.chosen, "it cannot be protected")
            self._train()

    # -- training ------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        self.phase = Phase.TRAINING
        self.world.say("run %d trains from %s", self.number, self.chosen)
        self._next_step()

    def arrived(self, rank: Rank) -> None:
        """That rank has ended its step; the next one's gradients need all of them."""
        self.outstanding -= 1
        if not self.outstanding:
            self._next_step()

    def _next_step(self) -> None:
        self.outstanding = len(self.ranks)
        for rank in self.ranks:
            self.world.after(self.world.pace.compute_s, rank.fence)

    def beat(self, number: int) -> Beat:
        """The beat of that number."""
        while len(self.beats) <= number:
            self.beats.append(Beat(self.size))
        return self.beats[number]

    def beat_over(self, beat: Beat) -> None:
        """All ranks have begun it; each hears of the result in its time."""
        for rank in self.ranks:
            at = beat.told_at[rank.number] = self.world.soon(self.world.pace.message_s)
            if rank.waiting:
                self.world.at(at, rank.told, rank.step)
