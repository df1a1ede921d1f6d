"""Global tensors put together from slices, and read back in cells: always what the arrays say."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from holdfast.errors import ConfigError, SnapshotLost
from holdfast.ops.contents import Bytes, Opened, Tensor, alone, read_box, require_whole, select, stream, tensors
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.ops.states import HELD, NAMES, OWN, WORLD, HeldBytes, state
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUTS = {rank: Layout.of(1, HELD[rank]) for rank in range(WORLD)}
STATE = state(5)


def by_name(first: int = 0, ranks: Sequence[int] = range(WORLD)) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in tensors({rank: LAYOUTS[rank] for rank in ranks}, first)}


def gathered(opened: Opened, tensor: Tensor, most_bytes: int) -> Bytes:
    out = np.full(tensor.nbytes, 0x5A, np.uint8)

    async def read() -> None:
        async for cell in stream(opened, [tensor], most_bytes):
            cell.put_into(out)

    asyncio.run(read())
    return out


def test_tensors_come_in_the_order_of_the_layouts_with_all_their_slices() -> None:
    found = by_name()
    assert list(found) == NAMES
    assert all(tensor.whole for tensor in found.values())
    assert [piece.rank for piece in found["model.weight"].pieces] == [0, 1]
    assert [(p.rank, tuple(q.rank for q in found[n].own)) for n in OWN for p in found[n].pieces] == [
        (0, (1,)),
        (0, (1,)),
    ]
    assert found["model.empty"].pieces == ()


def test_the_rank_whose_own_tensors_count_can_be_chosen() -> None:
    found = by_name(first=1)
    assert [(p.rank, tuple(q.rank for q in found[n].own)) for n in OWN for p in found[n].pieces] == [
        (1, (0,)),
        (1, (0,)),
    ]
    opened = STATE.opened()
    assert gathered(opened, found["model.mean"], 1 << 20).tobytes() == STATE.of("model.mean", 1).tobytes()
    (own,) = by_name()["model.mean"].own
    assert gathered(opened, alone(own), 8).tobytes() == STATE.of("model.mean", 1).tobytes()


def test_without_an_image_some_tensors_are_not_whole() -> None:
    found = by_name(ranks=[1])
    assert {name for name, tensor in found.items() if tensor.whole} == {
        "model.mean",
        "model.empty",
        "optim.weight.step",
    }
    with pytest.raises(SnapshotLost, match=r"does not hold all of model\.weight, .*ranks 0 cannot be had"):
        require_whole(STATE.opened(1), found.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most_bytes", [1, 7, 24, 1 << 20])
def test_cells_cover_every_tensor_once(name: str, most_bytes: int) -> None:
    tensor = by_name()[name]
    boxes = list(tensor.boxes(most_bytes))
    assert sum(math.prod(b - a for a, b in box) for box in boxes) * ITEM_BYTES[tensor.dtype] == tensor.nbytes
    assert gathered(STATE.opened(), tensor, most_bytes).tobytes() == STATE.of(name).tobytes()


def test_cells_are_chunks_of_the_grid_or_several_of_them() -> None:
    found = by_name()
    assert found["model.cols"].cell(1) == (2, 3)
    assert found["model.cols"].cell(24) == (4, 3)  # two chunks of 12 bytes
    assert found["model.weight"].cell() == (6, 4)
    assert found["model.uneven"].cell(8) == (2, 2)
    assert found["optim.weight.step"].cell() == ()
    assert list(found["optim.weight.step"].boxes()) == [()]
    assert list(found["model.empty"].boxes()) == []


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_any_boxes_that_cover_a_tensor_give_it(data: st.DataObject) -> None:
    """Overlapping or not, of whatever ranks: where they overlap, the first rank's bytes count."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    count = data.draw(st.integers(1, 5))
    layouts, images, whole = {}, {}, np.zeros(shape, np.int16)
    seen = np.zeros(shape, bool)
    for rank in range(count):
        bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        piece = Slice("t", "int16", shape, tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))
        content = np.full(piece.extent, rank + 1, np.int16)
        cut = tuple(slice(a, b) for a, b in bounds)
        whole[cut] = np.where(seen[cut], whole[cut], content)
        seen[cut] = True
        layouts[rank] = Layout.of(1, [piece])
        images[rank] = HeldBytes(layouts[rank], content.reshape(-1).view(np.uint8))
    (tensor,) = tensors(layouts)
    assert tensor.whole == bool(seen.all())
    assert tensor.disjoint == (sum(math.prod(piece.slice.extent) for piece in tensor.pieces) == taken(tensor, shape))
    opened = Opened("here", "job", SnapshotId(1, 1, "0" * 32), count, images, {})
    for box in itertools.islice(tensor.boxes(data.draw(st.integers(1, 64))), 20):
        cut = tuple(slice(a, b) for a, b in box)
        found = asyncio.run(read_box(opened, tensor, box)).view(np.int16).reshape([b - a for a, b in box])
        assert np.array_equal(found, whole[cut])


def taken(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """How many elements some piece has."""
    seen = np.zeros(shape, bool)
    for piece in tensor.pieces:
        seen[tuple(slice(a, b) for a, b in piece.box)] = True
    return int(seen.sum())


def test_patterns_choose_by_name() -> None:
    found = list(by_name().values())
    assert [t.name for t in select(found, ["model.w*", "*.step"])] == ["model.weight", "optim.weight.step"]
    assert select(found, []) == found
    with pytest.raises(ConfigError, match=r"no tensor is called 'modell\.\*'; there are 8, such as model\.weight"):
        select(found, ["model.*", "modell.*"])


def test_an_error_in_one_cell_ends_the_stream() -> None:
    class Broken(HeldBytes):
        async def read_slice(self, index: int, out: Bytes, first_row: int = 0, rows: int | None = None) -> None:
            raise SnapshotLost("gone")

    opened = STATE.opened()
    broken = Opened(
        "here", "job", STATE.id, WORLD, dict(opened.images) | {1: Broken(LAYOUTS[1], np.empty(0, np.uint8))}, {}
    )
    with pytest.raises(SnapshotLost, match="gone"):
        gathered(broken, by_name()["model.weight"], 1)
