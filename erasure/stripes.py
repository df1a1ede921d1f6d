"""Stripe geometry: which segment of whose image protects which, as sums that any engine can carry out. Pure.

One *lane* of a group: n members, each with an image (of 0 bytes where it has none), m of which may be lost; k = n - m. Images
are padded in thought with zeros to k segments of ``segment_bytes``. There are n stripes, each a codeword of n segments. Member
i has in stripe s

    position p = (i - s - m) mod n        0 <= p < k: data, segment p of its image
                                          k <= p < n: parity of row p - k, segment p - k of its parity image

so that the parity of stripe s lies on members s, s+1, ..., s+m-1 (mod n), and every member gives k segments, stores m, and
has each position in exactly one stripe. All that is ever moved or computed is a list of *terms*

    target[target_offset : +nbytes] ^= coefficient * source[source_offset : +nbytes]        over GF(256), see ``code``

into a target that begins as zeros. What is known to be zero, beyond the end of an image, is in no term.

A segment is a multiple of the *unit* that it was made with. So every term begins at a multiple of the unit in its source and
in its target, and ends at one, or at the end of the source image, or at the end of the target image; if a range was asked for,
then also at the bounds of that range. A term that ends with a target shorter than its source ends within a block of the
source: whoever verifies blocks reads that one whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from .code import Code


class Unrecoverable(ValueError):
    """A stripe has fewer pieces left than it takes to compute the others. The message names it and who is missing."""


class Kind(Enum):
    """What of a member a term reads: its image, or the parity that it holds for the others."""

    IMAGE = "image"
    PARITY = "parity"


@dataclass(frozen=True, slots=True)
class Term:
    """``target[target_offset : +nbytes] ^= coefficient * source[source_offset : +nbytes]``; *nbytes* and *coefficient* > 0.

    The source is the image or the parity image of *member*, an index within the group.
    """

    target_offset: int
    member: int
    kind: Kind
    source_offset: int
    nbytes: int
    coefficient: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a lane of *n* members is cut into stripes, *m* segments of each being parity. See the module for the rule."""

    n: int
    m: int
    segment_bytes: int

    @classmethod
    def of(cls, lengths: Sequence[int], m: int, unit: int) -> Geometry:
        """The geometry of images of *lengths* bytes, in member order.

        Args:
            lengths: may be 0; if all are, segments have 0 bytes.
            m: members that may be lost; ``1 <= m < len(lengths)``.
            unit: segments are a multiple of this many bytes, above 0.

        Raises:
            ValueError: an argument breaks a bound above.
        """
        n = len(lengths)
        if not 1 <= m < n:
            raise ValueError(f"{m} of {n} members cannot be parity: 1 <= m < n")
        if unit < 1 or min(lengths) < 0:
            raise ValueError(f"lengths must not be negative, nor the unit below 1: {min(lengths)}, {unit}")
        per_segment = -(-max(lengths) // (n - m))
        return cls(n, m, -(-per_segment // unit) * unit)

    @property
    def k(self) -> int:
        """Data segments of a stripe, and segments of an image."""
        return self.n - self.m

    @property
    def parity_bytes(self) -> int:
        """Length of every member's parity image: its m parity segments one after the other, row 0 first."""
        return self.m * self.segment_bytes

    def position(self, member: int, stripe: int) -> int:
        """Where *member* stands in the codeword of *stripe*: ``0..k-1`` data, ``k..n-1`` parity."""
        return (member - stripe - self.m) % self.n

    def member(self, stripe: int, position: int) -> int:
        """Who stands at *position* in the codeword of *stripe*."""
        return (stripe + self.m + position) % self.n

    def stripe(self, member: int, position: int) -> int:
        """The one stripe in which *member* stands at *position*."""
        return (member - self.m - position) % self.n

    def kind(self, position: int) -> Kind:
        """Whether the segment at *position* is part of its member's image or of its parity image."""
        return Kind.IMAGE if position < self.k else Kind.PARITY

    def offset(self, position: int) -> int:
        """Where the segment at *position* begins within its member's image, or parity image, in bytes."""
        return (position if position < self.k else position - self.k) * self.segment_bytes


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes ``first .. last-1`` of every segment of one stripe, of which the segment at *position* is wanted."""

    stripe: int
    position: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """What of a ``_Part`` the segment at *position* can give; 0 bytes if it is known to be zero throughout."""

    position: int
    nbytes: int


def parity_terms(
    geometry: Geometry, lengths: Sequence[int], member: int, start: int = 0, end: int | None = None
) -> list[Term]:
    """What builds the parity image of *member*, of ``geometry.parity_bytes`` bytes, from the images of the others.

    Args:
        geometry: of images of these lengths, or longer ones.
        lengths: bytes of each member's image, in member order. Terms never reach beyond them.
        member: whose parity.
        start: first byte of the parity image that is wanted.
        end: the byte after the last one that is wanted; without it, or beyond the parity image, all that follow.

    Returns:
        Terms in the order of the target, those of one target segment by position. Targets that no term names are zero.

    Raises:
        ValueError: *lengths* or *member* do not fit the geometry, or *start* is negative.
    """
    _check(geometry, lengths, member)
    parity = Code.of(geometry.k, geometry.m).parity
    terms = []
    for part in _parts(geometry, member, geometry.k, start, geometry.parity_bytes, end):
        for position in range(geometry.k):
            piece = _piece(geometry, lengths, part, position)
            coefficient = int(parity[part.position - geometry.k, position])
            terms.append(_term(geometry, part, piece, coefficient))
    return [term for term in terms if term.nbytes]


def rebuild_terms(
    geometry: Geometry,
    lengths: Sequence[int],
    lost: int,
    images: Collection[int],
    parities: Collection[int],
    start: int = 0,
    end: int | None = None,
) -> list[Term]:
    """What rebuilds the image of member *lost*, or a range of it, from what the other members still have.

    Of each stripe, k pieces are read: first what is known to be zero (and costs nothing), then from the members that have been
    asked for least so far, data before parity. So all survivors are asked for about as much, where there is a choice.

    Args:
        geometry: of images of these lengths, or longer ones.
        lengths: bytes of each member's image, in member order. Terms never reach beyond them, in source or target.
        lost: whose image is wanted. It is never a source of it.
        images: members whose image can be had. It does not matter whether *lost* is among them.
        parities: members whose parity image can be had.
        start: first byte of the image that is wanted.
        end: the byte after the last one that is wanted; without it, or beyond the image, all that follow. Where sources are
            verified in blocks, *start* and *end* should be multiples of the unit: terms then begin where blocks begin.

    Returns:
        Terms in the order of the target, those of one target segment by position. Targets that no term names are zero.

    Raises:
        Unrecoverable: a stripe that is needed has fewer than k pieces left.
        ValueError: *lengths* or *lost* do not fit the geometry, or *start* is negative.
    """
    _check(geometry, lengths, lost)
    code = Code.of(geometry.k, geometry.m)
    parts = list(_parts(geometry, lost, 0, start, lengths[lost], end))
    choices = [_pieces(geometry, lengths, part, images, parities) for part in parts]
    terms = []
    for part, chosen in zip(parts, _evenly(geometry, parts, choices), strict=True):
        row = code.coefficients([piece.position for piece in chosen], [part.position])[0]
        terms += [_term(geometry, part, piece, int(row[i])) for i, piece in enumerate(chosen)]
    return [term for term in terms if term.nbytes]


def _check(geometry: Geometry, lengths: Sequence[int], member: int) -> None:
    if len(lengths) != geometry.n or not 0 <= member < geometry.n:
        raise ValueError(f"{len(lengths)} lengths and member {member} do not fit a group of {geometry.n}")
    if min(lengths) < 0 or max(lengths) > geometry.k * geometry.segment_bytes:
        room = f"{geometry.k} segments of {geometry.segment_bytes} bytes"
        raise ValueError(f"images of {min(lengths)} to {max(lengths)} bytes do not fit {room}")


def _parts(geometry: Geometry, member: int, base: int, start: int, length: int, end: int | None) -> Iterator[_Part]:
    """The range ``start .. end-1`` of an image of *member* of *length* bytes, cut where its segments end.

    *base* is the position of that image's first segment: 0 for the image, k for the parity image.
    """
    if start < 0:
        raise ValueError(f"a range cannot begin at byte {start}")
    stop = length if end is None else min(end, length)
    while start < stop:
        number, first = divmod(start, geometry.segment_bytes)
        last = min(geometry.segment_bytes, first + stop - start)
        yield _Part(geometry.stripe(member, base + number), base + number, first, last)
        start += last - first


def _piece(geometry: Geometry, lengths: Sequence[int], part: _Part, position: int) -> _Piece:
    nbytes = part.last - part.first
    if geometry.kind(position) is Kind.IMAGE:
        member = geometry.member(part.stripe, position)
        nbytes = max(0, min(nbytes, lengths[member] - geometry.offset(position) - part.first))
    return _Piece(position, nbytes)


def _pieces(
    geometry: Geometry, lengths: Sequence[int], part: _Part, images: Collection[int], parities: Collection[int]
) -> list[_Piece]:
    """All that is known, or can be had, of *part* without its wanted segment; at least k pieces."""
    found, missing = [], []
    for position in range(geometry.n):
        if position == part.position:
            continue
        member, piece = geometry.member(part.stripe, position), _piece(geometry, lengths, part, position)
        if piece.nbytes == 0 or member in (images if geometry.kind(position) is Kind.IMAGE else parities):
            found.append(piece)
        else:
            missing.append(f"{geometry.kind(position).value} of member {member}")
    if len(found) < geometry.k:
        wanted = geometry.member(part.stripe, part.position)
        raise Unrecoverable(
            f"stripe {part.stripe} has {len(found)} of the {geometry.k} pieces that it takes to rebuild member {wanted}; "
            f"missing: {', '.join(sorted(missing))}"
        )
    return found


def _evenly(geometry: Geometry, parts: list[_Part], choices: list[list[_Piece]]) -> list[list[_Piece]]:
    """k pieces for each part, by position, such that no member is asked for much more than another.

    Parts with the least choice come first, so that those with more can make up for them.
    """
    asked_bytes = Counter[int]()
    chosen: list[list[_Piece]] = [[] for _ in parts]
    for i in sorted(range(len(parts)), key=lambda i: (len(choices[i]), i)):

        def cost(piece: _Piece, stripe: int = parts[i].stripe) -> tuple[bool, int, int]:
            after = asked_bytes[geometry.member(stripe, piece.position)] + piece.nbytes
            return piece.nbytes > 0, after, piece.position

        chosen[i] = sorted(sorted(choices[i], key=cost)[: geometry.k], key=lambda piece: piece.position)
        for piece in chosen[i]:
            asked_bytes[geometry.member(parts[i].stripe, piece.position)] += piece.nbytes
    return chosen


def _term(geometry: Geometry, part: _Part, piece: _Piece, coefficient: int) -> Term:
    return Term(
        target_offset=geometry.offset(part.position) + part.first,
        member=geometry.member(part.stripe, piece.position),
        kind=geometry.kind(piece.position),
        source_offset=geometry.offset(piece.position) + part.first,
        nbytes=piece.nbytes,
        coefficient=coefficient,
    )
