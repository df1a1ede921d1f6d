"""Layouts: where slices lie, their canonical text, and the refusal of every text that describes no image."""

from __future__ import annotations

import json
from typing import Any

import pytest
from holdfast.errors import Corrupt
from holdfast.snapshot.layout import ALIGNMENT, ITEM_BYTES, Layout, Placed, Slice, align

WEIGHT = Slice("weight", "float32", (5, 3), (2, 0), (3, 3), "cuda", (0, 2))
SCALE = Slice("scale", "bfloat16", (), (), ())
EMPTY = Slice("empty", "int64", (0, 4), (0, 0), (0, 4))


def document(**changes: Any) -> dict[str, Any]:
    """A layout as JSON; *changes* replace its entries."""
    return {**json.loads(Layout.of(7, [WEIGHT, SCALE]).to_text()), **changes}


def row(**changes: Any) -> list[Any]:
    """The entry of one slice of 12 rows; *changes* replace its fields by name."""
    fields = {"name": "w", "dtype": "uint8", "shape": [12], "start": [0], "extent": [12], "device": "cpu", "group": 0,
              "chunk": 0, "offset": 0}  # fmt: skip
    return list({**fields, **changes}.values())


def read(value: Any) -> Layout:
    return Layout.from_text(json.dumps(value, separators=(",", ":")).encode())


