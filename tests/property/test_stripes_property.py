"""Terms carried out byte by byte: parity built, images lost, images rebuilt, for every pattern; shares that are even."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import pytest
import reedsolo
from holdfast.erasure.stripes import Geometry, Kind, Term, Unrecoverable, parity_terms, rebuild_terms
from hypothesis import example, given, settings
from hypothesis import strategies as st


def times(a: int, b: int) -> int:
    """The product in GF(256), as long multiplication of polynomials."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return product


TIMES = [bytes(times(a, b) for b in range(256)) for a in range(256)]


@dataclass(frozen=True)
class Lane:
    """A lane with its bytes: the images, and the parity images that ``parity_terms`` makes of them."""

    geometry: Geometry
    unit: int
    images: list[bytes]
    parities: list[bytes]

    @classmethod
    def of(cls, lengths: Sequence[int], m: int, unit: int, seed: int) -> Lane:
        geometry = Geometry.of(lengths, m, unit)
        images = [random.Random(seed + i).randbytes(length) for i, length in enumerate(lengths)]
        bare = cls(geometry, unit, images, [])
        made = [bare.carried_out(parity_terms(geometry, lengths, i), geometry.parity_bytes) for i in bare.members]
        return cls(geometry, unit, images, made)

    @property
    def members(self) -> range:
        return range(self.geometry.n)

    @property
    def lengths(self) -> list[int]:
        return [len(image) for image in self.images]

    def carried_out(self, terms: Iterable[Term], nbytes: int) -> bytes:
        """The target of *nbytes* bytes that *terms* make. Nothing may be read or written beyond an end."""
        target = bytearray(nbytes)
        for term in terms:
            source = (self.images if term.kind is Kind.IMAGE else self.parities)[term.member]
            assert term.nbytes > 0
            assert 0 < term.coefficient < 256
            assert 0 <= term.source_offset <= term.source_offset + term.nbytes <= len(source)
            assert 0 <= term.target_offset <= term.target_offset + term.nbytes <= nbytes
            product = source[term.source_offset : term.source_offset + term.nbytes].translate(TIMES[term.coefficient])
            for i, byte in enumerate(product, term.target_offset):
                target[i] ^= byte
        return bytes(target)

    def rebuilt(self, lost: int, images: set[int], parities: set[int]) -> bytes:
        terms = rebuild_terms(self.geometry, self.lengths, lost, images, parities)
        for term in terms:
            assert term.member in (images if term.kind is Kind.IMAGE else parities)
            assert (term.member, term.kind) != (lost, Kind.IMAGE)
        return self.carried_out(terms, len(self.images[lost]))


@st.composite
def lanes(draw: st.DrawFn, most: int = 20) -> Lane:
    n = draw(st.integers(2, most))
    longest = draw(st.integers(0, 400))
    alike = draw(st.booleans())
    lengths = [longest] * n if alike else draw(st.lists(st.integers(0, longest), min_size=n, max_size=n))
    return Lane.of(lengths, draw(st.integers(1, n - 1)), draw(st.sampled_from([1, 4, 16])), draw(st.integers(0, 2**32)))


def patterns(lane: Lane) -> Iterator[tuple[int, ...]]:
    """All ways to lose 1 to m members."""
    for count in range(1, lane.geometry.m + 1):
        yield from combinations(lane.members, count)


