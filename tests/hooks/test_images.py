"""Which rank looks at which image, and what becomes of windows whose agent is gone."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
from holdfast.agent import wire_pb2 as wire
from holdfast.errors import AgentError, AgentUnreachable, Corrupt
from holdfast.hooks.found import Found
from holdfast.hooks.images import Agent, Images, Windows
from holdfast.snapshot.arena import Window
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import Held, plan

ID = SnapshotId(1, 5, "ab" * 16)


def held(rank: int, agent: str, world: int = 4) -> Held:
    return Held(ID, rank, world, -1, agent, f"/{agent}/{rank}", 4096)


def images(found: Found, here: str, agent: Agent | None = None, windows: Windows | None = None) -> Images:
    return Images(plan(found.images), found, here, agent, windows, {}, frozenset(), 1.0)


def test_each_image_is_looked_at_on_a_node_that_has_it() -> None:
    copies = [held(0, "a"), held(1, "b"), held(2, "b"), held(3, "gone"), held(3, "c")]
    found = Found(tuple(copies), (), agents=("c", "b", "a", "b"))
    opened = images(found, "b")
    assert [opened.nearest(rank) for rank in range(4)] == [2, 3, 1, 0]
    nobody = images(Found(tuple(held(rank, "gone") for rank in range(4)), (), agents=("a", "b")), "a")
    assert [nobody.nearest(rank) for rank in range(4)] == [0, 1, 0, 1]


class _Agent:
    """Lays one window out, and is gone then."""

    def __init__(self, folder: Path, layout: bytes = b"", image_bytes: int = 0) -> None:
        self.window = Window.create(folder, 0, 0, 4096)
        self.asked = 0
        self.away = 0  # so often it does not answer
        self.said = wire.Description(layout=layout, image_bytes=image_bytes)

    def read_ranges(self, request: wire.ReadRequest, timeout_s: float) -> wire.ReadReply:
        self.asked += 1
        if self.away:
            self.away -= 1
            raise AgentUnreachable("no agent answers")
        if not request.ranges:
            raise AgentError("rank 0 is not attached to this agent")
        return wire.ReadReply(path=self.window.path)

    def describe_image(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.Description:
        return self.said


def test_windows_whose_agent_is_gone_are_no_reason_to_fail(tmp_path: Path) -> None:
    """All ranks have what they read by then; if one of them failed now, the others would wait for it."""
    agent = _Agent(tmp_path)
    windows = Windows(cast("Agent", agent), 0, 1.0)
    windows.read(wire.MaterialiseRequest(), [(0, 64)], 0)
    windows.close()
    windows.close()
    assert agent.asked == 2


def test_an_agent_that_ends_between_two_windows_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started anew meanwhile, and this rank attached to it; for so long, and no longer."""
    monkeypatch.setattr("holdfast.hooks.images._PAUSES_S", (0.0, 0.0))
    agent = _Agent(tmp_path)
    windows = Windows(cast("Agent", agent), 0, 1.0)
    agent.away = 2
    assert windows.read(wire.MaterialiseRequest(), [(0, 64)], 0).nbytes == 64
    assert agent.asked == 3
    agent.away = 3
    with pytest.raises(AgentUnreachable):
        windows.read(wire.MaterialiseRequest(), [(0, 64)], 0)


def test_a_layout_that_is_longer_than_its_image(tmp_path: Path) -> None:
    text = Layout.of(1, [Slice("a", "uint8", (8192,), (0,), (8192,))]).to_text()
    agent = cast("Agent", _Agent(tmp_path, text, 4096))
    found = Found(tuple(held(rank, "a") for rank in range(4)), (), addresses={"a": "a:1"}, agents=("b",))
    with pytest.raises(Corrupt, match="longer than its image"):
        images(found, "b", agent, Windows(agent, 0, 1.0)).ranged(0)
