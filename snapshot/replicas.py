"""Which ranks really hold the same bytes: declared by DDP and device meshes, then checked against the bytes.

Each rank sums up what it shares with each group of replicas; the sums of all ranks are gathered as fixed-size vectors; a
group whose members do not all say the same is not shared: each of its members then keeps its own copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import torch

from ..erasure.kernel import crc32c_at
from .layout import Slice
from .state import Item

GROUPS: Final = 8  # more groups of replicas than this on one rank: the rest is not shared
VECTOR_LENGTH: Final = 1 + 2 * GROUPS
_UNUSED: Final = -1


def sums(items: Sequence[Item], when: int = 0) -> list[int]:
    """``int64[VECTOR_LENGTH]``: *when*, then pairs (group, digest of what this rank shares with it), unused ones -1.

    Reads all bytes that are shared. Only sums of the same time can be compared.
    """
    digests: dict[tuple[int, ...], hashlib.blake2b] = {}
    for item in items:
        if item.slice.members:
            digest = digests.setdefault(item.slice.members, hashlib.blake2b(digest_size=8))
            piece = item.slice
            identity = [piece.name, piece.dtype, piece.shape, piece.start, piece.extent, content_sum(item.tensor)]
            digest.update(json.dumps(identity).encode())
    pairs = [(_key(members), _int63(digest.digest())) for members, digest in sorted(digests.items())][:GROUPS]
    flat = [number for pair in pairs for number in pair]
    return [when, *flat] + [_UNUSED] * (VECTOR_LENGTH - 1 - len(flat))


def confirmed(
    slices: Sequence[Slice], gathered: Sequence[Sequence[int]], rank: int
) -> tuple[list[Slice], list[tuple[int, ...]]]:
    """Drop the members of groups that do not agree.

    Args:
        slices: what this rank holds.
        gathered: the vectors of ``sums`` of all ranks, in rank order.
        rank: this rank.

    Returns:
        The slices, with ``members`` only where all members said the same; and the groups that did not.
    """
    split = disagreeing(gathered, {piece.members for piece in slices if piece.members})
    unsaid = {m for m in {piece.members for piece in slices} if m and _key(m) not in gathered[rank][1::2]}
    alone = {*split, *unsaid}
    return [replace(piece, members=()) if piece.members in alone else piece for piece in slices], split


def disagreeing(gathered: Sequence[Sequence[int]], groups: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of *groups* whose members, by the gathered vectors of all ranks, do not all say the same."""
    said = [dict(zip(vector[1::2], vector[2::2], strict=True)) for vector in gathered]
    return sorted(g for g in set(groups) if len({said[r].get(_key(g)) for r in g}) > 1)


def content_sum(tensor: torch.Tensor) -> int:
    """A checksum of the tensor's bytes: crc32c on the CPU, a sum of 32-bit words elsewhere. Comparable between ranks."""
    dense = tensor.detach()
    if dense.device.type == "cpu":
        dense = dense.contiguous()
        return crc32c_at(dense.data_ptr(), dense.nbytes)
    flat = dense.contiguous().view(-1).view(torch.uint8)
    words = flat[: flat.numel() // 4 * 4].view(torch.int32)
    return int(words.sum(dtype=torch.int64)) + int(flat[words.numel() * 4 :].sum(dtype=torch.int64))


def _key(members: tuple[int, ...]) -> int:
    return _int63(hashlib.blake2b(json.dumps(members).encode(), digest_size=8).digest())


def _int63(digest: bytes) -> int:
    return int.from_bytes(digest, "little") >> 1
