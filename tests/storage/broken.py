"""A good store with faults at chosen operations: whoever uses a store must come to a named end with any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from holdfast.errors import Corrupt, ObjectMissing, TierFull, TierUnreachable
from holdfast.storage.store import Buffer, Found, Names, Store

Operation = Literal["put", "settle", "confirm", "get", "read_into", "list", "children", "delete", "sweep", "free_bytes"]
Kind = Literal["fail", "full", "missing", "deaf", "flip", "cut"]


@dataclass(slots=True)
class Fault:
    """What goes wrong when an operation has come *after* times, on keys that contain *key*; *times* in a row.

    ``fail``, ``full`` and ``missing`` raise that error and do nothing. ``deaf`` does it, and then fails: an answer that
    was lost. ``flip`` changes the middle bit of what is put, got or read; ``cut`` does without its second half.
    """

    operation: Operation
    kind: Kind
    after: int = 0
    key: str = ""
    times: int = 1

    def strikes(self, operation: str, key: str) -> bool:
        """Whether it does now. Counts."""
        if operation != self.operation or self.key not in key:
            return False
        self.after -= 1
        return -self.times <= self.after < 0


class Broken:
    """*inner* with *faults*. ``calls`` has every operation and its key, also those that went well."""

    def __init__(self, inner: Store, *faults: Fault) -> None:
        self.url = inner.url
        self.faults = faults
        self.calls: list[tuple[str, str]] = []
        self._inner = inner

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        kind = self._strike("put", key)
        data = b"".join(bytes(memoryview(part)) for part in parts)  # type: ignore[arg-type]
        await self._inner.put(key, [_changed(kind, data)] if kind in ("flip", "cut") else parts, durable=durable)
        self._deaf(kind, "put", key)

    async def settle(self) -> None:
        kind = self._strike("settle", "")
        await self._inner.settle()
        self._deaf(kind, "settle", "")

    async def forget(self, keys: Sequence[str]) -> None:
        self._strike("forget", "")
        await self._inner.forget(keys)

    async def confirm(self, prefix: str) -> None:
        self._strike("confirm", prefix)
        await self._inner.confirm(prefix)

    async def get(self, key: str) -> bytes:
        kind = self._strike("get", key)
        return _changed(kind, await self._inner.get(key))

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        kind = self._strike("read_into", key)
        await self._inner.read_into(key, parts)
        if kind == "cut":
            raise Corrupt(f"{key} in {self.url} is shorter")
        if kind == "flip":
            longest = np.frombuffer(max(parts, key=lambda part: part.nbytes), np.uint8)
            longest[longest.nbytes // 2] ^= 1

    async def list(self, prefix: str) -> list[Found]:
        self._strike("list", prefix)
        return await self._inner.list(prefix)

    async def children(self, prefix: str) -> Names:
        self._strike("children", prefix)
        return await self._inner.children(prefix)

    async def delete(self, keys: Sequence[str]) -> None:
        kind = self._strike("delete", " ".join(keys))
        await self._inner.delete(keys[: len(keys) // 2] if kind == "cut" else keys)
        if kind == "cut":
            raise TierUnreachable(f"cannot delete all in {self.url}: broken on purpose")
        self._deaf(kind, "delete", "")

    async def sweep(self, older_than_s: float) -> int:
        self._strike("sweep", "")
        return await self._inner.sweep(older_than_s)

    async def free_bytes(self) -> int | None:
        self._strike("free_bytes", "")
        return await self._inner.free_bytes()

    async def close(self) -> None:
        await self._inner.close()

    def _strike(self, operation: str, key: str) -> Kind | None:
        self.calls.append((operation, key))
        struck = [fault.kind for fault in self.faults if fault.strikes(operation, key)]
        kind = struck[0] if struck else None
        errors: dict[str, Any] = {"fail": TierUnreachable, "full": TierFull, "missing": ObjectMissing}
        if kind in errors:
            raise errors[kind](f"cannot {operation} {key} in {self.url}: broken on purpose")
        return kind

    def _deaf(self, kind: Kind | None, operation: str, key: str) -> None:
        if kind == "deaf":
            raise TierUnreachable(f"cannot {operation} {key} in {self.url}: done, and the answer lost on purpose")


def _changed(kind: Kind | None, data: bytes) -> bytes:
    if kind == "cut":
        return data[: len(data) // 2]
    if kind == "flip" and data:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        return bytes(flipped)
    return data
