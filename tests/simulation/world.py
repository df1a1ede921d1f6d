"""Many nodes in one process: virtual time, a network that loses, doubles, delays and overtakes, and what befalls processes.

A schedule is a taste (shape of the job, pace of everything, all drawn from its seed) and a list of faults, each at its
number of events. Any part of the faults is a schedule too, so a failing one is cut down before it is shown.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from holdfast.snapshot.record import SnapshotId

from .agents import Agent, Stream
from .jobs import Job, Phase
from .memory import Memory
from .trainers import Rank
from .truth import Truth


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take, in seconds: somewhere between nothing and twice that, and now and then much longer."""

    compute_s: float
    copy_s: float
    checksum_s: float
    message_s: float
    pull_s: float
    beat_s: float
    timeout_s: float
    lost: float = 0.0
    doubled: float = 0.0
    long: float = 0.0


@dataclass(frozen=True, slots=True)
class Taste:
    """What is the same throughout one schedule. *ranks*: of each node; *racks*: so many."""

    seed: int
    ranks: tuple[int, ...]
    protect: str
    slots: int
    every: int
    racks: int
    pace: Pace
    events: int


@dataclass(frozen=True, slots=True)
class Fault:
    """*kind* befalls what *where* chooses, after the event of number *at*; *size* says how badly."""

    at: int
    kind: str
    where: int
    size: float


@dataclass(slots=True, eq=False)
class Place:
    """Where a node stands: this one, or what replaces it. *slow*: so many times."""

    index: int
    name: str
    rack: str
    memory: Memory
    agent: Agent | None = None
    slow: float = 1.0
    gone: bool = False
    lives: int = 1


SLOWEST_S = 3.0  # what takes longer, real streams and deadlines give up
CALM = Pace(0.1, 0.01, 0.005, 0.001, 0.01, 1.0, 2.0)
PATIENCE_S = 15.0  # virtual: without faults, a snapshot is protected by then; the worst of 100,000 schedules took 5
EVENTS_LIMIT = 60_000


