"""Bulk streams over real sockets on loopback: what arrives, and what happens with everything that should not."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from holdfast.agent import bulk
from holdfast.agent.bulk import (
    TOKEN_BYTES,
    TURN_BYTES,
    BulkServer,
    Grants,
    Header,
    Limits,
    Pace,
    Piece,
    Status,
    Stream,
)
from holdfast.agent.trust import Trust
from holdfast.errors import (
    AgentUnreachable,
    AgentUntrusted,
    ConfigError,
    DeadlinePassed,
    HoldfastError,
    SourceGone,
    StreamBroken,
)
from holdfast.ops.certs import Node, make

HOST = "127.0.0.1"
WAIT_S = 120.0
SHORT_S = 0.05
MIB = 1 << 20

pytestmark = pytest.mark.timeout(60)
MakeServer = Callable[..., BulkServer]


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def start() -> Iterator[MakeServer]:
    """Starts servers on loopback; no thread of theirs is left after the test."""
    servers: list[BulkServer] = []

    def one(**options: Any) -> BulkServer:
        options = {"tls": None, **options}
        servers.append(BulkServer(HOST, 0, **options))
        return servers[-1]

    yield one
    for server in servers:
        server.close(WAIT_S)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("bulk-")]


def noise(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def pieces(*contents: bytes) -> list[Piece]:
    return [Piece(len(content), lambda content=content: memoryview(content)) for content in contents]  # type: ignore[misc]


def stream(server: BulkServer, token: bytes, **options: Any) -> Stream:
    options = {"tls": None, "deadline_s": WAIT_S, "peer": "n1", **options}
    return Stream(HOST, server.port, token, **options)


def fetch(server: BulkServer, token: bytes, sizes: Sequence[int], **options: Any) -> list[bytes]:
    buffers = [bytearray(size) for size in sizes]
    with stream(server, token, **options) as receiving:
        for buffer in buffers:
            receiving.receive(memoryview(buffer))
    return [bytes(buffer) for buffer in buffers]


def serves(server: BulkServer, **options: Any) -> bool:
    """Whether a stream that is all right still goes through."""
    contents = [noise(1000), b"", noise(70_000)]
    token = server.grant(pieces(*contents), purpose="a test", peer="n2")
    return fetch(server, token, [len(content) for content in contents], **options) == contents


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


# -- what should arrive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0, 5, 0], [7, 3 * MIB + 1, 0, 1], [9 * MIB], [100] * 300])
def test_pieces_arrive_in_order(start: MakeServer, sizes: list[int]) -> None:
    server = start()
    contents = [noise(size, seed) for seed, size in enumerate(sizes)]
    token = server.grant(pieces(*contents), purpose="a test", peer="n2")
    assert len(token) == TOKEN_BYTES
    assert fetch(server, token, sizes) == contents
    until(lambda: server.report().streams == 1)
    assert server.report().nbytes == sum(sizes)
    assert server.report().refused == {}


def test_from_shared_memory_into_shared_memory(start: MakeServer) -> None:
    nbytes = 5 * MIB + mmap.PAGESIZE
    server = start()
    with closing(mmap.mmap(-1, nbytes)) as source, closing(mmap.mmap(-1, nbytes)) as target:
        source[:] = noise(nbytes)
        floats = Piece(4096, lambda: np.frombuffer(source, np.float32, 1024).data)
        rest = Piece(nbytes - 4096, lambda: memoryview(source)[4096:])
        token = server.grant([floats, rest], purpose="a test", peer="n2")
        with stream(server, token) as receiving, memoryview(target) as whole:
            receiving.receive(np.frombuffer(whole, np.int64, 512).data)
            with whole[4096:] as part:
                receiving.receive(part)
        assert target[:] == source[:]
        server.close()  # its thread may hold a view until then, and a mapping with views cannot be closed


def test_many_streams_at_once(start: MakeServer) -> None:
    server = start()
    contents = [noise(MIB + seed, seed) for seed in range(16)]
    tokens = [server.grant(pieces(content), purpose="a test", peer="n2") for content in contents]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda token, content: fetch(server, token, [len(content)]), tokens, contents)
        assert [content for (content,) in found] == contents


def test_it_is_not_the_streams_business_what_the_bytes_are(start: MakeServer) -> None:
    """They may change until they are sent, and nobody here notices: the caller has their checksums."""
    source = bytearray(b"before")
    server = start()
    token = server.grant([Piece(6, lambda: memoryview(source))], purpose="a test", peer="n2")
    source[:] = b"after!"
    assert fetch(server, token, [6]) == [b"after!"]


def test_ipv6(start: MakeServer) -> None:
    try:
        server = BulkServer("[::1]", 0, None)
    except ConfigError as error:
        pytest.skip(str(error))
    token = server.grant(pieces(b"abc"), purpose="a test", peer="n2")
    into = bytearray(3)
    with closing(server), Stream("::1", server.port, token, peer="n1", tls=None, deadline_s=WAIT_S) as receiving:
        receiving.receive(memoryview(into))
    assert into == b"abc"


def test_the_header_in_the_docs_is_real() -> None:
    text = (Path(bulk.__file__).parents[1] / "docs" / "bulk.md").read_text("utf-8")
    example = text.partition("Piece 0, 4 MiB: `")[2].partition("`")[0]
    assert bytes.fromhex(example) == Header(0, 4 * MIB, Status.SENT).encode()


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_is_good_once(start: MakeServer) -> None:
    server = start()
    token = server.grant(pieces(b"abc"), purpose="a test", peer="n2")
    assert fetch(server, token, [3]) == [b"abc"]
    with pytest.raises(StreamBroken, match=r"n1 \(127\.0\.0\.1:\d+\) broke, waiting for the header of piece 0"):
        fetch(server, token, [3])
    assert server.report().refused == {"unknown": 1}


def test_a_token_expires(start: MakeServer) -> None:
    clock = Clock()
    server = start(clock=clock)
    early, late = (server.grant(pieces(b"abc"), purpose="a test", peer="n2") for _ in range(2))
    clock.now_s += 29.9
    assert fetch(server, early, [3]) == [b"abc"]
    clock.now_s += 0.1
    with pytest.raises(StreamBroken):
        fetch(server, late, [3])
    assert server.report().refused == {"unknown": 1}


def test_grants_are_bounded_and_the_oldest_gives_way() -> None:
    grants = Grants(life_s=30.0, most=3)
    tokens = [grants.add([], f"purpose {i}", "n2", now_s=float(i)) for i in range(5)]
    assert len(grants) == 3
    assert len(set(tokens)) == 5
    found = [grants.redeem(token, 10.0) for token in tokens]
    assert [grant and grant.purpose for grant in found] == [None, None, "purpose 2", "purpose 3", "purpose 4"]
    assert len(grants) == 0


def test_expired_grants_are_let_go() -> None:
    grants = Grants(life_s=30.0, most=3)
    grants.add([], "", "n2", now_s=0.0)
    grants.add([], "", "n2", now_s=40.0)
    assert len(grants) == 1


# -- anything else ----------------------------------------------------------------------------------------------------


def answer_to(server: BulkServer, said: bytes, *, ending: bool = False) -> bytes:
    """All that the server says to *said*, up to its closing the connection."""
    with socket.create_connection((HOST, server.port), WAIT_S) as sock:
        answer = b""
        with suppress(ConnectionError):  # reset: it closed without reading everything
            sock.sendall(said)
            if ending:
                with suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_WR)
            while got := sock.recv(4096):
                answer += got
        return answer


@pytest.mark.parametrize(
    ("said", "ending", "cause"),
    [
        (b"", True, "short"),
        (bytes(TOKEN_BYTES - 1), True, "short"),
        (bytes(TOKEN_BYTES), False, "unknown"),
        (bytes(TOKEN_BYTES), True, "unknown"),
        (b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n", False, "long"),
        (noise(100_000), False, "long"),
        (b"half", False, "slow"),
        (b"", False, "slow"),
    ],
)
def test_anything_but_a_token_gets_no_answer(start: MakeServer, said: bytes, ending: bool, cause: str) -> None:
    server = start(limits=Limits(token_s=SHORT_S if cause == "slow" else WAIT_S))
    assert answer_to(server, said, ending=ending) == b""
    assert server.report().refused == {cause: 1}
    assert serves(server)


def test_a_token_with_more_behind_it_is_refused_and_not_used_up(start: MakeServer) -> None:
    server = start()
    token = server.grant(pieces(b"abc"), purpose="a test", peer="n2")
    assert answer_to(server, token + b"x") == b""
    assert fetch(server, token, [3]) == [b"abc"]


def test_too_many_connections_are_closed_at_once(start: MakeServer) -> None:
    server = start(limits=Limits(token_s=WAIT_S, connections=2))
    with socket.create_connection((HOST, server.port)), socket.create_connection((HOST, server.port)):
        assert answer_to(server, b"") == b""
        assert server.report().refused == {"busy": 1}
        token = server.grant(pieces(b"abc"), purpose="a test", peer="n2")
        with pytest.raises(StreamBroken):
            fetch(server, token, [3])
    until(lambda: server.report().refused.get("short") == 2)
    assert fetch(server, token, [3]) == [b"abc"]


def test_the_same_refusal_is_said_once_a_minute(start: MakeServer, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    server = start(clock=clock)
    for _ in range(5):
        answer_to(server, bytes(TOKEN_BYTES))
    answer_to(server, b"", ending=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "bulk port, 127.0.0.1: a connection was refused: its token was used" in caplog.text
    clock.now_s += 60.0
    answer_to(server, bytes(TOKEN_BYTES))
    assert len(caplog.records) == 3
    assert server.report().refused == {"unknown": 6, "short": 1}


def test_a_receiver_that_does_not_read_is_left(start: MakeServer) -> None:
    server = start(limits=Limits(stall_s=SHORT_S))
    token = server.grant(pieces(bytes(64 * MIB)), purpose="a test", peer="n2")
    with stream(server, token):
        until(lambda: server.report().refused == {"stalled": 1})
    assert server.report().nbytes < 64 * MIB
    assert serves(server)


def test_a_receiver_that_leaves_is_counted(start: MakeServer) -> None:
    server = start()
    token = server.grant(pieces(b"abc", bytes(64 * MIB)), purpose="a test", peer="n2")
    assert fetch(server, token, [3]) == [b"abc"]
    until(lambda: server.report().refused == {"cut": 1})
    assert serves(server)


# -- sources that go away ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [None, memoryview(b"abcd"), memoryview(b"")])
def test_a_source_that_is_gone(start: MakeServer, view: memoryview | None) -> None:
    """Also one of another length: the slot was filled anew."""
    server = start()
    token = server.grant([*pieces(b"abc"), Piece(3, lambda: view), *pieces(b"x")], purpose="a test", peer="n2")
    into = bytearray(3)
    with stream(server, token) as receiving:
        receiving.receive(memoryview(into))
        with pytest.raises(SourceGone, match=r"n1 .* no longer holds piece 1"):
            receiving.receive(memoryview(bytearray(3)))
    assert into == b"abc"
    until(lambda: server.report().refused == {"gone": 1})
    assert serves(server)


def test_a_view_that_fails_ends_its_stream_alone(start: MakeServer, caplog: pytest.LogCaptureFixture) -> None:
    def view() -> memoryview:
        raise RuntimeError("no such slot")

    server = start()
    with pytest.raises(StreamBroken):
        fetch(server, server.grant([Piece(3, view)], purpose="piece of mind", peer="n2"), [3])
    until(lambda: server.report().refused == {"failed": 1})
    assert "a stream to n2 for piece of mind failed" in caplog.text
    assert "no such slot" in caplog.text
    assert serves(server)


# -- a sender that does something else --------------------------------------------------------------------------------


@pytest.fixture
def sender() -> Iterator[Callable[..., int]]:
    """Starts something that takes one token, says what it is told to, and then ends, or waits for the other to end."""
    threads: list[threading.Thread] = []

    def begin(said: bytes, *, ends: bool = True, then: Callable[[], None] = lambda: None) -> int:
        listener = socket.create_server((HOST, 0))

        def talk() -> None:
            with listener, listener.accept()[0] as sock:
                sock.settimeout(WAIT_S)
                sock.recv(TOKEN_BYTES, socket.MSG_WAITALL)
                sock.sendall(said)
                then()
                with suppress(ConnectionError):
                    assert ends or sock.recv(1) == b""

        threads.append(threading.Thread(target=talk))
        threads[-1].start()
        port: int = listener.getsockname()[1]
        return port

    yield begin
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


FIRST = Header(0, 3, Status.SENT).encode()


def receive_from(port: int, nbytes: int = 3, **options: Any) -> bytes:
    into = bytearray(nbytes)
    options = {"deadline_s": WAIT_S, **options}
    with Stream(HOST, port, bytes(TOKEN_BYTES), peer="n1", tls=None, **options) as receiving:
        receiving.receive(memoryview(into))
    return bytes(into)


def test_what_is_agreed_is_taken(sender: Callable[..., int]) -> None:
    assert receive_from(sender(FIRST + b"abc")) == b"abc"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "the header of piece 0: ended after 0 of 24 bytes"),
        (FIRST[:-1], "the header of piece 0: ended after 23 of 24 bytes"),
        (FIRST + b"ab", "the 3 bytes of piece 0: ended after 2 of 3 bytes"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a header begins with b'HTTP'"),
        (FIRST[:-1] + bytes([FIRST[-1] ^ 1]) + b"abc", "the checksum of a header does not match"),
        (Header(1, 3, Status.SENT).encode() + b"abc", "sends piece 1 of 3 bytes; piece 0 of 3 was expected"),
        (Header(0, 2, Status.SENT).encode() + b"ab", "sends piece 0 of 2 bytes; piece 0 of 3 was expected"),
        (Header(0, 2**64 - 1, Status.SENT).encode(), "sends piece 0 of 18446744073709551615 bytes"),
        (Header(1, 3, Status.GONE).encode(), "sends piece 1"),
        (Header(0, 3, 9).encode(), "a header has status 9"),  # type: ignore[arg-type]
    ],
)
def test_anything_but_what_is_agreed_is_refused(sender: Callable[..., int], said: bytes, reason: str) -> None:
    port = sender(said)
    with pytest.raises(StreamBroken) as broken:
        receive_from(port)
    assert reason in str(broken.value)
    assert f"n1 (127.0.0.1:{port})" in str(broken.value)


def test_no_byte_for_too_long(sender: Callable[..., int]) -> None:
    port = sender(FIRST + b"ab", ends=False)
    with pytest.raises(
        DeadlinePassed, match=rf"waited 0\.05 s for the 3 bytes of piece 0 from n1 \(127.0.0.1:{port}\)"
    ):
        receive_from(port, progress_s=SHORT_S)


def test_all_of_it_takes_too_long(sender: Callable[..., int]) -> None:
    with pytest.raises(DeadlinePassed, match=r"waited all of 0\.05 s for the header of piece 0 from n1"):
        receive_from(sender(b"", ends=False), deadline_s=SHORT_S)


@pytest.mark.parametrize("said", [b"", FIRST + b"a"])
def test_cancel_while_waiting(sender: Callable[..., int], said: bytes) -> None:
    receiving: Stream
    port = sender(said, ends=False, then=lambda: receiving.cancel())
    receiving = Stream(HOST, port, bytes(TOKEN_BYTES), peer="n1", tls=None, deadline_s=WAIT_S)
    with receiving, pytest.raises(StreamBroken, match="was cancelled here"):
        receiving.receive(memoryview(bytearray(3)))


def test_cancel_before_anything(start: MakeServer) -> None:
    server = start()
    receiving = stream(server, server.grant(pieces(b"abc"), purpose="a test", peer="n2"))
    receiving.cancel()
    with pytest.raises(StreamBroken, match="was cancelled here"), receiving:
        receiving.receive(memoryview(bytearray(3)))


def test_nobody_there() -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(AgentUnreachable, match=rf"n1 \(127\.0\.0\.1:{port}\) cannot be reached: Connection refused"):
        receive_from(port)


# -- TLS --------------------------------------------------------------------------------------------------------------


def trust_in(folder: Path, *names: str) -> list[Trust]:
    make(folder, [Node(name) for name in names], datetime.now(UTC))
    return [Trust(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key") for name in names]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[Trust]:
    """Two nodes of one CA."""
    return trust_in(tmp_path_factory.mktemp("ours") / "certs", "n1", "n2")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    """A node of another CA."""
    return trust_in(tmp_path_factory.mktemp("other") / "certs", "n2")[0]


def test_tls_carries_the_same(start: MakeServer, ours: list[Trust]) -> None:
    server = start(tls=ours[0].server_context())
    contents = [noise(5 * MIB + 17), b"", noise(3)]
    token = server.grant(pieces(*contents), purpose="a test", peer="n2")
    with stream(server, token, tls=ours[1].client_context()) as receiving:
        assert isinstance(receiving._sock, ssl.SSLSocket)
        assert receiving._sock.version() == "TLSv1.3"
        for content in contents:
            into = bytearray(len(content))
            receiving.receive(memoryview(into))
            assert into == content
    until(lambda: server.report().streams == 1)
    assert server.report().refused == {}


def refused_by_tls(server: BulkServer, ours: list[Trust], tls: ssl.SSLContext | None) -> HoldfastError:
    """How a stream with *tls* fails, while one of ours works before and after."""
    mine = ours[1].client_context()
    assert serves(server, tls=mine)
    token = server.grant(pieces(b"secret"), purpose="a test", peer="n2")
    with pytest.raises(HoldfastError) as failed:
        fetch(server, token, [6], tls=tls)
    assert fetch(server, token, [6], tls=mine) == [b"secret"], "the token was not used up"
    until(lambda: server.report().refused == {"tls": 1})
    return failed.value


def test_a_client_that_does_not_trust_the_server(start: MakeServer, ours: list[Trust], stranger: Trust) -> None:
    error = refused_by_tls(start(tls=ours[0].server_context()), ours, stranger.client_context())
    assert isinstance(error, AgentUntrusted)
    assert "not accepted here" in str(error)


def test_a_client_of_another_ca(start: MakeServer, ours: list[Trust], stranger: Trust) -> None:
    tls = Trust(ours[0].ca, stranger.cert, stranger.key).client_context()
    error = refused_by_tls(start(tls=ours[0].server_context()), ours, tls)
    assert isinstance(error, AgentUntrusted)
    assert "does not accept our certificate: tlsv1 alert unknown ca" in str(error)


def test_a_client_without_a_certificate(start: MakeServer, ours: list[Trust]) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.load_verify_locations(ours[0].ca)
    error = refused_by_tls(start(tls=ours[0].server_context()), ours, tls)
    assert isinstance(error, AgentUntrusted)
    assert "does not accept our certificate" in str(error)


def test_a_plain_client_of_a_tls_server(start: MakeServer, ours: list[Trust]) -> None:
    assert isinstance(refused_by_tls(start(tls=ours[0].server_context()), ours, None), StreamBroken)


def test_a_client_that_never_ends_its_handshake(start: MakeServer, ours: list[Trust]) -> None:
    server = start(tls=ours[0].server_context(), limits=Limits(token_s=SHORT_S))
    assert answer_to(server, b"") == b""
    assert server.report().refused == {"slow": 1}


def test_a_tls_client_of_a_plain_server(start: MakeServer, ours: list[Trust]) -> None:
    server = start()
    token = server.grant(pieces(b"abc"), purpose="a test", peer="n2")
    with pytest.raises(StreamBroken):
        fetch(server, token, [3], tls=ours[1].client_context())
    assert server.report().refused == {"long": 1}
    assert fetch(server, token, [3]) == [b"abc"]


def test_a_byte_that_flips_under_tls_is_no_matter_of_trust(start: MakeServer, ours: list[Trust]) -> None:
    """The one case in which the stream itself notices; the remedy is to try again."""
    server = start(tls=ours[0].server_context())
    token = server.grant(pieces(bytes(MIB)), purpose="a test", peer="n2")
    with socket.create_server((HOST, 0)) as listener, ThreadPoolExecutor(2) as pool:
        port = listener.getsockname()[1]
        receiving = Stream(HOST, port, token, peer="n1", tls=ours[1].client_context(), deadline_s=WAIT_S)
        proxy = pool.submit(flip_one, listener, server.port, 100_000)
        with pytest.raises(StreamBroken, match="BAD_RECORD_MAC"), receiving:
            receiving.receive(memoryview(bytearray(MIB)))
        proxy.result(WAIT_S)


def flip_one(listener: socket.socket, port: int, at: int) -> None:
    """Pass one connection on to *port*; of what comes back, a bit of byte *at* is changed."""
    with listener.accept()[0] as near, socket.create_connection((HOST, port)) as far:
        there = threading.Thread(target=pass_on, args=(near, far))
        there.start()
        pass_on(far, near, at)
        there.join(WAIT_S)


def pass_on(source: socket.socket, target: socket.socket, flip: int = -1) -> None:
    passed = 0
    with suppress(ConnectionError):
        while got := bytearray(source.recv(1 << 16)):
            if 0 <= flip - passed < len(got):
                got[flip - passed] ^= 1
            target.sendall(got)
            passed += len(got)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


# -- pace -------------------------------------------------------------------------------------------------------------


def test_pace_lets_a_burst_through_and_then_keeps_the_rate() -> None:
    clock = Clock()
    pace = Pace(1000.0, burst_bytes=500, clock=clock)
    assert [pace.delay_s(250) for _ in range(5)] == pytest.approx([0, 0, 0, 0.25, 0.5])
    clock.now_s += 0.75  # as long as it takes to pay for all but the burst
    assert pace.delay_s(250) == pytest.approx(0)
    assert pace.delay_s(250) == pytest.approx(0.25)


def test_pace_does_not_save_up_more_than_a_burst() -> None:
    clock = Clock()
    pace = Pace(1000.0, burst_bytes=500, clock=clock)
    clock.now_s += 3600.0
    assert [pace.delay_s(500) for _ in range(3)] == pytest.approx([0, 0, 0.5])


def test_pace_is_shared_by_many_threads() -> None:
    """Whoever comes first, together they wait as one would."""
    pace = Pace(1000.0, burst_bytes=0, clock=Clock())
    with ThreadPoolExecutor(8) as pool:
        delays = list(pool.map(pace.delay_s, [100] * 400))
    assert sorted(delays) == pytest.approx([0.1 * turn for turn in range(400)])


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, -1)])
def test_a_pace_of_nothing_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="bytes per second"):
        Pace(rate, burst)


def test_a_server_takes_its_turns(start: MakeServer) -> None:
    pace = Pace(1e12)
    server = start(pace=pace)
    assert serves(server)
    token = server.grant(pieces(bytes(3 * TURN_BYTES + 1)), purpose="a test", peer="n2")
    assert fetch(server, token, [3 * TURN_BYTES + 1])
    assert pace._paid_until_s > 0


def test_a_wait_for_a_turn_ends_with_the_server(start: MakeServer) -> None:
    server = start(pace=Pace(1.0, burst_bytes=TURN_BYTES))  # after two turns, the next one is in three days
    token = server.grant(pieces(bytes(4 * TURN_BYTES)), purpose="a test", peer="n2")
    with stream(server, token) as receiving, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(receiving.receive, memoryview(bytearray(4 * TURN_BYTES)))
        until(lambda: server.report().nbytes == 2 * TURN_BYTES)
        server.close(WAIT_S)
        with pytest.raises(StreamBroken):
            waiting.result(WAIT_S)


# -- beginning and end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
def test_close_cuts_streams_and_ends_threads(start: MakeServer, ours: list[Trust], secure: bool) -> None:
    server = start(tls=ours[0].server_context() if secure else None)
    tls = ours[1].client_context() if secure else None
    token = server.grant(pieces(b"abc", bytes(64 * MIB)), purpose="a test", peer="n2")
    with stream(server, token, tls=tls) as receiving, socket.create_connection((HOST, server.port)):
        receiving.receive(memoryview(bytearray(3)))
        server.close(WAIT_S)
        with pytest.raises(StreamBroken):
            receiving.receive(memoryview(bytearray(64 * MIB)))
    server.close(WAIT_S)
    with pytest.raises(AgentUnreachable):
        fetch(server, token, [3])


def test_only_loopback_is_served_without_tls(ours: list[Trust]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ConfigError, match="without TLS only loopback addresses are served"):
            BulkServer(host, 0, None)
    with closing(BulkServer("0.0.0.0", 0, ours[0].server_context())) as server:
        assert serves(server, tls=ours[1].client_context())


def test_an_address_that_cannot_be_used(start: MakeServer) -> None:
    with pytest.raises(ConfigError, match="is no IP address"):
        BulkServer("some.host", 0, None)
    with pytest.raises(ConfigError, match="Address already in use"):
        BulkServer(HOST, start().port, None)


DYING = """
import sys, threading
from holdfast.agent.bulk import BulkServer, Piece
server = BulkServer("127.0.0.1", 0, None)
pieces = [Piece(3, lambda: memoryview(b"abc")), Piece(3, lambda: memoryview(b"def"))]
print(server.port, server.grant(pieces, purpose="a test", peer="n2").hex(), flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(("place", "arrive"), [("bulk.first-block", []), ("bulk.mid-stream", [b"abc"])])
def test_a_sender_that_is_killed(place: str, arrive: list[bytes]) -> None:
    environment = {**os.environ, "HOLDFAST_CRASH": place}
    with subprocess.Popen([sys.executable, "-c", DYING], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        port, token = process.stdout.readline().split()
        arrived: list[bytes] = []
        with Stream(HOST, int(port), bytes.fromhex(token), peer="n1", tls=None, deadline_s=WAIT_S) as receiving:
            with suppress(StreamBroken):
                for _ in range(2):
                    into = bytearray(3)
                    receiving.receive(memoryview(into))
                    arrived.append(bytes(into))
            assert arrived == arrive
        assert process.wait(WAIT_S) == -signal.SIGKILL
