"""What is read for ranges of an image: all that is wanted, each byte once, from bound to bound, within the room that there is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from holdfast.agent.ranges import Batch, Blocks, Grain, Ints, Pieces, Wanted, batches
from hypothesis import given
from hypothesis import strategies as st

IMAGE = 200


@st.composite
def grains(draw: st.DrawFn) -> tuple[Grain, list[int]]:
    """A grain, and all its bounds."""
    if draw(st.booleans()):
        unit = draw(st.integers(1, 70))
        return Blocks(unit, IMAGE), [*range(0, IMAGE, unit), IMAGE]
    cuts = draw(st.sets(st.integers(0, IMAGE), max_size=12).map(sorted))
    pieces = [(a, b) for a, b in pairwise(cuts) if draw(st.booleans())]
    inside = {at for a, b in pieces for at in range(a + 1, b)}
    return Pieces(pieces), [at for at in range(IMAGE + 1) if at not in inside]


ranges = st.lists(
    st.integers(0, IMAGE).flatmap(lambda start: st.tuples(st.just(start), st.integers(0, IMAGE - start))), max_size=8
)


def wanted_of(parts: list[tuple[int, int]]) -> Wanted:
    table = np.array(parts, np.int64).reshape(-1, 2)
    return Wanted.of(table[:, 0], table[:, 1])


def handed_out(image: Ints, batch: Batch, into: Ints) -> None:
    """What a reader does with a batch."""
    held = np.full(batch.nbytes, -1, np.int64)
    for span in batch.spans:
        held[span.at : span.at + span.nbytes] = image[span.start : span.end]
    wanted = batch.wanted
    for start, end, place, source in zip(wanted.starts, wanted.ends, wanted.places, batch.sources(), strict=True):
        into[place : place + end - start] = held[source : source + end - start]


@given(grains(), ranges, st.integers(1, 150))
def test_all_that_is_wanted_is_read_once(
    grain: tuple[Grain, list[int]], parts: list[tuple[int, int]], most_bytes: int
) -> None:
    how, bounds = grain
    image = np.arange(IMAGE, dtype=np.int64)
    into = np.full(sum(nbytes for _, nbytes in parts), -1, np.int64)
    reads = np.zeros(IMAGE, np.int64)
    for batch in batches(wanted_of(parts), how, most_bytes):
        pieces = [(span.start, span.end) for span in batch.spans]
        assert all(start in bounds and end in bounds for start, end in pieces)
        assert [span.at for span in batch.spans] == [*np.cumsum([0, *(b - a for a, b in pieces)])][:-1]
        alone = len(pieces) == 1 and not any(pieces[0][0] < at < pieces[0][1] for at in bounds)
        assert batch.nbytes <= most_bytes or alone
        for start, end in pieces:
            reads[start:end] += 1
        handed_out(image, batch, into)
    assert into.tolist() == [at for start, nbytes in parts for at in range(start, start + nbytes)]
    assert reads.max(initial=0) <= 1
    needed = {at for start, nbytes in parts for at in range(start, start + nbytes)}
    beside = {at for at in range(IMAGE) if reads[at]} - needed
    # Whatever else is read shares a piece with something that is wanted.
    for at in beside:
        first, last = max(b for b in bounds if b <= at), min(b for b in bounds if b > at)
        assert needed.intersection(range(first, last))


@given(ranges, st.integers(0, IMAGE), st.integers(0, IMAGE))
def test_parts_of_what_is_wanted_keep_their_places(parts: list[tuple[int, int]], one: int, other: int) -> None:
    low, high = sorted((one, other))
    image, whole = np.arange(IMAGE, dtype=np.int64), Blocks(IMAGE, IMAGE)
    wanted = wanted_of(parts)
    into = np.full(sum(nbytes for _, nbytes in parts), -1, np.int64)
    cut = [wanted.within(low, high), Wanted.joined([wanted.within(0, low), wanted.within(high, IMAGE)])]
    for part in cut:
        for batch in batches(part, whole, IMAGE):
            handed_out(image, batch, into)
    assert into.tolist() == [at for start, nbytes in parts for at in range(start, start + nbytes)]
