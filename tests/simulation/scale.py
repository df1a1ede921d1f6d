"""How much is said for one snapshot as jobs grow: counted in a calm schedule, message by message.

Messages are those of ``agents``: calls between agents (an offer or a grant, each with its answer) and words between an
agent and its trainer. What is said once per run (rosters, questions for offers) and the beat, which is one all-reduce of
a handful of integers, are not among them. Bytes are those of the real messages of ``wire.proto``, for an image of one block.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from holdfast.agent import wire_pb2 as wire
from holdfast.snapshot.record import RECORD_BYTES

from .world import CALM, Taste, World

PROTECT: Final = "6+2"
GROUP_NODES: Final = 8
STEPS: Final = 6
_FIRST: Final = 2  # the first snapshot of a run is like no other
_EVENTS_LIMIT: Final = 1_000  # for each agent


@dataclass(frozen=True, slots=True)
class Load:
    """What protecting took, for each node and snapshot.

    Attributes:
        agents: how many there were.
        messages: how often each kind of message was sent.
        call_bytes: of the calls between agents, requests and answers.
    """

    agents: int
    messages: Mapping[str, float]
    call_bytes: float

    @property
    def calls(self) -> float:
        """Calls between agents."""
        return self.messages["offer"] + self.messages["grant"]


def control_load(agents: int, *, steps: int = STEPS, seed: int = 1) -> Load:
    """Protect *steps* snapshots of *agents* nodes of one rank each, in groups of eight where they divide evenly.

    Deterministic. What must hold is looked at whenever a snapshot becomes complete, not after every event: that takes time
    that grows with the square of the agents.
    """
    racks = max(GROUP_NODES, agents // GROUP_NODES)
    taste = Taste(seed=seed, ranks=(1,) * agents, protect=PROTECT, slots=2, every=1, racks=racks, pace=CALM, events=0)
    world = World(taste, checked=False)
    world.begin()
    while world.truth.promise is None or world.truth.promise.id.step < steps:
        world.step()
        assert world.number < _EVENTS_LIMIT * agents, "this never ends"
    snapshots = {id for _, id in world.tally if _FIRST <= id.step < steps}
    kinds = {kind for kind, _ in world.tally}
    messages = {
        kind: sum(world.tally[kind, id] for id in snapshots) / agents / len(snapshots) for kind in sorted(kinds)
    }
    sizes = _call_bytes(max(world.agents, key=len))
    return Load(agents, messages, sum(messages[kind] * nbytes for kind, nbytes in sizes.items()))


def _call_bytes(agent: str) -> dict[str, int]:
    """The bytes of each kind of call with its answer, where *agent* asks."""
    id = wire.Id(run=uuid.UUID(int=1).hex, generation=1, step=5)
    offer = wire.Offer(job="job", agent=agent, rank=1, record=bytes(RECORD_BYTES), checks=bytes(4))
    grant = wire.GrantRequest(
        job="job", agent=agent, id=id, purpose="protect", image=wire.ImageSource(rank=1, checks_crc=1 << 31),
        ranges=[wire.Range(nbytes=1 << 16)],
    )  # fmt: skip
    answer = wire.GrantReply(token=bytes(32), port=1 << 15)
    return {"offer": offer.ByteSize() + wire.OfferReply().ByteSize(), "grant": grant.ByteSize() + answer.ByteSize()}
