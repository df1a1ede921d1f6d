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
from ..errors import Corrupt
from ..snapshot.record import BLOCK_SIZES, Record
from .guard import Offer


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """One image's record, block checksums (``uint32[blocks]``) and layout text, which agree with each other."""

    record: Record
    checks: npt.NDArray[np.uint32]
    layout: bytes

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
