"""Generated layouts survive their text; mutated text gives a layout or ``Corrupt``, and never anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from holdfast.errors import Corrupt
from holdfast.snapshot.layout import ALIGNMENT, ITEM_BYTES, Layout, Slice
from hypothesis import given, settings
from hypothesis import strategies as st

names = st.text(st.characters(codec=None, exclude_categories=()), max_size=6)


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    shape = draw(st.lists(st.integers(0, 2**12) | st.integers(0, 3), max_size=3)) + draw(
        st.lists(st.just(2**20), max_size=1)
    )
    start = [draw(st.integers(0, n)) for n in shape]
    extent = [draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True)]
    members = draw(st.just(()) | st.sets(st.integers(0, 9), min_size=2).map(lambda ranks: tuple(sorted(ranks))))
    dtype, device = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(st.sampled_from(["cpu", "cuda", ""]))
    piece = Slice(draw(names), dtype, tuple(shape), tuple(start), tuple(extent), device, members)
    return on_a_grid(draw, piece) if draw(st.booleans()) else piece


def on_a_grid(draw: st.DrawFn, piece: Slice) -> Slice:
    """A slice of the same tensor that is some whole chunks along dimension 0, and one along each other."""
    shape = piece.shape
    chunk = [draw(st.integers(1, max(n, 1))) for n in shape]
    start = [c * draw(st.integers(0, max(n - 1, 0) // c)) for n, c in zip(shape, chunk, strict=True)]
    extent = [min(c, n - s) for n, s, c in zip(shape, start, chunk, strict=True)]
    if shape:
        extent[0] = min(chunk[0] * draw(st.integers(1, 3)), shape[0] - start[0])
    return replace(piece, start=tuple(start), extent=tuple(extent), chunk=tuple(chunk))


layouts = st.builds(Layout.of, st.integers(0, 2**31), st.lists(slices(), max_size=6))


def read_or_corrupt(text: bytes) -> None:
    try:
        layout = Layout.from_text(text)
    except Corrupt as error:
        assert str(error)  # noqa: PT017 - a layout will do too
        return
    end = 0
    for placed in layout.placed:  # whatever was read is safe to use: nothing overlaps, nothing reaches outside
        assert placed.offset >= end
        assert placed.offset % ALIGNMENT == 0
        end = placed.end
        for s, e, n in zip(placed.slice.start, placed.slice.extent, placed.slice.shape, strict=True):
            assert 0 <= s <= s + e <= n
        assert placed.slice.on_grid
        assert placed.slice.chunk is None or min(placed.slice.chunk, default=1) > 0
    assert layout.values_offset >= end
    assert layout.to_text() == text


@settings(derandomize=True, deadline=None, max_examples=200)
@given(layouts)
def test_round_trip(layout: Layout) -> None:
    text = layout.to_text()
    assert Layout.from_text(text) == layout
    assert Layout.from_text(text).to_text() == text


@settings(derandomize=True, deadline=None, max_examples=300)
@given(layouts, st.data())
def test_mutated_bytes(layout: Layout, data: st.DataObject) -> None:
    text = bytearray(layout.to_text())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(text)))
        count = data.draw(st.integers(0, 3))
        text[at : at + count] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"[", b"]", b'"', b"-", b"9", b"{", b","])
        )
    read_or_corrupt(bytes(text))


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(text: bytes) -> None:
    read_or_corrupt(text)


odd: st.SearchStrategy[object] = st.recursive(
    st.sampled_from([None, True, False, -1, 0, 1, 3, 64, 65, 2**62, 2**64, 10**300, 0.0, 1.5, 1e308, float("nan"),
                     float("inf"), "", "uint8", "w", "cpu", "\ud800"]),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(names, inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON tree, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            found += [(tree, key), *spots(tree[key])]
    return found


@settings(derandomize=True, deadline=None, max_examples=400)
@given(layouts, st.data())
def test_mutated_trees(layout: Layout, data: st.DataObject) -> None:
    """Well-formed JSON with odd values, lost entries and repeated ones: deeper than flipped bytes get."""
    tree = json.loads(layout.to_text())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(spots(tree)))
        match data.draw(st.sampled_from(["replace", "remove", "repeat"])):
            case "replace":
                container[key] = data.draw(odd)
            case "repeat" if isinstance(container, list):
                container.insert(key, container[key])
            case _:
                del container[key]
        if not spots(tree):
            break
    read_or_corrupt(json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(slices(), st.data())
def test_narrowing_stays_inside(piece: Slice, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, piece.rows))
    count = data.draw(st.integers(0, piece.rows - first))
    part = piece.narrowed(first, count)
    if not piece.extent:
        assert part == piece
        return
    assert (part.start[0], part.rows) == (piece.start[0] + first, count)
    assert part.nbytes * piece.rows == piece.nbytes * count
    assert part.chunk in (None, piece.chunk)
    assert Layout.from_text(Layout.of(1, [part]).to_text()).placed[0].slice == part


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
def test_depth(depth: int) -> None:
    text = Layout.of(1, []).to_text().replace(b'"groups":[]', b'"groups":' + b"[" * depth + b"]" * depth)
    with pytest.raises(Corrupt):
        Layout.from_text(text)
