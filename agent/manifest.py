"""What must be known of an image to verify its bytes and to put it back: small, and copied to every member of its group.

A cell's table, its *text*, is a JSON line, then the raw checksums and layouts of all members' images in order::

    {"tolerance": m, "me": index, "key": …, "members": [{"record": hex, "checks": bytes, "layout": bytes} | null, …]}

The text is covered by a checksum in the cell's record, as a layout is in a slot's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..erasure.kernel import crc32c
from ..erasure.stripes import Geometry
from ..errors import Corrupt
from ..snapshot.record import BLOCK_SIZES, Record
from ..snapshot.unchanged import Mask, Unchanged, blocks_within
from .guard import Offer


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """One image's record, block checksums (``uint32[blocks]``) and layout text, which agree with each other."""

    record: Record
    checks: npt.NDArray[np.uint32]
    layout: bytes
    unchanged: Unchanged | None = None  # as its trainer said; not part of a cell's table

    @classmethod
    def of(cls, record: bytes, checks: bytes, layout: bytes) -> Manifest:
        """From what another agent sent, or memory held. Raises ``Corrupt`` unless all parts fit together."""
        found, _ = Record.from_bytes(record)
        if found.block_bytes not in BLOCK_SIZES:  # buffers and cells are made of that size
            raise Corrupt(
                f"the record of {found.id} of rank {found.rank} speaks of blocks of {found.block_bytes} bytes"
            )
        sums = np.frombuffer(checks, np.uint32) if len(checks) % 4 == 0 else np.empty(0, np.uint32)
        blocks = -(-found.image_bytes // found.block_bytes)
        if len(sums) != blocks or crc32c(checks) != found.checks_crc or crc32c(layout) != found.layout_crc:
            raise Corrupt(f"the manifest of {found.id} of rank {found.rank} does not match its own checksums")
        return cls(found, sums, layout)

    def offer(self, member: int, lane: int) -> Offer:
        """The image as the protocol sees it."""
        r = self.record
        return Offer(member, lane, r.rank, r.id, r.nonce, r.image_bytes, r.block_bytes, r.checks_crc)


@dataclass(frozen=True, slots=True, eq=False)
class CellTable:
    """What a cell says of itself: whose images, in which order, its own place among them, and the code.

    Attributes:
        manifests: of each member's image in this lane, None where it has no rank.
        me: index of the member whose parity this is.
        tolerance: m.
        key: as ``guard.key_of``.
    """

    manifests: tuple[Manifest | None, ...]
    me: int
    tolerance: int
    key: int

    @property
    def lengths(self) -> list[int]:
        """Bytes of each member's image."""
        return [0 if m is None else m.record.image_bytes for m in self.manifests]

    @property
    def unit(self) -> int:
        """The longest checksum block of any image: where segments are cut."""
        return max(m.record.block_bytes for m in self.manifests if m is not None)

    @property
    def ranks(self) -> list[int]:
        """The rank of each member in this lane, -1 where it has none."""
        return [-1 if m is None else m.record.rank for m in self.manifests]

    @property
    def geometry(self) -> Geometry:
        """How the lane is cut."""
        return Geometry.of(self.lengths, self.tolerance, self.unit)

    def same_parity(self, before: CellTable) -> Mask:
        """``bool[blocks]``: which blocks, of the unit, of this parity are those of *before*, as none of the images differs there.

        That a segment is unchanged is only believed of the very images that went into *before*.
        """
        geometry, row_blocks = self.geometry, self.geometry.segment_bytes // self.unit
        same = np.zeros((geometry.m, row_blocks), np.bool_)
        cut = (before.me, before.unit, before.geometry) == (self.me, self.unit, geometry)
        if cut:
            nbytes = geometry.k * geometry.segment_bytes
            pairs = zip(self.manifests, before.manifests, strict=True)
            members = [_same_blocks(now, then, nbytes, self.unit).reshape(geometry.k, -1) for now, then in pairs]
            for row in range(geometry.m):
                stripe = geometry.stripe(self.me, geometry.k + row)
                parts = [members[geometry.member(stripe, position)][position] for position in range(geometry.k)]
                same[row] = np.logical_and.reduce(parts)
        return same.reshape(-1)

    def to_text(self) -> bytes:
        """The cell's text."""
        members = [
            None
            if m is None
            else {"record": m.record.to_bytes().hex(), "checks": m.checks.nbytes, "layout": len(m.layout)}
            for m in self.manifests
        ]
        head = {"tolerance": self.tolerance, "me": self.me, "key": self.key, "members": members}
        parts = [json.dumps(head).encode(), b"\n"]
        for manifest in self.manifests:
            if manifest is not None:
                parts += [manifest.checks.tobytes(), manifest.layout]
        return b"".join(parts)

    @classmethod
    def from_text(cls, text: bytes) -> CellTable:
        """Inverse of ``to_text``. Raises ``Corrupt``."""
        head, _, rest = text.partition(b"\n")
        try:
            found = json.loads(head)
            manifests: list[Manifest | None] = []
            for member in found["members"]:
                if member is None:
                    manifests.append(None)
                    continue
                checks, layout = int(member["checks"]), int(member["layout"])
                manifests.append(
                    Manifest.of(bytes.fromhex(member["record"]), rest[:checks], rest[checks : checks + layout])
                )
                rest = rest[checks + layout :]
            table = cls(tuple(manifests), int(found["me"]), int(found["tolerance"]), int(found["key"]))
            if not (0 <= table.me < len(manifests) and 0 < table.tolerance < len(manifests) and any(manifests)):
                raise ValueError(f"member {table.me} of {len(manifests)}, {table.tolerance} of whom may be lost")
            return table
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise Corrupt(f"a parity cell's table cannot be read: {error}") from error


def _same_blocks(now: Manifest | None, then: Manifest | None, nbytes: int, unit: int) -> Mask:
    """Which blocks of an image, padded with zeros to *nbytes*, are those that another image of that member had there."""
    if now is None or then is None:
        return np.full(nbytes // unit, now is then)
    if now.record.rank != then.record.rank or now.unchanged is None or now.unchanged.since != then.record.nonce:
        return np.zeros(nbytes // unit, np.bool_)
    shorter, longer = sorted((now.record.image_bytes, then.record.image_bytes))
    ranges = [(start, min(end, shorter)) for start, end in now.unchanged.ranges]
    return blocks_within([*ranges, (longer, nbytes)], nbytes, unit)