@pytest.mark.parametrize(("offset", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_align(offset: int, expected: int) -> None:
    assert align(offset) == expected


def test_align_to_another_unit() -> None:
    assert align(4097, 4096) == 8192


def test_slices_lie_one_after_the_other() -> None:
    layout = Layout.of(1, [WEIGHT, EMPTY, SCALE, WEIGHT])
    assert [(p.offset, p.end) for p in layout.placed] == [(0, 36), (64, 64), (64, 66), (128, 164)]
    assert layout.values_offset == 192


def test_a_layout_of_nothing() -> None:
    assert Layout.of(3, []) == Layout(3, (), 0)
    assert Layout.from_text(Layout.of(3, []).to_text()) == Layout(3, (), 0)


def test_bytes_and_rows() -> None:
    assert (WEIGHT.nbytes, WEIGHT.rows) == (36, 3)
    assert (SCALE.nbytes, SCALE.rows) == (2, 1)
    assert (EMPTY.nbytes, EMPTY.rows) == (0, 0)


def test_narrowing_counts_from_the_slices_own_start() -> None:
    assert WEIGHT.narrowed(1, 2) == Slice("weight", "float32", (5, 3), (3, 0), (2, 3), "cuda", (0, 2))
    assert SCALE.narrowed(0, 1) == SCALE


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_dtype_round_trips(dtype: str) -> None:
    layout = Layout.of(1, [Slice("x", dtype, (3,), (0,), (3,))])
    assert Layout.from_text(layout.to_text()) == layout
    assert layout.values_offset == ALIGNMENT


def test_the_text_is_canonical() -> None:
    """Equal layouts give equal bytes; member lists are written once, sorted."""
    layout = Layout.of(7, [WEIGHT, SCALE, WEIGHT])
    text = layout.to_text()
    assert Layout.from_text(text) == layout
    assert Layout.from_text(text).to_text() == text
    assert json.loads(text)["groups"] == [[], [0, 2]]
    assert json.loads(text)["chunks"] == [None]
    assert b" " not in text


def test_names_may_hold_anything() -> None:
    layout = Layout.of(1, [Slice('Ünïcode "\n\0\ud800', "uint8", (1,), (0,), (1,))])
    assert Layout.from_text(layout.to_text()) == layout


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"null", b"[]", b"3", b'"text"', b"{}", b"\xff\xfe", b"\0" * 64, b"[" * 100_000, b"1" * 5000,
        json.dumps(document(format=1)).encode(),
        json.dumps(document(format="1")).encode(),
        json.dumps(document(format=float("nan"))).encode(),
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_text_that_is_no_layout(text: bytes) -> None:
    with pytest.raises(Corrupt, match="layout"):
        Layout.from_text(text)


@pytest.mark.parametrize("missing", ["format", "number", "values_offset", "groups", "chunks", "slices"])
def test_a_missing_entry(missing: str) -> None:
    with pytest.raises(Corrupt, match="layout"):
        read({key: value for key, value in document().items() if key != missing})


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, [1], {}])
@pytest.mark.parametrize("entry", ["number", "values_offset"])
def test_numbers_are_natural(entry: str, value: Any) -> None:
    with pytest.raises(Corrupt, match="layout"):
        read(document(**{entry: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 3}, {"name": None}, {"dtype": "float31"}, {"dtype": ["uint8"]}, {"dtype": {}}, {"dtype": None},
        {"device": 0}, {"chunk": 1}, {"chunk": -1}, {"chunk": None}, {"group": 1},
        {"group": -1}, {"group": True}, {"group": None}, {"offset": 1}, {"offset": -64},
        {"offset": 0.0}, {"shape": 12}, {"shape": None}, {"shape": [-12]}, {"shape": [12, 1]}, {"start": []},
        {"start": [1]}, {"start": [2**63]}, {"start": [-1]}, {"extent": [13]}, {"extent": [[12]]}, {"extent": "12"},
        {"surplus": 0},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_that_describes_no_slice(changes: dict[str, Any]) -> None:
    assert read(document(groups=[[]], slices=[row()])).placed[0].offset == 0
    with pytest.raises(Corrupt, match="layout"):
        read(document(groups=[[]], slices=[row(**changes)]))


def test_slices_that_overlap() -> None:
    with pytest.raises(Corrupt, match="over what lies before it"):
        read(document(groups=[[]], slices=[row(shape=[65], extent=[65]), row(offset=64)]))


def test_values_over_a_slice() -> None:
    with pytest.raises(Corrupt, match="before its last slice"):
        read(document(groups=[[]], slices=[row()], values_offset=11))


@pytest.mark.parametrize("members", [[-1], ["0"], 3, None, [[0]]])
def test_members_that_are_no_ranks(members: Any) -> None:
    with pytest.raises(Corrupt, match="layout"):
        read(document(groups=[members], slices=[row()]))


@pytest.mark.parametrize(
    "chunk", [[], [12, 1], [0], [-1], [13], ["12"], 12, {}, True, [5], [[12]]], ids=str
)  # fmt: skip
def test_chunks_that_are_no_grid_of_the_tensor(chunk: Any) -> None:
    """Also one that the slice, of rows 4 to 8 of 12, does not keep to."""
    changes = {"start": [4], "extent": [4]}
    assert read(document(groups=[[]], chunks=[[4]], slices=[row(**changes)])).placed[0].slice.chunk == (4,)
    assert read(document(groups=[[]], chunks=[[2]], slices=[row(**changes)])).placed[0].slice.chunk == (2,)
    with pytest.raises(Corrupt, match="layout"):
        read(document(groups=[[]], chunks=[chunk], slices=[row(**changes)]))


def test_chunks_are_written_once() -> None:
    scalar, weight = Slice("s", "int8", (), (), (), chunk=()), Slice("w", "int8", (4, 3), (2, 0), (2, 3), chunk=(2, 3))
    layout = Layout.of(1, [weight, SCALE, scalar, weight])
    assert json.loads(layout.to_text())["chunks"] == [None, [], [2, 3]]
    assert Layout.from_text(layout.to_text()) == layout


def test_an_older_layout_is_refused_by_its_format() -> None:
    """Before there were grids: a slot that an earlier version has left."""
    old = {"format": 1, "number": 1, "values_offset": 0, "groups": [], "slices": []}
    with pytest.raises(Corrupt, match="layout of format 1, this version reads 2"):
        read(old)


@pytest.mark.parametrize(
    ("start", "extent", "fits"),
    [
        ((0, 0), (4, 3), True), ((4, 3), (4, 3), True), ((8, 6), (1, 1), True), ((0, 0), (9, 3), True), ((0, 0), (8, 3), True),
        ((0, 0), (3, 3), False), ((2, 0), (4, 3), False), ((0, 0), (4, 2), False), ((0, 0), (4, 6), False),
        ((0, 1), (4, 3), False), ((1, 1), (0, 2), True), ((9, 0), (0, 3), True),
    ],
)  # fmt: skip
def test_keeping_to_a_grid(start: tuple[int, int], extent: tuple[int, int], fits: bool) -> None:
    """Whole chunks along the rows, one chunk along all else; what holds nothing may lie anywhere."""
    assert Slice("w", "int8", (9, 7), start, extent, chunk=(4, 3)).on_grid is fits


def test_a_part_that_leaves_the_grid_has_none() -> None:
    whole = Slice("w", "int8", (9, 3), (0, 0), (9, 3), chunk=(4, 3))
    assert whole.narrowed(4, 5).chunk == (4, 3)
    assert whole.narrowed(4, 4).chunk == (4, 3)
    assert whole.narrowed(4, 3).chunk is None


@pytest.mark.parametrize(("size", "dimensions"), [(10**4000, 2), (2**63, 1), (2**62, 300)])
def test_sizes_beyond_all_measure(size: int, dimensions: int) -> None:
    """Also products of them, which have too many digits to be printed."""
    sizes = [size] * dimensions
    with pytest.raises(Corrupt, match="layout"):
        read(document(groups=[[]], slices=[row(shape=sizes, start=[0] * dimensions, extent=sizes)]))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(document(), separators=(", ", ": ")).encode(),
        json.dumps(document(surplus=1), separators=(",", ":")).encode(),
        json.dumps(document(groups=[[]], slices=[row(shape="", start={}, extent=[])]), separators=(",", ":")).encode(),
        json.dumps(document(groups=[[0, 2], []], chunks=[], slices=[]), separators=(",", ":")).encode(),
    ],
)
def test_text_that_only_resembles_a_layout(text: bytes) -> None:
    """``Corrupt`` for anything that ``to_text`` cannot have written, as its docstring says."""
    with pytest.raises(Corrupt):
        Layout.from_text(text)


def test_placed_end() -> None:
    assert Placed(WEIGHT, 128).end == 164
