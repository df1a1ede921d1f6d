"""A store in memory with a clock of its own, whose every effect is a place where others can come in between, or death.

Several ``ImaginedStore`` on one ``Place`` are several processes at one bucket. ``run`` drives coroutines that await nothing
but such stores: no event loop, no thread, nothing that differs from run to run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from types import coroutine
from typing import Any, TypeVar

from holdfast.errors import ObjectMissing, TierFull, TierUnreachable
from holdfast.storage.store import Buffer, Found, Names

Result = TypeVar("Result")
Contents = tuple[bytes, float]  # and when it was put
TIMEOUT_S = 60.0
_PAGE = 3


@coroutine
def turn() -> Generator[None, None, None]:
    """Let others come in between."""
    yield


@dataclass(slots=True)
class Place:
    """What is there. *room*: so many bytes fit, if limited. *watch* is called after every change: key, and whether it was put.

    A change is seen at once, and survives a power cut only once it is no longer *pending* (there: what was before it).
    """

    now_s: float = 1_000_000.0
    objects: dict[str, Contents] = field(default_factory=dict)
    room: int | None = None
    swept: list[float] = field(default_factory=list)
    watch: Callable[[str, bool], None] = lambda key, put: None
    pending: dict[str, Contents | None] = field(default_factory=dict)

    def used(self) -> int:
        return sum(len(data) for data, _ in self.objects.values())

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = (data, self.now_s)
        self.watch(key, True)

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self.watch(key, False)

    def under(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def cut_power(self, rng: random.Random) -> None:
        """Whatever is pending is as it was before, or as it is now, each for itself."""
        for key, before in sorted(self.pending.items()):
            if rng.random() < 0.5:
                self.objects.pop(key, None)
                if before is not None:
                    self.objects[key] = before
        self.pending.clear()


class ImaginedStore:
    """One process's view of a place; an implementation of ``Store``. Fails what stands still for a minute, as real ones do."""

    url = "memory://imagined"

    def __init__(self, place: Place) -> None:
        self.place = place
        self._unsettled: list[str] = []

    async def _turn(self) -> None:
        asked_s = self.place.now_s
        await turn()
        if self.place.now_s - asked_s > TIMEOUT_S:
            raise TierUnreachable(f"no answer for {self.place.now_s - asked_s:.0f} s")

    async def put(self, key: str, parts: Sequence[Buffer], *, durable: bool = True) -> None:
        await self._turn()
        data = b"".join(map(bytes, parts))
        old = len(self.place.objects.get(key, (b"", 0.0))[0])
        if self.place.room is not None and self.place.used() - old + len(data) > self.place.room:
            raise TierFull(f"no room for {key}")
        self._changes(key)
        self.place.put(key, data)
        if durable:
            await self._turn()
            self._holds(key)
        else:
            self._unsettled.append(key)

    async def settle(self) -> None:
        await self._turn()
        self._holds(*self._unsettled)
        self._unsettled.clear()

    async def forget(self, keys: Sequence[str]) -> None:
        await self._turn()  # all is to be seen already

    async def confirm(self, prefix: str) -> None:
        await self._turn()
        self._holds(*(key for key in self.place.under(prefix)))

    def _changes(self, key: str) -> None:
        self.place.pending.setdefault(key, self.place.objects.get(key))

    def _holds(self, *keys: str) -> None:
        for key in keys:
            self.place.pending.pop(key, None)

    async def get(self, key: str) -> bytes:
        await self._turn()
        if key not in self.place.objects:
            raise ObjectMissing(f"no {key}")
        return self.place.objects[key][0]

    async def read_into(self, key: str, parts: Sequence[memoryview]) -> None:
        raise NotImplementedError

    async def list(self, prefix: str) -> list[Found]:
        """As object stores do: page by page, each of its own moment."""
        found: list[Found] = []
        while True:
            await self._turn()
            page = [key for key in self.place.under(prefix) if not found or key > found[-1].key][:_PAGE]
            found += [Found(key, len(self.place.objects[key][0]), self.place.objects[key][1]) for key in page]
            if len(page) < _PAGE:
                return found

    async def children(self, prefix: str) -> Names:
        await self._turn()
        parts = (key.removeprefix(prefix).partition("/") for key in self.place.under(prefix))
        return sorted({name for name, slash, _ in parts if slash})

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            await self._turn()
            self._changes(key)
            self.place.delete(key)
        await self._turn()
        self._holds(*keys)

    async def sweep(self, older_than_s: float) -> int:
        self.place.swept.append(older_than_s)
        return 0

    async def free_bytes(self) -> int | None:
        await self._turn()
        return None if self.place.room is None else self.place.room - self.place.used()

    async def close(self) -> None:
        pass


def run(work: Coroutine[Any, Any, Result], *, effects: int | None = None) -> Result | None:
    """Drive *work* to its end, undisturbed; with *effects*, to its death before one more. None if it died."""
    done = 0
    try:
        while effects is None or done <= effects:
            work.send(None)
            done += 1
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    work.close()
    return None
