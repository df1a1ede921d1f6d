"""Calls between agents: who is refused, who cannot be reached, and how that is told."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from holdfast.agent import peers as module
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.peers import Peers
from holdfast.agent.trust import Trust
from holdfast.errors import AgentMismatch, AgentUnreachable, DeadlinePassed, HoldfastError, SnapshotUnknown
from holdfast.ops import certs
from holdfast.tests.hooks.nodes import Node


def ask(peers: Peers, work: Callable[[Peers], Awaitable[object]]) -> object:
    """The answer, and all is closed."""

    async def run() -> object:
        try:
            return await work(peers)
        finally:
            await peers.close()

    return asyncio.run(run())


def listen_of(agent: subprocess.Popen[str]) -> str:
    words: str = agent.ready  # type: ignore[attr-defined]
    return dict(word.partition("=")[::2] for word in words.split())["listen"]


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[Node, str]]:
    """An agent without certificates, and its address."""
    node = Node()
    address = listen_of(node.start("--idle-exit", "never", "--log-format", "json"))
    yield node, address
    node.remove()


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trust]:
    """Certificates of nodes "a" and "b" of one CA, and of "stranger" of another."""
    found: dict[str, Trust] = {}
    for ca, names in (("ours", ["a", "b"]), ("theirs", ["stranger"])):
        folder = tmp_path_factory.mktemp(ca)
        certs.make(folder, [certs.Node(name) for name in names], datetime.now(UTC))
        found |= {n: Trust(folder / "ca.pem", folder / f"{n}.pem", folder / f"{n}.key") for n in names}
    return found


@pytest.fixture(scope="module")
def secured(trust: dict[str, Trust]) -> Iterator[tuple[Node, str]]:
    """An agent with certificate "a", and its address."""
    node, mine = Node(), trust["a"]
    options = ["--tls-ca", str(mine.ca), "--tls-cert", str(mine.cert), "--tls-key", str(mine.key)]
    address = listen_of(node.start("--idle-exit", "never", *options))
    yield node, address
    node.remove()


CALLS: dict[str, Callable[[Peers, str], Awaitable[object]]] = {
    "offer": lambda peers, address: peers.offer(address, wire.Offer(rank=1)),
    "offers": lambda peers, address: peers.offers(address),
    "grant": lambda peers, address: peers.grant(address, wire.GrantRequest(image=wire.ImageSource(rank=0))),
    "manifest": lambda peers, address: peers.manifest(address, wire.ManifestRequest(image=wire.ImageSource(rank=0))),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_jobs_agent_is_refused_and_that_is_logged(plain: tuple[Node, str], call: str) -> None:
    node, address = plain
    with pytest.raises(AgentMismatch, match=f"serves job '{node.job}', not 'another'"):
        ask(Peers("another", "stranger", None), lambda peers: CALLS[call](peers, address))
    log = node.agents[0].log  # type: ignore[attr-defined]
    log.seek(0)
    said = [json.loads(line)["message"] for line in log.read().splitlines()]
    assert f"refused: agent 'stranger' of job 'another' asks, and this one serves '{node.job}'" in said


def test_an_agent_of_the_job_is_answered(plain: tuple[Node, str]) -> None:
    node, address = plain
    peers = Peers(node.job, "b", None)

    async def work(peers: Peers) -> wire.OfferList:
        assert (await peers.offers(address)).offers == []
        with pytest.raises(SnapshotUnknown):
            await peers.manifest(address, wire.ManifestRequest(image=wire.ImageSource(rank=0)))
        return await peers.offers(address)

    ask(peers, work)
    assert peers.calls == 3
    assert 3 * len(node.job) < peers.call_bytes < 1000


@pytest.mark.parametrize("who", [None, "stranger"])
def test_without_our_ca_nobody_is_heard(secured: tuple[Node, str], trust: dict[str, Trust], who: str | None) -> None:
    node, address = secured
    stranger = Peers(node.job, "b", trust[who] if who else None)
    with pytest.raises(AgentUnreachable):
        ask(stranger, lambda peers: peers.offers(address))
    assert ask(Peers(node.job, "b", trust["b"]), lambda peers: peers.offers(address)) == wire.OfferList()


def test_an_agent_without_certificate_is_not_taken_for_ours(plain: tuple[Node, str], trust: dict[str, Trust]) -> None:
    node, address = plain
    with pytest.raises(AgentUnreachable):
        ask(Peers(node.job, "b", trust["b"]), lambda peers: peers.offers(address))


def test_nobody_there(plain: tuple[Node, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(AgentUnreachable, match=f"Offers of the agent at 127.0.0.1:{port}"):
        ask(Peers("job", "b", None), lambda peers: peers.offers(f"127.0.0.1:{port}"))


def test_whoever_does_not_answer_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALL_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises((DeadlinePassed, AgentUnreachable)) as caught:
            ask(Peers("job", "b", None), lambda peers: peers.offers(address))
    assert "no answer within 0.2 s" in str(caught.value) or "Offers" in str(caught.value)


def test_an_agent_that_comes_back_is_found_again(tmp_path: Path) -> None:
    """The same port, another process: the connection is made anew, without waiting out a long back-off."""
    node = Node()
    first = node.start("--idle-exit", "never")
    address = listen_of(first)
    peers = Peers(node.job, "b", None)

    async def work(peers: Peers) -> None:
        await peers.offers(address)
        first.kill()
        await asyncio.to_thread(node.ended, first)
        with pytest.raises(HoldfastError):
            await peers.offers(address)
        node.agents.clear()
        await asyncio.to_thread(node.start, "--idle-exit", "never", "--listen", address)
        for _ in range(600):
            try:
                await peers.offers(address)
            except AgentUnreachable:
                await asyncio.sleep(0.1)
            else:
                return
        raise AssertionError("it was not found again")

    try:
        ask(peers, work)
    finally:
        node.remove()
