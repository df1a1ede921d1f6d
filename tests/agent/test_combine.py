"""Sums of pieces from here and from peers are those of a slow, obvious twin, whatever is cut, damaged or broken off."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from holdfast.agent import bulk, combine
from holdfast.agent.bulk import BulkServer, Stream
from holdfast.agent.combine import Combiner, Outcome, Source, SourceFailed, Where, cut
from holdfast.erasure.galois import PRODUCTS
from holdfast.erasure.kernel import block_checksums
from holdfast.erasure.stripes import Geometry, Kind, Term, parity_terms, rebuild_terms
from holdfast.errors import AgentUnreachable, DeadlinePassed, SourceGone, StreamBroken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Bytes = npt.NDArray[np.uint8]
BLOCK = 64
STEP = 256
WAIT_S = 120.0


class Peer:
    """An agent as ``combine`` sees it: a bulk port, and whatever is behind it."""

    def __init__(self) -> None:
        self.server = BulkServer("127.0.0.1", 0, None)
        self.opened = 0

    async def open(self, view: Callable[[int, int], memoryview | None], ranges: Sequence[tuple[int, int]]) -> Stream:
        self.opened += 1
        pieces = [bulk.Piece(nbytes, partial(view, offset, nbytes)) for offset, nbytes in ranges]
        token = self.server.grant(pieces, purpose="test", peer="test")
        return Stream("127.0.0.1", self.server.port, token, peer="peer", tls=None, deadline_s=WAIT_S)

    def source(self, data: Bytes, view: Callable[[int, int], memoryview | None] | None = None) -> Source:
        """*data* with its checksums; *view* is what is sent instead."""
        checks = block_checksums(data.ctypes.data, len(data), BLOCK)
        said = view or (lambda offset, nbytes: data[offset : offset + nbytes].data)
        return Source(len(data), BLOCK, checks, open=partial(self.open, said))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "PIECE_BYTES", STEP)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.server.close()


def here(data: Bytes) -> Source:
    return Source(len(data), BLOCK, block_checksums(data.ctypes.data, len(data), BLOCK), here=data)


def noise(nbytes: int, seed: int = 0) -> Bytes:
    return np.frombuffer(random.Random(seed).randbytes(nbytes), np.uint8).copy()


def run(
    pool: ThreadPoolExecutor, target: Bytes, terms: Sequence[Term], sources: dict[Where, Source], **options: Any
) -> Outcome:
    async def work() -> Outcome:
        combiner = Combiner(target, BLOCK, pool, asyncio.Semaphore(4))
        return await asyncio.wait_for(combiner.run(terms, sources, **options), WAIT_S)

    return asyncio.run(work())


def twin(terms: Sequence[Term], sources: dict[Where, Bytes], nbytes: int) -> Bytes:
    """What *terms* say, one after the other."""
    target = np.zeros(nbytes, np.uint8)
    for term in terms:
        data = sources[term.member, term.kind][term.source_offset : term.source_offset + term.nbytes]
        target[term.target_offset : term.target_offset + term.nbytes] ^= PRODUCTS[term.coefficient][data]
    return target


# -- the sums ------------------------------------------------------------------------------------------------------------


@st.composite
def lanes(draw: st.DrawFn) -> tuple[list[Bytes], int]:
    n = draw(st.integers(2, 6))
    lengths = draw(st.lists(st.integers(0, 3000), min_size=n, max_size=n))
    return [noise(nbytes, i) for i, nbytes in enumerate(lengths)], draw(st.integers(1, n - 1))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lane=lanes(), seed=st.integers(0, 1000))
def test_parity_and_lost_images(pool: ThreadPoolExecutor, peer: Peer, lane: tuple[list[Bytes], int], seed: int) -> None:
    """All parity of a group, then every image from m of the others' losses; sources by turns here and at the peer."""
    images, m = lane
    rng, n, lengths = random.Random(seed), len(images), [len(image) for image in images]
    geometry = Geometry.of(lengths, m, BLOCK)
    parities = []
    for member in range(n):
        terms = parity_terms(geometry, lengths, member)
        data: dict[Where, Bytes] = {(i, Kind.IMAGE): image for i, image in enumerate(images)}
        target = noise(geometry.parity_bytes)  # what lay there before
        outcome = run(
            pool, target, terms, {w: (here if rng.random() < 0.5 else peer.source)(d) for w, d in data.items()}
        )
        assert np.array_equal(target, twin(terms, data, geometry.parity_bytes))
        assert not outcome.damaged
        parities.append(target)
    lost = rng.sample(range(n), m)
    left = [i for i in range(n) if i not in lost]
    for member in lost:
        data = {(i, Kind.IMAGE): images[i] for i in left} | {(i, Kind.PARITY): parities[i] for i in left}
        terms = rebuild_terms(geometry, lengths, member, left, left)
        target = noise(lengths[member])
        run(pool, target, terms, {w: (here if rng.random() < 0.5 else peer.source)(d) for w, d in data.items()})
        assert np.array_equal(target, images[member])


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3000), st.integers(1, 255)), min_size=1, max_size=4),
    st.sampled_from([BLOCK, STEP, 4 * STEP]),
)
def test_pieces_are_the_terms_again_and_end_with_blocks(parts: list[tuple[int, int, int]], step: int) -> None:
    source = here(noise(5000))
    terms = [
        Term(BLOCK * at, 0, Kind.IMAGE, BLOCK * at, nbytes, by)
        for at, nbytes, by in parts
        if BLOCK * at + nbytes <= 5000
    ]
    pieces = cut(terms, source, step)
    assert sum(piece.nbytes for piece in pieces) == sum(term.nbytes for term in terms)
    for piece in pieces:
        assert piece.source_offset % BLOCK == 0
        assert 0 < piece.nbytes <= min(step, piece.read_bytes)
        assert piece.source_offset + piece.read_bytes <= 5000
        assert piece.read_bytes % BLOCK == 0 or piece.source_offset + piece.read_bytes == 5000
        assert piece.target_offset == piece.source_offset


