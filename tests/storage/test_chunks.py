"""Which objects an image becomes: keys, padding, who writes which metadata; and what zarr says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from holdfast.errors import Corrupt
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.storage.arrays import STORED_AS, array_metadata, group_metadata, values_metadata
from holdfast.storage.chunks import Array, Chunk, corner, is_run, payload_bytes, plan, span, values_key


def planned(*slices: Slice, rank: int = 1) -> list[Chunk]:
    return list(plan(Layout.of(1, slices), rank).chunks)


def paths(*slices: Slice, rank: int = 1) -> list[str]:
    return [array.path for array in plan(Layout.of(1, slices), rank).arrays]


def test_a_slice_on_a_grid_is_whole_chunks_of_the_shared_array() -> None:
    piece = Slice("model.w", "float32", (10, 7), (4, 3), (6, 3), chunk=(4, 3))
    assert planned(piece) == [
        Chunk(0, "model.w/c.1.1", 0, 4, (4, 3)),
        Chunk(0, "model.w/c.2.1", 4, 2, (4, 3)),
    ]
    assert paths(piece) == [], "another rank has the origin"
    assert paths(Slice("model.w", "float32", (10, 7), (0, 0), (4, 3), chunk=(4, 3))) == ["model.w"]


def test_a_slice_without_a_grid_is_an_array_of_its_rank() -> None:
    piece = Slice("model.w", "float32", (10, 7), (3, 0), (4, 7))
    assert planned(piece) == [Chunk(0, "ranks/000001/tensors/model.w/c.0.0", 0, 4, (4, 7))]
    (array,) = plan(Layout.of(1, [piece]), 1).arrays
    assert array == Array(
        "ranks/000001/tensors/model.w", (4, 7), (4, 7), "float32", "model.w", (3, 0), (10, 7), "cpu"
    )  # fmt: skip


def test_large_private_slices_are_cut_into_equal_rows() -> None:
    piece = Slice("w", "uint8", (300, 1 << 20), (0, 0), (200, 1 << 20))
    assert [(c.first_row, c.rows, c.shape[0]) for c in planned(piece)] == [
        (0, 50, 50), (50, 50, 50), (100, 50, 50), (150, 50, 50)
    ]  # fmt: skip


def test_scalars_and_empty_slices() -> None:
    scalar, private = Slice("s", "int64", (), (), (), chunk=()), Slice("p", "int64", (), (), ())
    empty, own = Slice("e", "int8", (0, 3), (0, 0), (0, 3), chunk=(1, 3)), Slice("o", "int8", (5,), (5,), (0,))
    assert planned(scalar, private, empty, own) == [
        Chunk(0, "s/c", 0, 1, ()), Chunk(1, "ranks/000001/tensors/p/c", 0, 1, ())
    ]  # fmt: skip
    assert paths(scalar, private, empty, own) == ["s", "ranks/000001/tensors/p", "e", "ranks/000001/tensors/o"]
    assert paths(Slice("w", "int8", (5,), (0,), (0,), chunk=(2,))) == [], (
        "it holds nothing of a tensor that is not empty"
    )


def test_groups_are_named_parents_first() -> None:
    private, shared = Slice("p", "int64", (), (), ()), Slice("s", "int64", (), (), (), chunk=())
    assert plan(Layout.of(1, [private]), 0).groups == ("", "ranks", "ranks/000000", "ranks/000000/tensors")
    assert plan(Layout.of(1, [shared]), 7).groups == ("ranks/000007",)
    assert values_key(7) == "ranks/000007/values/c.0"


def test_names_cannot_leave_their_place() -> None:
    for name in ("..", ".", "a/b", "/etc/passwd", "zarr.json", "c", "ranks", "__x", "", "ü\ud800\0", "x" * 3000, "c/0"):
        piece = Slice(name, "uint8", (2,), (0,), (2,), chunk=(2,))
        for found in (*planned(piece), *planned(Slice(name, "uint8", (2,), (0,), (1,)))):
            parts = found.key.removeprefix("ranks/000001/tensors/").split("/")
            assert parts[1:] == ["c.0"]
            assert parts[0] not in ("", ".", "..", "c", "ranks", "zarr.json")
            assert len(parts[0]) <= 255


def test_slices_that_would_be_one_object_are_refused() -> None:
    private, shared = Slice("p", "int8", (4,), (0,), (2,)), Slice("s", "int8", (4,), (0,), (4,), chunk=(2,))
    for twice in ([private, private], [shared, shared.narrowed(2, 2)]):
        with pytest.raises(Corrupt, match="slices of"):
            plan(Layout.of(1, twice), 0)


@pytest.mark.parametrize(
    ("piece", "runs"),
    [
        (Slice("w", "int16", (5, 4), (0, 0), (5, 4), chunk=(3, 4)), True),
        (Slice("w", "int16", (5, 4), (0, 3), (5, 1), chunk=(5, 3)), False),
        (Slice("w", "int16", (5, 4, 3), (3, 2, 2), (2, 2, 1), chunk=(3, 2, 2)), False),
        (Slice("w", "int16", (5,), (3,), (2,), chunk=(3,)), True),
        (Slice("w", "int16", (), (), (), chunk=()), True),
    ],
    ids=str,
)
def test_where_the_rows_of_a_chunk_lie(piece: Slice, runs: bool) -> None:
    """The corner of a payload, seen as bytes, is the corner of the chunk, seen as elements."""
    layout = Layout.of(1, [piece])
    image = np.random.default_rng(1).integers(0, 256, layout.values_offset, np.uint8)
    for chunk in plan(layout, 0).chunks:
        first, nbytes = span(layout.placed[0], chunk)
        payload = np.zeros(payload_bytes(piece, chunk), np.uint8)
        target = corner(payload, piece, chunk)
        target[...] = image[first : first + nbytes].reshape(target.shape)
        elements = payload.view(np.int16).reshape(chunk.shape)
        cut = tuple(slice(0, n) for n in (chunk.rows, *piece.extent[1:])[: len(chunk.shape)])
        np.testing.assert_array_equal(elements[cut].reshape(-1), image[first : first + nbytes].view(np.int16))
        assert np.count_nonzero(elements) == np.count_nonzero(elements[cut]), "all else is padding"
        assert is_run(piece, chunk) is runs


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_metadata_say_how_the_bytes_are_stored(dtype: str) -> None:
    array = Array("w", (5, 4), (2, 4), dtype, 'w"ü', None, (5, 4), "cuda")
    found = json.loads(array_metadata(array))
    assert found["shape"] == [5, 4]
    assert found["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": [2, 4]}}
    assert found["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    assert [codec["name"] for codec in found["codecs"]] == ["bytes", "crc32c"]
    assert found["codecs"][0].get("configuration", {"endian": "little"}) == {"endian": "little"}
    assert found["attributes"] == {"holdfast": {"dtype": dtype, "name": 'w"ü', "device": "cuda"}}
    assert np.dtype(found["data_type"]).itemsize == ITEM_BYTES[dtype]
    assert found["data_type"] == STORED_AS.get(dtype, dtype)
    assert not np.any(found["fill_value"])


def test_metadata_of_a_private_array_say_where_it_belongs() -> None:
    array = Array("w", (2, 4), (2, 4), "int8", "w", (3, 0), (5, 4), "cpu")
    found = json.loads(array_metadata(array))["attributes"]["holdfast"]
    assert found == {"dtype": "int8", "name": "w", "device": "cpu", "shape": [5, 4], "start": [3, 0]}


def test_metadata_of_values_and_groups() -> None:
    assert json.loads(values_metadata(10))["shape"] == [10]
    assert json.loads(values_metadata(0))["chunk_grid"]["configuration"] == {"chunk_shape": [1]}
    assert json.loads(group_metadata({"step": 3}))["attributes"] == {"holdfast": {"step": 3}}
    assert json.loads(group_metadata())["node_type"] == "group"