@pytest.mark.parametrize(("n", "m"), [(n, m) for n in range(2, 9) for m in range(1, n)])
def test_every_pattern_of_losses(n: int, m: int) -> None:
    """Members of unlike lengths, one of them empty, with image and parity gone."""
    longest = 8 * (n - m) - 3
    lane = Lane.of([longest, 0, *(longest * i // n for i in range(n, 2, -1))][:n], m, 4, seed=n * 10 + m)
    for lost in patterns(lane):
        left = set(lane.members) - set(lost)
        for member in lost:
            assert lane.rebuilt(member, left, left) == lane.images[member], f"lost {lost}"


@pytest.mark.parametrize(("n", "m"), [(n, m) for n in range(2, 9) for m in range(1, n)])
def test_every_survivor_is_asked_for_the_same(n: int, m: int) -> None:
    """Within one segment, whoever is lost, when images are equally long."""
    lengths = [7 * (n - m)] * n
    geometry = Geometry.of(lengths, m, 1)
    for lost in combinations(range(n), m):
        left = set(range(n)) - set(lost)
        for count in range(m):  # so many of the lost are back, without parity yet counted on
            back = left | set(lost[:count])
            asked = Counter[int](dict.fromkeys(back, 0))
            for term in rebuild_terms(geometry, lengths, lost[-1], back, back):
                asked[term.member] += term.nbytes
            assert max(asked.values()) - min(asked.values()) <= geometry.segment_bytes, f"{lost}, {count} back"


@settings(derandomize=True, deadline=None, max_examples=150)
@given(lanes(), st.data())
def test_any_m_losses(lane: Lane, data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.sampled_from(lane.members), min_size=1, max_size=lane.geometry.m))
    left = set(lane.members) - lost
    for member in lost:
        assert lane.rebuilt(member, left, left) == lane.images[member]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lanes(most=9), st.data())
def test_images_and_parities_may_be_lost_apart(lane: Lane, data: st.DataObject) -> None:
    """It is rebuilt if, and only if, every stripe has k pieces, counted here by the definition of the geometry."""
    lost = data.draw(st.sampled_from(lane.members))
    images = data.draw(st.sets(st.sampled_from(lane.members))) - {lost}
    parities = data.draw(st.sets(st.sampled_from(lane.members)))
    n, m, size = lane.geometry.n, lane.geometry.m, lane.geometry.segment_bytes
    enough = True
    for stripe in range(n):
        holders = [(stripe + row) % n for row in range(m)]
        if lost in holders:
            continue
        first = lane.geometry.position(lost, stripe) * size
        last = min(first + size, lane.lengths[lost])
        zero = {
            member for member in lane.members if lane.lengths[member] <= lane.geometry.position(member, stripe) * size
        }
        data_left = (images | zero) - set(holders) - {lost}
        enough = enough and (first >= last or len(data_left) + len(parities & set(holders)) >= n - m)
    if enough:
        assert lane.rebuilt(lost, images, parities) == lane.images[lost]
    else:
        with pytest.raises(Unrecoverable):
            lane.rebuilt(lost, images, parities)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lanes(most=9), st.integers(0, 8))
# Member 1 has been asked for much when it has nothing for the last stripe: it still counts before others are asked.
@example(Lane.of([20, 16, 0, 12, 20, 4, 8], 2, 1, seed=0), 0)
def test_nothing_is_read_in_place_of_zeros(lane: Lane, lost: int) -> None:
    """Of each stripe, k pieces less those beyond the end of their image, which are known."""
    lost %= lane.geometry.n
    left = set(lane.members) - {lost}
    geometry = lane.geometry
    read = Counter(term.target_offset for term in rebuild_terms(geometry, lane.lengths, lost, left, left))
    for position in range(geometry.k):
        stripe, begin = geometry.stripe(lost, position), geometry.offset(position)
        others = [geometry.member(stripe, p) for p in range(geometry.k) if p != position]
        zeros = sum(lane.lengths[i] <= geometry.offset(geometry.position(i, stripe)) for i in others)
        expected = geometry.k - zeros if begin < lane.lengths[lost] else 0
        assert read[begin] == expected


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lanes(most=9), st.data())
def test_ranges_are_parts_of_the_whole(lane: Lane, data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(lane.members))
    left = set(lane.members) - {lost}
    nbytes = len(lane.images[lost])
    start, end = sorted(data.draw(st.tuples(st.integers(0, nbytes), st.integers(0, nbytes))))
    found = lane.carried_out(rebuild_terms(lane.geometry, lane.lengths, lost, left, left, start, end), nbytes)
    assert found == bytes(start) + lane.images[lost][start:end] + bytes(nbytes - end)
    nbytes = lane.geometry.parity_bytes
    start, end = sorted(data.draw(st.tuples(st.integers(0, nbytes), st.integers(0, nbytes))))
    found = lane.carried_out(parity_terms(lane.geometry, lane.lengths, lost, start, end), nbytes)
    assert found == bytes(start) + lane.parities[lost][start:end] + bytes(nbytes - end)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lanes(), st.data())
