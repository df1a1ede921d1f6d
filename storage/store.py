"""What a tier is to the rest of Holdfast: a place for objects under keys, each there as a whole or not at all.

Keys are relative, of the form ``a/b/c``; what lies under ``a/b/`` is called a folder, whether the store has folders or not.
Nothing here knows snapshots: ``names`` says what the keys mean, ``documents`` what small objects look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, Corrupt

Names = list[str]  # inside a class with a method of that name, list means the method
Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
TIMEOUT_S = 60.0
GET_BYTES = 256 << 20  # no document is longer
KEY_BYTES = 900  # object stores end at 1024, of which the tier's own path takes some
PART_BYTES = 255  # of one name of a file system


@dataclass(frozen=True, slots=True)
class Found:
    """An object that a store holds. ``modified_s`` is the time of its last put, by the store's own clock."""

    key: str
    nbytes: int
    modified_s: float


class Store(Protocol):
    """A place for objects. One event loop uses it; several processes and nodes may use the same place at once.

    All methods raise ``TierUnreachable`` when the place does not answer in time or refuses, ``TierFull`` when it has no
    room, ``ObjectMissing`` for a key that is not there, and ``Corrupt`` for a text that is no key: keys are read from
    documents that others wrote.

    Attributes:
        url: where this is, without credentials: it goes into messages.
    """

    url: str

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        """Make *parts*, one after the other, the object *key*, in place of any that is there.

        A reader sees the old object or the new one, never part of one, whatever dies when. When this returns, the
        object survives a power cut; without *durable* that, and that it can be seen at all, may wait for ``settle``.
        The buffers must not change before this returns, nor before it raises: it does neither while it still reads
        them. After an error the object may or may not be there, as a whole.
        """
        ...

    async def settle(self) -> None:
        """Return when everything put so far is there and survives a power cut. If it raises, some of it may not be
        there: put it again, or use another store object of the same place for something else."""
        ...

    async def forget(self, keys: Sequence[str]) -> None:
        """Give up what was put under these keys and waits for ``settle``, which would fail for those that cannot get there.
        What others can see already stays."""
        ...

    async def confirm(self, prefix: str) -> None:
        """Return when all that can be seen under the folder *prefix* survives a power cut, whoever put it.

        An object can be seen a moment before its put returns. Whoever deletes one object because there is another
        must have that one confirmed between looking and deleting.
        """
        ...

    async def get(self, key: str) -> bytes:
        """The whole object; for small ones, up to ``GET_BYTES``."""
        ...

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        """Read the object into *parts*, which it fills exactly, one after the other.

        Raises:
            Corrupt: it is longer or shorter. Contents are not checked. After any error *parts* hold anything; they
                are not touched any more.
        """
        ...

    async def list(self, prefix: str) -> list[Found]:
        """All objects under the folder *prefix*, which ends with ``/`` (or is empty: all), sorted by key."""
        ...

    async def children(self, prefix: str) -> Names:
        """The names of the folders directly under *prefix*, sorted. Some servers show an emptied one for a while."""
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove the objects, for good when this returns. Keys that are not there are fine; empty folders vanish."""
        ...

    async def sweep(self, older_than_s: float) -> int:
        """Remove what puts that never ended have left: of processes known to be dead, and all that are as old as this.
        Returns how many bytes that freed."""
        ...

    async def free_bytes(self) -> int | None:
        """How much more fits, or None where there is no limit known."""
        ...

    async def close(self) -> None:
        """Give up what was put without having been settled, and release threads and connections."""
        ...


def open_store(url: str, *, timeout_s: float = TIMEOUT_S) -> Store:
    """The store at *url*: ``file:///folder``, a path, ``s3://``, ``gs://``, ``az://``, or ``memory://`` (for tests).

    Nothing is created or asked before the first operation. Credentials come from the environment and from files, as is
    usual for the kind of store. *timeout_s* is how long an operation may go without getting anywhere.

    Raises:
        ConfigError: no such kind of store, or not a complete URL.
    """
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme in ("", "file"):
        from .files import FileStore

        return FileStore(folder_of(url), timeout_s=timeout_s)
    from .objects import SCHEMES, ObjectStore

    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *SCHEMES))
        raise ConfigError(f"{url!r} is no tier: {scheme}:// is not one of {known}")
    return ObjectStore(url, timeout_s=timeout_s)


def folder_of(url: str) -> Path:
    """The absolute folder that a ``file://`` URL or a path means."""
    if not url:
        raise ConfigError("a tier's URL is empty")
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is no folder: a file URL has three slashes and an absolute path")
    return Path(unquote(parts.path))


def is_key(text: str) -> bool:
    """Whether *text* can be a key: relative, with no way out of the tier, and not too long for any store."""
    parts = text.split("/")
    plain = text.isascii() and text.isprintable() and "\\" not in text and len(text) <= KEY_BYTES
    return plain and all(part not in ("", ".", "..") and len(part) <= PART_BYTES for part in parts)


def checked(key: str) -> str:
    """*key*, or Corrupt if it is none."""
    if not is_key(key):
        raise Corrupt(f"{key[:200]!r} is not the key of an object")
    return key


def checked_prefix(prefix: str) -> str:
    """*prefix*, or Corrupt if it is no folder."""
    if prefix and not (prefix.endswith("/") and is_key(prefix[:-1])):
        raise Corrupt(f"{prefix[:200]!r} is not a folder of objects")
    return prefix