def test_only_the_ranges_that_are_asked_for_change(pool: ThreadPoolExecutor, peer: Peer) -> None:
    a, b = noise(2048, 1), noise(2048, 2)
    before = noise(2048, 3)
    target = before.copy()
    terms = [Term(512, 0, Kind.IMAGE, 512, 448, 1), Term(512, 1, Kind.IMAGE, 0, 100, 7)]
    sources = {(0, Kind.IMAGE): peer.source(a), (1, Kind.IMAGE): here(b)}
    run(pool, target, terms, sources, ranges=[(512, 1024), (1536, 1600)])
    wanted = before.copy()
    wanted[512:1024] = wanted[1536:1600] = 0
    wanted[512:960] = a[512:960]
    wanted[512:612] ^= PRODUCTS[7][b[:100]]
    assert np.array_equal(target, wanted)


def test_what_no_term_names_is_zero(pool: ThreadPoolExecutor) -> None:
    target = noise(1000)
    assert run(pool, target, [], {}).pulled_bytes == 0
    assert not target.any()


def test_what_is_pulled_is_counted(pool: ThreadPoolExecutor, peer: Peer) -> None:
    """A term that ends in the middle of a block: the block is read, and verified, to its end."""
    data, target = noise(1000), np.zeros(100, np.uint8)
    outcome = run(pool, target, [Term(0, 0, Kind.IMAGE, 128, 100, 1)], {(0, Kind.IMAGE): peer.source(data)})
    assert np.array_equal(target, data[128:228])
    assert (outcome.pulled_bytes, outcome.refused, outcome.damaged) == (128, 0, {})


# -- damage --------------------------------------------------------------------------------------------------------------


def _spoiling(data: Bytes, at: int, times: int) -> Callable[[int, int], memoryview]:
    """A view of *data* in which byte *at* is wrong the first *times* that it is sent."""
    left = [times]

    def view(offset: int, nbytes: int) -> memoryview:
        part = data[offset : offset + nbytes].copy()
        if offset <= at < offset + nbytes and left[0] > 0:
            left[0] -= 1
            part[at - offset] ^= 1
        return part.data

    return view


@pytest.mark.parametrize("at", [0, 255, 256, 1000, 1023])
def test_what_arrives_damaged_once_is_asked_for_again(pool: ThreadPoolExecutor, peer: Peer, at: int) -> None:
    data, other, target = noise(1024, 1), noise(1024, 2), noise(1024, 3)
    terms = [Term(0, 0, Kind.IMAGE, 0, 1024, 1), Term(0, 1, Kind.IMAGE, 0, 1024, 9)]
    sources = {(0, Kind.IMAGE): peer.source(data, _spoiling(data, at, 1)), (1, Kind.IMAGE): peer.source(other)}
    outcome = run(pool, target, terms, sources)
    assert np.array_equal(target, data ^ PRODUCTS[9][other])
    assert (outcome.refused, outcome.damaged) == (1, {})
    assert outcome.pulled_bytes == 2 * 1024 + STEP


@pytest.mark.parametrize("local", [False, True])
def test_what_is_damaged_at_its_source_is_left_out_and_told(pool: ThreadPoolExecutor, peer: Peer, local: bool) -> None:
    """The rest of the target is right: the damaged piece is all that it lacks."""
    data, other, target = noise(1024, 1), noise(1024, 2), noise(1024, 3)
    source = peer.source(data, _spoiling(data, 600, 2))
    if local:
        source = here(data.copy())
        assert source.here is not None
        source.here[600] ^= 1
    terms = [Term(0, 0, Kind.IMAGE, 0, 1024, 3), Term(0, 1, Kind.IMAGE, 0, 1024, 1)]
    outcome = run(pool, target, terms, {(0, Kind.IMAGE): source, (1, Kind.IMAGE): peer.source(other)})
    (where, (piece,)), *more = outcome.damaged.items()
    assert (where, piece.target_offset, piece.nbytes, more) == ((0, Kind.IMAGE), 512, 256, [])
    wanted = PRODUCTS[3][data] ^ other
    wanted[512:768] = other[512:768]
    assert np.array_equal(target, wanted)


