"""Whether live tensors are what was sealed shows in the sums of their parts, however they are cut; and so does what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from holdfast.erasure.kernel import block_checksums
from holdfast.snapshot.assembly import Read
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.live import part_of
from holdfast.snapshot.proof import Parts, Tally, is_private, not_wanted
from holdfast.snapshot.regions import Box
from holdfast.snapshot.state import Item

BLOCK = 64
SHAPE = (12, 10)


@dataclass
class World:
    """One image of two tensors, the larger of which is live in three parts; and a private one that nobody wants."""

    image: np.ndarray[tuple[int], np.dtype[np.uint8]]
    layout: Layout
    live: list[tuple[Item, Box]]

    @property
    def checks(self) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return block_checksums(self.image.ctypes.data, self.image.nbytes, BLOCK)

    def proved(self) -> tuple[int, list[int]]:
        """Each part is told of by a rank of its own."""
        total = Parts(BLOCK)
        for start, nbytes in not_wanted(self.layout, self.image.nbytes):
            total.add(start, nbytes, self.image.ctypes.data + start)
        tally = total.by_block(self.image.nbytes)
        aside = tally.nbytes.copy()
        for item, box in self.live:
            parts = Parts(BLOCK)
            parts.add_live([part_of(item, Read(0, 0, 0, box), self.layout)])
            tally.add_value(parts.by_block(self.image.nbytes).to_value())
        return tally.judge(self.checks, self.image.nbytes, BLOCK, aside)


@pytest.fixture
def world() -> World:
    shared = Slice("w", "float32", (24, 10), (0, 0), SHAPE)
    private = Slice("own", "uint8", (70,), (0,), (70,))
    layout = Layout.of(1, [shared, private])
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, layout.values_offset + 33, np.uint8)
    whole = torch.from_numpy(image[: shared.nbytes].copy()).view(torch.float32).view(SHAPE)
    live = []
    for start, extent in (((0, 0), (12, 3)), ((0, 3), (5, 7)), ((5, 3), (7, 7))):
        part = whole[start[0] : start[0] + extent[0], start[1] : start[1] + extent[1]].t().contiguous().t()
        box = Slice("w", "float32", (24, 10), start, extent)
        live.append((Item(box, part, part, lazy=True), Box(start, extent)))
    return World(image, layout, live)


def test_all_of_it_is_found_again(world: World) -> None:
    assert world.proved() == (world.layout.placed[0].slice.nbytes, [])


def test_one_wrong_number_shows(world: World) -> None:
    world.live[1][0].tensor[2, 4] += 1.0
    proved, wrong = world.proved()
    at = ((0 + 2) * 10 + 3 + 4) * 4
    assert wrong == [at // BLOCK]
    assert proved == world.layout.placed[0].slice.nbytes - BLOCK


def test_rows_that_are_exchanged_show(world: World) -> None:
    tensor = world.live[0][0].tensor
    tensor[[0, 7]] = tensor[[7, 0]]
    assert set(world.proved()[1]) == {0, 7 * 40 // BLOCK}


def test_of_what_nobody_has_or_several_nothing_is_said(world: World) -> None:
    taken = world.live.pop()
    proved, wrong = world.proved()
    assert wrong == []
    assert 0 < proved < world.layout.placed[0].slice.nbytes
    world.live += [taken, taken]
    assert world.proved() == (proved, [])


def test_what_nobody_has_live_proves_nothing(world: World) -> None:
    """The image agrees with its own checksums, of course."""
    world.live.clear()
    assert world.proved() == (0, [])


def test_what_is_private() -> None:
    whole = Slice("a", "uint8", (4,), (0,), (4,))
    assert is_private(whole)
    assert not is_private(replace(whole, members=(0, 1)))
    assert not is_private(replace(whole, shape=(8,)))
    assert is_private(Slice("s", "float32", (), (), ()))


def test_an_empty_tally_says_nothing() -> None:
    tally = Tally.empty(100, BLOCK)
    assert tally.judge(np.zeros(2, np.uint32), 100, BLOCK, tally.nbytes) == (0, [])
