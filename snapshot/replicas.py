"""Which ranks really hold the same bytes: declared by DDP and device meshes, then checked against the bytes.

Each rank sums up what it shares with each group of replicas; the sums of all ranks are gathered as fixed-size vectors; a
group whose members do not all say the same is not shared: each of its members then keeps its own copy.

Likewise the grids on which tensors are cut (``Slice.chunk``): each rank works them out for itself, and says what it found; where
not all say the same, no rank uses them.
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
from .partition import gridded
from .state import Item

GROUPS: Final = 8  # more groups of replicas than this on one rank: the rest is not shared
VECTOR_LENGTH: Final = 2 + 2 * GROUPS
_UNUSED: Final = -1


def sums(items: Sequence[Item], when: int = 0) -> list[int]:
    """``int64[VECTOR_LENGTH]``: *when*, a digest of the grids, then pairs (group, digest of what this rank shares with it),
    unused ones -1.

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
    return [when, _grids([item.slice for item in items]), *flat] + [_UNUSED] * (VECTOR_LENGTH - 2 - len(flat))


def confirmed(
    slices: Sequence[Slice], gathered: Sequence[Sequence[int]], rank: int
) -> tuple[list[Slice], list[tuple[int, ...]]]:
    """Drop the members of groups that do not agree.

    Args:
        slices: what this rank holds.
        gathered: the vectors of ``sums`` of all ranks, in rank order.
        rank: this rank.

    Returns:
        The slices, with ``members`` only where all members said the same; and the groups that did not. Unless all groups of
        the job agree, nothing that is shared keeps its grid: some ranks hold that state alone now. Unless all ranks have
        found the same grids, nothing does.
    """
    split = disagreeing(gathered, {piece.members for piece in slices if piece.members})
    unsaid = {m for m in {piece.members for piece in slices} if m and _key(m) not in gathered[rank][2::2]}
    alone = {*split, *unsaid}
    held = [replace(piece, members=(), chunk=None) if piece.members in alone else piece for piece in slices]
    if len({vector[1] for vector in gathered}) > 1:
        return [replace(piece, chunk=None) for piece in held], split
    if not _all_agree(gathered):
        return [replace(new, chunk=None) if old.members else new for old, new in zip(slices, held, strict=True)], split
    return held, split


def _all_agree(gathered: Sequence[Sequence[int]]) -> bool:
    """Whether every group of the job is known to agree. All ranks conclude alike: all have gathered the same.

    A rank that says nothing of what it shares, or as much as a vector can hold, may have more to say.
    """
    said: dict[int, set[int]] = {}
    for vector in gathered:
        pairs = [(key, digest) for key, digest in zip(vector[2::2], vector[3::2], strict=True) if key != _UNUSED]
        if not 0 < len(pairs) < GROUPS:
            return False
        for key, digest in pairs:
            said.setdefault(key, set()).add(digest)
    return all(len(digests) == 1 for digests in said.values())


def _grids(slices: Sequence[Slice]) -> int:
    """A digest of the grids of all tensors that have one."""
    facts = sorted((p.name, p.dtype, p.shape, p.chunk) for p in gridded(slices) if p.chunk is not None)
    return _int63(hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).digest())


def disagreeing(gathered: Sequence[Sequence[int]], groups: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of *groups* whose members, by the gathered vectors of all ranks, do not all say the same."""
    said = [dict(zip(vector[2::2], vector[3::2], strict=True)) for vector in gathered]
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