def test_a_block_that_is_longer_than_the_piece_is_verified_whole(pool: ThreadPoolExecutor, peer: Peer) -> None:
    """Damage behind the bytes that are wanted is damage all the same: nothing else tells whether these are right."""
    data, target = noise(256), np.zeros(100, np.uint8)
    source = peer.source(data, _spoiling(data, 127, 2))
    outcome = run(pool, target, [Term(0, 0, Kind.IMAGE, 0, 100, 1)], {(0, Kind.IMAGE): source})
    assert [len(pieces) for pieces in outcome.damaged.values()] == [1]


# -- sources that fail ---------------------------------------------------------------------------------------------------


def test_a_source_that_is_gone_is_named(pool: ThreadPoolExecutor, peer: Peer) -> None:
    data = noise(1024)
    terms = [Term(0, 0, Kind.IMAGE, 0, 1024, 1), Term(0, 4, Kind.PARITY, 0, 1024, 1)]
    sources = {(0, Kind.IMAGE): peer.source(data), (4, Kind.PARITY): peer.source(data, lambda offset, nbytes: None)}
    with pytest.raises(SourceFailed) as caught:
        run(pool, np.zeros(1024, np.uint8), terms, sources)
    assert caught.value.where == (4, Kind.PARITY)
    assert isinstance(caught.value.error, SourceGone)


def test_a_source_that_cannot_be_opened_is_named(pool: ThreadPoolExecutor) -> None:
    async def refuse(ranges: Sequence[tuple[int, int]]) -> Stream:
        raise AgentUnreachable("nobody there")

    source = Source(1024, BLOCK, here(noise(1024)).checks, open=refuse)
    with pytest.raises(SourceFailed, match="nobody there") as caught:
        run(pool, np.zeros(1024, np.uint8), [Term(0, 3, Kind.IMAGE, 0, 1024, 1)], {(3, Kind.IMAGE): source})
    assert caught.value.where == (3, Kind.IMAGE)


def test_one_failure_ends_the_others(pool: ThreadPoolExecutor, peer: Peer) -> None:
    """A source that would never answer is not waited for; and when ``run`` ends, nobody writes to the target any more."""
    data, target, held = noise(1024), np.zeros(1024, np.uint8), threading.Event()

    def never(offset: int, nbytes: int) -> memoryview:
        held.wait(WAIT_S)
        return data[offset : offset + nbytes].data

    async def refuse(ranges: Sequence[tuple[int, int]]) -> Stream:
        raise DeadlinePassed("too late")

    sources = {
        (0, Kind.IMAGE): peer.source(data, never),
        (1, Kind.IMAGE): Source(1024, BLOCK, here(data).checks, open=refuse),
    }
    with pytest.raises(SourceFailed) as caught:
        run(pool, target, [Term(0, i, Kind.IMAGE, 0, 1024, 1) for i in (0, 1)], sources)
    assert caught.value.where[0] == 1
    before = target.copy()
    held.set()
    assert np.array_equal(target, before)


def test_cancelling_ends_all_threads_first(pool: ThreadPoolExecutor, peer: Peer) -> None:
    data, target, held, asked = noise(1024), np.zeros(1024, np.uint8), threading.Event(), threading.Event()

    def never(offset: int, nbytes: int) -> memoryview:
        asked.set()
        held.wait(WAIT_S)
        return data[offset : offset + nbytes].data

    async def work() -> None:
        combiner = Combiner(target, BLOCK, pool, asyncio.Semaphore(4))
        task = asyncio.ensure_future(
            combiner.run([Term(0, 0, Kind.IMAGE, 0, 1024, 1)], {(0, Kind.IMAGE): peer.source(data, never)})
        )
        await asyncio.to_thread(asked.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, WAIT_S)
        assert not combiner._streams

    asyncio.run(work())
    held.set()
    assert not target.any()


def test_a_stream_that_breaks_off_is_a_failure(pool: ThreadPoolExecutor) -> None:
    peer = Peer()
    data = noise(4096)

    def cut_off(offset: int, nbytes: int) -> memoryview:
        if offset:
            threading.Thread(target=peer.server.close).start()
            peer.server._closing.wait(WAIT_S)
        return data[offset : offset + nbytes].data

    with pytest.raises(SourceFailed) as caught:
        run(
            pool,
            np.zeros(4096, np.uint8),
            [Term(0, 0, Kind.IMAGE, 0, 4096, 1)],
            {(0, Kind.IMAGE): peer.source(data, cut_off)},
        )
    assert isinstance(caught.value.error, StreamBroken)
    peer.server.close()
