"""Stripes by example: where segments lie, what a mirror and plain XOR come to, what is refused and how it is said."""

from __future__ import annotations

import pytest
from holdfast.erasure.code import Code
from holdfast.erasure.stripes import Geometry, Kind, Term, Unrecoverable, parity_terms, rebuild_terms

IMAGE, PARITY = Kind.IMAGE, Kind.PARITY


def test_a_group_of_five() -> None:
    """Who has what in each stripe of 3+2: a digit is the segment of an image, a letter a row of parity."""
    geometry = Geometry.of([30] * 5, 2, 1)
    table = [
        " ".join("012ab"[geometry.position(member, stripe)] for member in range(5)) for stripe in range(geometry.n)
    ]
    assert table == [
        "a b 0 1 2",
        "2 a b 0 1",
        "1 2 a b 0",
        "0 1 2 a b",
        "b 0 1 2 a",
    ]


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 2), (6, 2), (7, 3), (32, 8)])
def test_positions_lead_there_and_back(n: int, m: int) -> None:
    geometry = Geometry(n, m, 8)
    for stripe in range(n):
        assert {geometry.position((stripe + row) % n, stripe) for row in range(m)} == set(range(geometry.k, n))
        for member in range(n):
            position = geometry.position(member, stripe)
            assert geometry.member(stripe, position) == member
            assert geometry.stripe(member, position) == stripe
            assert geometry.kind(position) is (IMAGE if position < n - m else PARITY)
    assert [geometry.offset(p) for p in range(n)] == [8 * p for p in range(n - m)] + [8 * r for r in range(m)]


@pytest.mark.parametrize(
    ("lengths", "m", "unit", "segment_bytes"),
    [
        ([100, 100, 100], 1, 1, 50),
        ([101, 3, 0], 1, 1, 51),
        ([101, 3, 0], 1, 16, 64),
        ([128, 0, 0], 1, 16, 64),
        ([1, 0, 0], 2, 4096, 4096),
        ([0, 0], 1, 4096, 0),
    ],
)
def test_segments_hold_the_longest_image(lengths: list[int], m: int, unit: int, segment_bytes: int) -> None:
    geometry = Geometry.of(lengths, m, unit)
    assert geometry == Geometry(len(lengths), m, segment_bytes)
    assert geometry.parity_bytes == m * segment_bytes


@pytest.mark.parametrize(("n", "m", "unit"), [(2, 0, 1), (2, 2, 1), (1, 1, 1), (0, 0, 1), (2, 1, 0)])
def test_impossible_geometries_are_refused(n: int, m: int, unit: int) -> None:
    with pytest.raises(ValueError, match=r"must not|cannot"):
        Geometry.of([1] * n, m, unit)


def test_negative_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        Geometry.of([4, -1], 1, 1)


def test_two_nodes_mirror() -> None:
    """The k = 1 case: each holds the other's image, and gives it back. All are copies."""
    geometry = Geometry.of([10, 7], 1, 4)
    assert geometry == Geometry(2, 1, 12)
    assert parity_terms(geometry, [10, 7], 0) == [Term(0, 1, IMAGE, 0, 7, 1)]
    assert parity_terms(geometry, [10, 7], 1) == [Term(0, 0, IMAGE, 0, 10, 1)]
    assert rebuild_terms(geometry, [10, 7], 0, [1], [1]) == [Term(0, 1, PARITY, 0, 10, 1)]
    assert rebuild_terms(geometry, [10, 7], 1, [0], [0]) == [Term(0, 0, PARITY, 0, 7, 1)]


def test_one_parity_is_plain_xor() -> None:
    lengths = [40, 37, 40, 12]
    geometry = Geometry.of(lengths, 1, 4)
    for member in range(4):
        assert {term.coefficient for term in parity_terms(geometry, lengths, member)} == {1}
        others = set(range(4)) - {member}
        assert {term.coefficient for term in rebuild_terms(geometry, lengths, member, others, others)} == {1}


