"""What the objects of a tier are called, both ways. Pure; ``docs/tiers.md`` has the tree.

Names of snapshots sort as snapshots do, oldest first. Names of tensors become one part of a path: letters, digits and
``._-`` stay, all else is percent-encoded, and so is the first character of names that mean something to zarr, to file
systems or to us. What is too long for a file system is cut, with a digest in place of the rest: ``prefix~digest``.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from typing import Final
from urllib.parse import unquote_to_bytes

from ..snapshot.record import SnapshotId

ENTRIES: Final = "entries/"
SNAPSHOTS: Final = "snapshots/"
READERS: Final = "readers/"
DELETED: Final = "deleted/"
GROUP: Final = "zarr.json"  # the metadata of an array or group, under its path

_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_RESERVED: Final = frozenset({".", "..", GROUP, "c", "ranks"})
_PART_CHARS: Final = 200  # file systems take 255 bytes
_KEPT_CHARS: Final = 150  # of a name that is longer
_SNAPSHOT: Final = re.compile(r"([0-9]{10})-([0-9]{16})-([0-9a-f]{32})", re.ASCII)
_ENTRY: Final = re.compile(r"([0-9]{6})-of-([0-9]{6})\.json", re.ASCII)


def snapshot_name(id: SnapshotId) -> str:
    """Its name in every tier."""
    return f"{id.generation:010d}-{id.step:016d}-{id.run}"


def parse_snapshot(name: str) -> SnapshotId | None:
    """The snapshot of that name, or None if it is no such name."""
    match = _SNAPSHOT.fullmatch(name)
    return SnapshotId(int(match[1]), int(match[2]), match[3]) if match else None


def entries_of(id: SnapshotId) -> str:
    """The folder of its entries."""
    return f"{ENTRIES}{snapshot_name(id)}/"


def entry_key(id: SnapshotId, rank: int, world: int) -> str:
    """The object whose presence commits that rank's part."""
    return f"{entries_of(id)}{rank:06d}-of-{world:06d}.json"


def parse_entry(key: str) -> tuple[SnapshotId, int, int] | None:
    """Snapshot, rank and world of an entry's key, or None if it is no such key."""
    folder, _, name = key.removeprefix(ENTRIES).rpartition("/")
    id, match = parse_snapshot(folder), _ENTRY.fullmatch(name)
    if id is None or match is None or not key.startswith(ENTRIES):
        return None
    rank, world = int(match[1]), int(match[2])
    return (id, rank, world) if rank < world else None


def whole_key(id: SnapshotId) -> str:
    """The object that says, where each node has a disk of its own, that all of them hold their parts."""
    return f"{entries_of(id)}whole.json"


def parse_whole(key: str) -> SnapshotId | None:
    """The snapshot of such a key, or None if it is no such key."""
    folder, _, name = key.removeprefix(ENTRIES).rpartition("/")
    return parse_snapshot(folder) if name == "whole.json" and key.startswith(ENTRIES) else None


def data_of(id: SnapshotId) -> str:
    """The folder of its zarr group; keys in entries are relative to it."""
    return f"{SNAPSHOTS}{snapshot_name(id)}/"


def readers_of(id: SnapshotId) -> str:
    """The folder of its readers' leases."""
    return f"{READERS}{snapshot_name(id)}/"


def lease_key(id: SnapshotId, reader: uuid.UUID) -> str:
    """The object by which one reader says that it is reading."""
    return f"{readers_of(id)}{reader}.json"


def tombstone_key(id: SnapshotId) -> str:
    """The object whose presence says that the snapshot is deleted."""
    return f"{DELETED}{snapshot_name(id)}.json"


def parse_tombstone(key: str) -> SnapshotId | None:
    """The snapshot that a tombstone's key names, or None if it is no such key."""
    if not (key.startswith(DELETED) and key.endswith(".json")):
        return None
    return parse_snapshot(key[len(DELETED) : -len(".json")])


def dooms_of(id: SnapshotId) -> str:
    """The folder in which those say so who are about to delete it unfinished."""
    return f"{DELETED}{snapshot_name(id)}/"


def doom_key(id: SnapshotId, deleter: uuid.UUID) -> str:
    """The object by which one of them says so."""
    return f"{dooms_of(id)}{deleter}.json"


def is_doom(key: str) -> bool:
    """Whether it is such a key."""
    folder, _, name = key.removeprefix(DELETED).partition("/")
    return key.startswith(DELETED) and parse_snapshot(folder) is not None and name.endswith(".json") and "/" not in name


def tensor_path(name: str) -> str:
    """Where, in the snapshot's group, the array of a tensor is that all ranks share."""
    return encode_name(name)


def rank_path(rank: int) -> str:
    """Where, in the snapshot's group, the group of one rank is."""
    return f"ranks/{rank:06d}"


def values_path(rank: int) -> str:
    """Where, in the snapshot's group, the eager values of one rank are."""
    return f"{rank_path(rank)}/values"


def private_path(rank: int, name: str) -> str:
    """Where, in the snapshot's group, a tensor is of which each rank stores its own slice by itself."""
    return f"{rank_path(rank)}/tensors/{encode_name(name)}"


def encode_name(name: str) -> str:
    """*name* as one part of a path. Different names give different parts."""
    raw = name.encode(errors="surrogatepass")
    text = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
    if text in _RESERVED or text.startswith("__"):
        text = f"%{raw[0]:02X}{text[1:]}"
    if text and len(text) <= _PART_CHARS:
        return text
    # Whoever reads the array finds the whole name in its attributes.
    return f"{text[:_KEPT_CHARS]}~{hashlib.sha256(raw).hexdigest()[:32]}"


def decode_name(part: str) -> str | None:
    """The name that ``encode_name`` made *part* of; None if it was too long to be kept, or *part* was not made so."""
    try:
        name = unquote_to_bytes(part).decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return None
    return name if encode_name(name) == part else None
