"""Bulk streams under any bytes: a damaged header is never taken, and nothing that comes in harms the server."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from holdfast.agent.bulk import (
    HEADER_BYTES,
    TOKEN_BYTES,
    BulkServer,
    Grants,
    Header,
    Limits,
    Pace,
    Piece,
    Status,
    Stream,
)
from holdfast.errors import StreamBroken
from hypothesis import given, settings
from hypothesis import strategies as st

headers = st.builds(Header, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.sampled_from(Status))
WAIT_S = 120.0
CONTENT = b"what is served to those who may have it" * 1000


# -- headers ----------------------------------------------------------------------------------------------------------


@settings(derandomize=True)
@given(headers)
def test_a_header_comes_back(header: Header) -> None:
    raw = header.encode()
    assert len(raw) == HEADER_BYTES
    assert Header.decode(raw) == header


@settings(derandomize=True)
@given(headers, st.dictionaries(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255), min_size=1))
def test_a_header_with_any_bytes_changed_is_refused(header: Header, flips: dict[int, int]) -> None:
    raw = bytearray(header.encode())
    for at, mask in flips.items():
        raw[at] ^= mask
    with pytest.raises(StreamBroken):
        Header.decode(raw)


@settings(derandomize=True)
@given(st.binary(max_size=2 * HEADER_BYTES))
def test_any_bytes_are_a_header_or_refused(raw: bytes) -> None:
    """And if they are one, they are the only way to write it."""
    try:
        header = Header.decode(raw)
    except StreamBroken:
        return
    assert header.encode() == raw


# -- the port ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[BulkServer]:
    server = BulkServer("127.0.0.1", 0, None, limits=Limits(token_s=WAIT_S))
    yield server
    server.close(WAIT_S)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(parts=st.lists(st.binary(max_size=3 * TOKEN_BYTES), max_size=4), leaves=st.booleans())
def test_no_bytes_harm_the_server(server: BulkServer, parts: list[bytes], leaves: bool) -> None:
    token = server.grant([Piece(len(CONTENT), lambda: memoryview(CONTENT))], purpose="a test", peer="n2")
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as sock, suppress(ConnectionError):
        for part in parts:
            sock.sendall(part)
        if not leaves:
            with suppress(OSError):  # not connected any more
                sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    into = bytearray(len(CONTENT))
    with Stream("127.0.0.1", server.port, token, peer="n1", tls=None, deadline_s=WAIT_S) as stream:
        stream.receive(memoryview(into))
    assert into == CONTENT
    assert "failed" not in server.report().refused


@settings(derandomize=True, deadline=None, max_examples=40)
@given(sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 300_000)), max_size=12), seed=st.integers(0, 255))
def test_any_pieces_arrive(server: BulkServer, sizes: list[int], seed: int) -> None:
    contents = [bytes([seed ^ number]) * size for number, size in enumerate(sizes)]
    views = [Piece(len(content), lambda content=content: memoryview(content)) for content in contents]  # type: ignore[misc]
    token = server.grant(views, purpose="a test", peer="n2")
    with Stream("127.0.0.1", server.port, token, peer="n1", tls=None, deadline_s=WAIT_S) as stream:
        for content in contents:
            into = bytearray(len(content))
            stream.receive(memoryview(into))
            assert into == content


# -- grants and pace, against slow twins ------------------------------------------------------------------------------


steps = st.lists(st.tuples(st.sampled_from(["add", "redeem"]), st.integers(0, 9), st.integers(0, 20)), max_size=40)


@settings(derandomize=True)
@given(steps)
def test_grants_agree_with_a_list(steps: list[tuple[str, int, int]]) -> None:
    """Whatever the order: good once, until its time is over, and for as long as four newer ones are not given."""
    grants, now_s = Grants(life_s=30.0, most=4), 0.0
    given: list[tuple[bytes, float]] = []  # every token ever, and until when it would be good
    open_: list[bytes] = []
    for step, which, passed in steps:
        now_s += passed
        open_ = [token for token in open_ if dict(given)[token] > now_s]
        if step == "add":
            given.append((grants.add([], str(len(given)), "n2", now_s), now_s + 30.0))
            open_ = [*open_, given[-1][0]][-4:]
        elif given:
            number = which % len(given)
            found = grants.redeem(given[number][0], now_s)
            assert (found is not None) == (given[number][0] in open_)
            assert found is None or found.purpose == str(number)
            open_ = [token for token in open_ if token != given[number][0]]


@settings(derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 3)), min_size=1, max_size=60), st.sampled_from([0, 500, 5000])
)
def test_pace_is_never_exceeded(asked: list[tuple[int, float]], burst: int) -> None:
    """Between any two sendings, no more than the rate, the burst and the last one; and nobody waits for nothing."""
    clock = [50.0]
    pace = Pace(1000.0, burst, clock=lambda: clock[0])
    sent: list[tuple[float, int]] = []
    for nbytes, passed in asked:
        clock[0] += passed
        sent.append((clock[0] + pace.delay_s(nbytes), nbytes))
    assert sent[0][0] == 50.0 + asked[0][1]
    for first in range(len(sent)):
        total = 0
        for at_s, nbytes in sent[first:]:
            assert total <= 1000.0 * (at_s - sent[first][0]) + burst + 1e-3 or math.isclose(total, 0)
            total += nbytes