class World:
    """One job on its nodes."""

    def __init__(
        self, taste: Taste, faults: tuple[Fault, ...] = (), *, tell: bool = False, checked: bool = True
    ) -> None:
        """*tell*: write down what happens. *checked*: all that must hold is looked at after every event, not only at some."""
        self.taste = taste
        self.pace = taste.pace
        self.now = 0.0
        self.number = 0  # of events so far
        self.rng = random.Random(taste.seed)
        self.size = sum(taste.ranks)
        self.log: list[str] | None = [] if tell else None
        self.memories: list[Memory] = []
        self.agents: dict[str, Agent] = {}
        self.cuts: set[frozenset[int]] = set()
        self.checked = checked
        self.tally: Counter[tuple[str, SnapshotId]] = Counter()  # of control messages, by kind and snapshot
        self.truth = Truth(self)
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._nonce = 1
        self._faults = sorted(faults, key=lambda fault: fault.at, reverse=True)
        self.calm_since: float | None = None
        self.places: list[Place] = [
            Place(i, f"n{i}", f"r{i % taste.racks}", self._memory(f"n{i}")) for i in range(len(taste.ranks))
        ]
        self.runs = 0
        self.job: Job | None = None
        first, self.ranks_of = 0, dict[Place, tuple[int, ...]]()
        for place, count in zip(self.places, taste.ranks, strict=True):
            self.ranks_of[place] = tuple(range(first, first + count))
            first += count

    # -- time ----------------------------------------------------------------------------------------------------------

    def at(self, time_s: float, work: Callable[..., None], *what: object) -> None:
        """Let *work* happen then."""
        self._sequence += 1
        heapq.heappush(self._queue, (time_s, self._sequence, work, what))

    def soon(self, typical_s: float) -> float:
        """When something is over that takes about so long."""
        drawn = self.rng.random()
        return self.now + min(2 * typical_s * drawn * (20 if drawn < self.pace.long else 1), SLOWEST_S)

    def after(self, typical_s: float, work: Callable[..., None], *what: object) -> None:
        """Let *work* happen in about that time."""
        self.at(self.soon(typical_s), work, *what)

    def nonce(self) -> int:
        self._nonce += 1
        return self._nonce

    def say(self, text: str, *what: object) -> None:
        """One line of the transcript."""
        if self.log is not None:
            self.log.append(f"{self.number:5} {self.now:9.4f} s  {text % what}")

    def run(self) -> None:
        """The whole schedule: faults, then calm until a snapshot is protected. AssertionError if something does not hold."""
        self.begin()
        while self.calm_since is None or not self._recovered():
            if self.calm_since is None and not self._faults and self.number >= self.taste.events:
                self._calm()
            while self._faults and self._faults[-1].at <= self.number:
                self._befall(self._faults.pop())
            self.step()
            assert self.number < EVENTS_LIMIT, "this never ends"

    def begin(self) -> None:
        """The job's first life begins."""
        self._start_job()

    def step(self) -> None:
        """The next event."""
        assert self._queue, "nothing goes on any more"
        self.now, _, work, what = heapq.heappop(self._queue)
        self.number += 1
        work(*what)
        if self.checked and self.truth.watch.changed:
            self.truth.check()

    def _recovered(self) -> bool:
        assert self.calm_since is not None
        promise, began = self.truth.promise, self.truth.begun_at
        if promise is not None and began.get(promise.id, -1.0) > self.calm_since:
            job = self.job
            return job is not None and min(rank.pulse.known for rank in job.ranks) >= promise.id.step
        late = self.now - self.calm_since
        assert late < PATIENCE_S, f"no snapshot has been protected within {PATIENCE_S:g} s without faults"
        return False

    def _calm(self) -> None:
        """No more faults."""
        self.say("from here on all is well")
        self.calm_since = self.now
        self.cuts.clear()
        self.pace = replace(CALM, timeout_s=self.taste.pace.timeout_s)
        for place in self.places:
            place.slow = 1.0
        for rank in self.job.ranks if self.job else []:
            rank.able = True

    # -- the network ---------------------------------------------------------------------------------------------------

    def fate(self) -> tuple[bool, bool]:
        """Of a message: whether it is lost; and if not, whether its answer arrives."""
        lost = self.pace.lost
        return (self.rng.random() < lost, self.rng.random() >= lost) if lost else (False, True)

    def doubles(self) -> bool:
        """Whether a message arrives again, much later."""
        return self.pace.doubled > 0 and self.rng.random() < self.pace.doubled

    def linked(self, one: Agent, other: Agent) -> bool:
        return not self.cuts or frozenset((one.place.index, other.place.index)) not in self.cuts

    def reach(self, one: Agent, name: str) -> Agent | None:
        """The agent of that name, if it can be reached."""
        other = self.agents.get(name)
        return other if other is not None and self.linked(one, other) else None

    def up(self, stream: Stream, hear: Callable[..., None], *what: object) -> None:
        """Trainer to agent, in order. What a dead trainer said last still arrives."""
        stream.up_at = max(stream.up_at, self.soon(self.pace.message_s * 0.2))
        stream.pending.append((hear, what))
        self.at(stream.up_at, self._arrive, stream)

    @staticmethod
    def _arrive(stream: Stream) -> None:
        session = stream.agent.sessions.get(stream.rank.number)
        if not stream.agent.dead and session is not None and session.stream is stream:
            stream.agent.hear(session)

    def down(self, stream: Stream, hear: Callable[..., None], *what: object) -> None:
        """Agent to trainer, in order."""
        stream.down_at = max(stream.down_at, self.soon(self.pace.message_s * 0.2))
        self.at(stream.down_at, self._return, stream, hear, what)

    @staticmethod
    def _return(stream: Stream, hear: Callable[..., None], what: tuple[object, ...]) -> None:
        if not stream.rank.dead and stream.rank.stream is stream:
            hear(*what)

    # -- processes -----------------------------------------------------------------------------------------------------

    def _memory(self, name: str) -> Memory:
        memory = Memory(name, len(self.memories), self.truth.watch)
        self.memories.append(memory)
        return memory

    def agent_at(self, place: Place) -> Agent:
        """The agent that runs there, started if there is none."""
        if place.agent is None:
            place.agent = self.agents[place.name] = Agent(self, place, place.memory, place.name)
        return place.agent

    def _start_job(self) -> None:
        """All trainers start, where the nodes are now; nodes that are gone are replaced by empty ones."""
        for place in self.places:
            if place.gone and self.ranks_of[place]:
                place.gone, place.lives = False, place.lives + 1
                place.name = f"n{place.index}.{place.lives}"
                place.memory = self._memory(place.name)
        self.runs += 1
        placement = {place: ranks for place, ranks in self.ranks_of.items() if ranks}
        self.job = Job(self, placement, self.runs)
        self.job.begin()

    def end_job(self) -> None:
        """All trainers end, one after the other, and start again."""
        job = self.job
        if job is None or job.dying:
            return
        job.dying = True
        for rank in job.ranks:
            self.after(self.pace.message_s, self._end_rank, rank)

    def _end_rank(self, rank: Rank) -> None:
        if rank.dead:
            return
        self.say("rank %d: ends", rank.number)
        rank.dead = True
        if all(other.dead for other in rank.job.ranks):
            self.after(self.pace.compute_s, self._start_job)

    def _end_agent(self, place: Place) -> None:
        agent, place.agent = place.agent, None
        if agent is None:
            return
        agent.dead = True
        self.agents.pop(agent.name, None)
        for rank in self.job.ranks if self.job else []:
            if rank.agent is agent:
                rank.lose()
                if self.job is not None and self.job.phase is Phase.BRINGING:
                    self.end_job()

    def _start_agent(self, place: Place) -> None:
        """Somebody starts it again, and its trainers come back."""
        if not place.gone:
            agent = self.agent_at(place)
            self.say("%s: starts", agent.name)
            job = self.job
            for rank in job.ranks if job else []:
                if job and not rank.dead and rank.stream is None and rank.number in job.placement.get(place, ()):
                    self.after(self.pace.message_s, self._reattach, rank, agent)

    def _reattach(self, rank: Rank, agent: Agent) -> None:
        if not rank.dead and rank.stream is None and not agent.dead:
            self.say("rank %d: attaches again", rank.number)
            rank.attach(agent)

    # -- faults --------------------------------------------------------------------------------------------------------

    def _befall(self, fault: Fault) -> None:
        getattr(self, f"on_{fault.kind}")(fault)

    def _place(self, fault: Fault) -> Place:
        return self.places[fault.where % len(self.places)]

    def _rank(self, fault: Fault) -> Rank | None:
        ranks = self.job.ranks if self.job is not None else []
        rank = ranks[fault.where % len(ranks)] if ranks else None
        return rank if rank is not None and not rank.dead else None

    def on_agent(self, fault: Fault) -> None:
        """An agent ends, and is started again; its memory stays."""
        place = self._place(fault)
        if place.agent is not None:
            self.say("FAULT %s: the agent ends", place.name)
            self._end_agent(place)
            self.at(self.now + fault.size, self._start_agent, place)

    def on_wipe(self, fault: Fault) -> None:
        """An agent ends, and its memory is removed; another starts with none. Its trainers go on."""
        place = self._place(fault)
        if place.agent is not None:
            self.say("FAULT %s: the agent ends, and its memory is gone", place.name)
            self._end_agent(place)
            place.memory.lost = True
            self.truth.watch.changed = True
            place.memory = self._memory(place.name)
            self.at(self.now + fault.size, self._start_agent, place)

    def on_stream(self, fault: Fault) -> None:
        """The connection of a trainer with its agent breaks."""
        rank = self._rank(fault)
        if rank is not None and rank.stream is not None:
            self.say("FAULT rank %d: its stream breaks", rank.number)
            rank.lose()
            self.at(self.now + fault.size, self._reattach, rank, rank.agent)

    def on_trainer(self, fault: Fault) -> None:
        """A trainer dies, and with it the job."""
        rank = self._rank(fault)
        if rank is not None:
            self.say("FAULT rank %d: dies", rank.number)
            self.end_job()
            self._end_rank(rank)
            self._shuffle(fault)

    def on_node(self, fault: Fault) -> None:
        """A node dies with all it has, and with it the job."""
        place = self._place(fault)
        if place.gone or not self.ranks_of[place]:
            return
        self.say("FAULT %s: the node dies", place.name)
        self._end_agent(place)
        place.memory.lost = place.gone = True
        self.truth.watch.changed = True
        self.end_job()
        for rank in self.job.ranks if self.job else []:
            if rank.memory is place.memory:
                self._end_rank(rank)
        self._shuffle(fault)

    def _shuffle(self, fault: Fault) -> None:
        """The next life of the job may have its ranks elsewhere."""
        if fault.size < 0.5:
            return
        order = random.Random(fault.size)
        if fault.size > 0.95 and sum(map(bool, self.ranks_of.values())) > 2:  # one node fewer, its ranks go to another
            place = self._place(fault)
            other = next(p for p, ranks in self.ranks_of.items() if ranks and p is not place)
            self.ranks_of[other], self.ranks_of[place] = self.ranks_of[other] + self.ranks_of[place], ()
            self._end_agent(place)
            place.memory.lost = place.gone = True
            return
        there = [place for place, ranks in self.ranks_of.items() if ranks]
        ranks = [self.ranks_of[place] for place in there]
        order.shuffle(ranks)
        self.ranks_of |= zip(there, ranks, strict=True)

    def on_slow(self, fault: Fault) -> None:
        """A node becomes slow, or is no longer."""
        place = self._place(fault)
        place.slow = 1.0 if place.slow > 1 else 3 + 30 * fault.size
        self.say("FAULT %s: slow %.0f times", place.name, place.slow)

    def on_cut(self, fault: Fault) -> None:
        """Some agents cannot reach the others any more, for a while."""
        apart = {i for i in range(len(self.places)) if (fault.where >> i) & 1}
        cuts = {frozenset((i, j)) for i in apart for j in range(len(self.places)) if j not in apart}
        if cuts:
            self.say("FAULT %s: cut off", ", ".join(self.places[i].name for i in sorted(apart)))
            self.cuts |= cuts
            self.at(self.now + 3 * fault.size, self._heal, cuts)

    def _heal(self, cuts: set[frozenset[int]]) -> None:
        self.say("some agents are reached again")
        self.cuts -= cuts

    def on_torn(self, fault: Fault) -> None:
        """What a rank copies, now or next, is changed meanwhile."""
        rank = self._rank(fault)
        if rank is not None:
            self.say("FAULT rank %d: a torn copy", rank.number)
            if rank.copy is not None:
                rank.copy.touched = True
            else:
                rank.torn_next = True

    def on_fails(self, fault: Fault) -> None:
        """An agent cannot checksum the next image."""
        place = self._place(fault)
        if place.agent is not None:
            place.agent.fails_next = True

    def on_unable(self, fault: Fault) -> None:
        """A rank objects to snapshots, or does no longer."""
        rank = self._rank(fault)
        if rank is not None:
            rank.able = not rank.able