def test_parity_uses_the_matrix_of_the_code() -> None:
    geometry = Geometry.of([30] * 5, 2, 1)
    parity = Code.of(3, 2).parity
    assert parity_terms(geometry, [30] * 5, 1) == [
        # Row a of stripe 1, then row b of stripe 0: see the table above.
        Term(0, 3, IMAGE, 0, 10, int(parity[0, 0])),
        Term(0, 4, IMAGE, 10, 10, int(parity[0, 1])),
        Term(0, 0, IMAGE, 20, 10, int(parity[0, 2])),
        Term(10, 2, IMAGE, 0, 10, int(parity[1, 0])),
        Term(10, 3, IMAGE, 10, 10, int(parity[1, 1])),
        Term(10, 4, IMAGE, 20, 10, int(parity[1, 2])),
    ]


def test_a_range_is_a_range() -> None:
    """Bytes 8 to 15 of an image of segments of 10 bytes: the end of one, the beginning of the next."""
    lengths = [20] * 3
    geometry = Geometry.of(lengths, 1, 1)
    terms = rebuild_terms(geometry, lengths, 0, [1, 2], [1, 2], 8, 16)
    assert [(term.target_offset, term.nbytes) for term in terms] == [(8, 2), (8, 2), (10, 6), (10, 6)]
    assert rebuild_terms(geometry, lengths, 0, [1, 2], [1, 2], 20) == []
    assert rebuild_terms(geometry, lengths, 0, [1, 2], [1, 2], 5, 5) == []
    assert rebuild_terms(geometry, lengths, 0, [1, 2], [1, 2], 0, 99) == rebuild_terms(
        geometry, lengths, 0, [1, 2], [1, 2]
    )


def test_what_is_known_to_be_zero_counts_as_a_piece() -> None:
    """A lane that only two of four members have: one loss more than m is survived, and no empty image is read."""
    lengths = [8, 8, 0, 0]
    geometry = Geometry.of(lengths, 1, 1)
    for term in rebuild_terms(geometry, lengths, 0, [1], [1, 2, 3]):
        assert (term.member, term.kind) != (1, IMAGE) or term.source_offset + term.nbytes <= 8
        assert term.kind is PARITY or term.member == 1
    assert rebuild_terms(geometry, lengths, 2, [], []) == []
    assert rebuild_terms(Geometry.of([0, 0], 1, 4096), [0, 0], 0, [], []) == []
    assert parity_terms(Geometry.of([0, 0], 1, 4096), [0, 0], 0) == []


def test_stripes_without_a_choice_come_first() -> None:
    """Segment 1 must be read from members 1 and 2; segment 0, which could be too, then is read from 3 and 4."""
    lengths = [20] * 5
    terms = rebuild_terms(Geometry.of(lengths, 3, 1), lengths, 0, [1], [2, 3, 4])
    assert sorted(term.member for term in terms) == [1, 2, 3, 4]


def test_what_cannot_be_rebuilt_is_named() -> None:
    lengths = [9] * 4
    geometry = Geometry.of(lengths, 1, 1)
    with pytest.raises(Unrecoverable) as raised:
        rebuild_terms(geometry, lengths, 0, [1, 2], [1, 2])
    assert str(raised.value) == (
        "stripe 3 has 2 of the 3 pieces that it takes to rebuild member 0; missing: parity of member 3"
    )
    # Its last two segments lie in stripes 2 and 1, of which member 3 has data.
    with pytest.raises(Unrecoverable, match=r"stripe 2 .* missing: image of member 3"):
        rebuild_terms(geometry, lengths, 0, [1, 2], [1, 2], 3, 6)
    # Without the parity of member 3 alone, the other segments are still there.
    assert rebuild_terms(geometry, lengths, 0, [1, 2, 3], [1, 2], 3)


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 9, 9, 10], [9, 9, 9, -1]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    geometry = Geometry.of([9] * 4, 1, 1)
    with pytest.raises(ValueError, match="do not fit"):
        parity_terms(geometry, lengths, 0)
    with pytest.raises(ValueError, match="do not fit"):
        rebuild_terms(geometry, lengths, 0, range(4), range(4))


def test_members_and_ranges_that_do_not_exist_are_refused() -> None:
    geometry = Geometry.of([9] * 4, 1, 1)
    with pytest.raises(ValueError, match="member 4"):
        parity_terms(geometry, [9] * 4, 4)
    with pytest.raises(ValueError, match="byte -1"):
        rebuild_terms(geometry, [9] * 4, 0, range(4), range(4), -1, 3)