def test_terms_begin_and_end_at_units(lane: Lane, data: st.DataObject) -> None:
    """Or end where an image ends, source or target; also those of ranges that do."""
    lost = data.draw(st.sampled_from(lane.members))
    left, unit = set(lane.members) - {lost}, lane.unit
    length = lane.lengths[lost]
    first = unit * data.draw(st.integers(0, length // unit))
    after = unit * data.draw(st.integers(first // unit, length // unit + 1))
    rebuilding = rebuild_terms(lane.geometry, lane.lengths, lost, left, left, first, after)
    for term in [*rebuilding, *parity_terms(lane.geometry, lane.lengths, lost)]:
        assert term.source_offset % unit == 0
        assert term.target_offset % unit == 0
        at_source_end = term.kind is Kind.IMAGE and term.source_offset + term.nbytes == lane.lengths[term.member]
        assert term.nbytes % unit == 0 or at_source_end or term.target_offset + term.nbytes == length


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lanes())
def test_every_byte_is_covered_by_m_others(lane: Lane) -> None:
    covered = [[set[int]() for _ in image] for image in lane.images]
    for holder in lane.members:
        for term in parity_terms(lane.geometry, lane.lengths, holder):
            assert term.kind is Kind.IMAGE
            assert term.member != holder
            for byte in range(term.source_offset, term.source_offset + term.nbytes):
                assert holder not in covered[term.member][byte]
                covered[term.member][byte].add(holder)
    assert all(len(holders) == lane.geometry.m for image in covered for holders in image)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(2, 24), st.data(), st.integers(1, 5000), st.sampled_from([1, 16, 64]))
def test_shares_are_even(n: int, data: st.DataObject, length: int, unit: int) -> None:
    """Images equally long: every node sends m images, receives m images and stores m segments, within a unit."""
    m = data.draw(st.integers(1, n - 1))
    lengths = [length] * n
    geometry = Geometry.of(lengths, m, unit)
    sent, received = Counter[int](), Counter[int]()
    for holder in range(n):
        for term in parity_terms(geometry, lengths, holder):
            sent[term.member] += term.nbytes
            received[holder] += term.nbytes
    assert [sent[i] for i in range(n)] == [m * length] * n
    assert [received[i] for i in range(n)] == [m * length] * n
    assert 0 <= geometry.segment_bytes - length / geometry.k < unit + 1


@settings(derandomize=True, deadline=None, max_examples=40)
@given(lanes(most=9), st.data())
def test_reedsolo_decodes_every_codeword(lane: Lane, data: st.DataObject) -> None:
    """One byte of each member, in the order of positions, is a codeword of ``reedsolo``: any m of them may be wiped."""
    geometry = lane.geometry
    if not geometry.segment_bytes:
        return
    stripe = data.draw(st.sampled_from(lane.members))
    byte = data.draw(st.integers(0, geometry.segment_bytes - 1))
    word = bytearray()
    for position in range(geometry.n):
        source = (lane.images if position < geometry.k else lane.parities)[geometry.member(stripe, position)]
        at = geometry.offset(position) + byte
        word.append(source[at] if at < len(source) else 0)
    codec = reedsolo.RSCodec(geometry.m, fcr=0, prim=0x11D, generator=2)
    assert codec.encode(word[: geometry.k]) == word
    wiped = data.draw(st.sets(st.sampled_from(lane.members), min_size=1, max_size=geometry.m))
    damaged = bytearray(0 if position in wiped else value for position, value in enumerate(word))
    assert codec.decode(damaged, erase_pos=sorted(wiped))[1] == word
