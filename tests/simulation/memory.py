"""What outlives processes: the shared memory of a node, as far as the protocol can tell its bytes apart.

The bytes of an image are one number, its *content*, which tells whose they are: so the model knows the truth, which no agent
does. Parity is the records of the images that it was computed from.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from holdfast.snapshot.record import FREE_WORD, OPEN_WORD, SnapshotId
from holdfast.snapshot.recovery import Held, HeldParity

PARTIAL = 0  # the content of what is no image (yet)


def content_of(id: SnapshotId, rank: int, *, torn: bool = False) -> int:
    """The bytes of that image; another number if it is torn."""
    return (((int(id.run, 16) << 20 | id.step) << 12 | rank) << 1 | torn) + 1


class Page(NamedTuple):
    """A slot's record."""

    id: SnapshotId
    rank: int
    world: int
    watermark: int
    nonce: int
    content: int


class Parity(NamedTuple):
    """What a sealed cell says of itself: *pages* are the records of the images that it was computed from."""

    id: SnapshotId
    key: int
    index: int  # type: ignore[assignment]
    ranks: tuple[int, ...]
    tolerance: int
    pages: tuple[Page | None, ...]


class SlotMemory:
    """One slot. *filling*: the nonce under which it was filled last, which is not in memory."""

    __slots__ = ("complete", "content", "filling", "page", "word")

    def __init__(self) -> None:
        self.word = FREE_WORD
        self.page: Page | None = None
        self.complete = FREE_WORD
        self.content = PARTIAL
        self.filling = 0

    @property
    def sealed(self) -> Page | None:
        page = self.page
        return page if page is not None and page.nonce == self.word else None

    @property
    def recorded(self) -> Page | None:
        """As ``arenas.recorded``."""
        return self.page if self.word == OPEN_WORD else self.sealed


class View:
    """What lies in a node's memory, for the checks.

    Attributes:
        images: content of the sealed images, by snapshot and rank.
        known: snapshots that this memory says were complete.
        parities: keys of the sealed cells, by lane, snapshot and index of the member; several between two groupings.
    """

    __slots__ = ("images", "known", "parities")

    def __init__(self, memory: Memory) -> None:
        self.images: dict[tuple[SnapshotId, int], int] = {}
        self.known: set[SnapshotId] = set()
        self.parities: dict[tuple[int, SnapshotId, int], tuple[int, ...]] = {}
        for (rank, index), slot in memory.slots.items():
            page = slot.sealed
            if page is None:
                continue
            exact = page.content == slot.content == content_of(page.id, rank)
            assert exact, (
                f"slot {index} of rank {rank} on {memory.name}: {page.id} is sealed, and its bytes are not exact"
            )
            self.images[page.id, rank] = slot.content
            if slot.complete == slot.word:
                self.known.add(page.id)
            if page.watermark >= 0:
                self.known.add(SnapshotId(page.id.generation, page.watermark, page.id.run))
        for (lane, _), parity in memory.cells.items():
            if parity is not None:
                where = lane, parity.id, parity.index
                self.parities[where] = (*self.parities.get(where, ()), parity.key)


class Watch:
    """What has changed in a world since the last check: whether anything, and in which memories."""

    __slots__ = ("changed", "touched")

    def __init__(self) -> None:
        self.changed = True
        self.touched: list[Memory] = []


class Memory:
    """One node's memory, from its first agent to its loss.

    Attributes:
        bit: one power of two for each memory of a world.
        lost: it is gone.
        slots: by rank and index.
        cells: by lane and index; None while one holds nothing.
    """

    def __init__(self, name: str, number: int, watch: Watch) -> None:
        self.name = name
        self._watch = watch
        self.bit = 1 << number
        self.lost = False
        self.slots: dict[tuple[int, int], SlotMemory] = {}
        self.cells: dict[tuple[int, int], Parity | None] = {}
        self._view: View | None = None
        watch.touched.append(self)

    def touch(self) -> None:
        """Something in it has changed."""
        if self._view is not None:
            self._view = None
            self._watch.touched.append(self)
        self._watch.changed = True

    @property
    def view(self) -> View:
        """What lies there now. AssertionError if a sealed image is not exact."""
        if self._view is None:
            self._view = View(self)
        return self._view

    def image(self, rank: int, id: SnapshotId, content: int | None = None) -> SlotMemory | None:
        """As ``Arenas.image``."""
        for (its_rank, _), slot in self.slots.items():
            if (
                its_rank == rank
                and (page := slot.recorded) is not None
                and page.id == id
                and content in (None, page.content)
            ):
                return slot
        return None

    def slot_for(self, rank: int, keep: SnapshotId) -> SlotMemory:
        """As ``Arenas.free_slot``: unsealed, and whatever it held is gone."""
        mine = {index: slot for (its, index), slot in self.slots.items() if its == rank}
        order = sorted((slot.sealed is not None, slot.sealed is not None and slot.sealed.id < keep, i)
                       for i, slot in mine.items())  # fmt: skip
        for *_, index in order:
            slot = mine[index]
            if slot.word == OPEN_WORD or (slot.sealed is not None and slot.sealed.id == keep):
                continue
            break
        else:
            slot = self.slots[rank, max(mine, default=-1) + 1] = SlotMemory()
        slot.word, slot.content = FREE_WORD, PARTIAL
        self.touch()
        return slot

    def reserve(self, rank: int, slots: int) -> list[SlotMemory]:
        """As ``Arenas.reserve``."""
        return [self.slots.setdefault((rank, i), SlotMemory()) for i in range(slots)]

    def reserve_cells(self, lanes: int, count: int) -> None:
        """As ``Arenas.reserve_cells``."""
        for lane in range(lanes):
            for index in range(count):
                self.cells.setdefault((lane, index))

    def reclaim(self, ranks: tuple[int, ...], lanes: int) -> None:
        """As ``Arenas.reclaim``."""
        self.slots = {key: slot for key, slot in self.slots.items() if key[0] in ranks}
        self.cells = {key: cell for key, cell in self.cells.items() if key[0] < lanes}
        self.touch()

    def mark_complete(self, ids: Collection[SnapshotId]) -> None:
        """As ``Arenas.mark_complete``."""
        for slot in self.slots.values():
            if slot.sealed is not None and slot.sealed.id in ids:
                slot.complete = slot.word
                self.touch()

    def sealed(self) -> list[tuple[int, Page]]:
        """Every sealed image, by rank."""
        return [(rank, page) for (rank, _), slot in self.slots.items() if (page := slot.sealed) is not None]

    def held(self) -> list[Held]:
        """As ``Arenas.inventory``."""
        return [
            Held(page.id, rank, page.world, page.watermark, self.name, f"{rank}/{index}", 1,
                 slot.complete == slot.word, page.content)
            for (rank, index), slot in self.slots.items()
            if (page := slot.sealed) is not None
        ]  # fmt: skip

    def held_parities(self) -> list[HeldParity]:
        """As ``AgentService.inventory`` tells of cells."""
        return [
            HeldParity(p.id, p.key, p.index, p.ranks, p.tolerance, self.name, lane)
            for (lane, _), p in self.cells.items()
            if p is not None
        ]
