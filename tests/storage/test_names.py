"""Names of objects, both ways."""

from __future__ import annotations

import uuid

import pytest
from holdfast.snapshot.record import SnapshotId
from holdfast.storage import names
from holdfast.storage.names import decode_name, encode_name
from holdfast.storage.store import is_key
from hypothesis import example, given, settings
from hypothesis import strategies as st

RUN = "0123456789abcdef" * 2
ID = SnapshotId(3, 700, RUN)
ids = st.builds(
    SnapshotId,
    st.integers(0, 10**10 - 1),
    st.integers(0, 10**16 - 1),
    st.integers(0, 16**32 - 1).map(lambda n: f"{n:032x}"),
)
ODD = ["", ".", "..", "...", "__x", "_x", "zarr.json", "c", "ranks", "a/b", "/etc/passwd", "..\\..", "é", "名前", "a b", "a%2Fb",
       "%", "~", "x" * 199, "x" * 200, "x" * 201, "é" * 90, "\ud800", "\0", "C", "CON", "model.layers.0.weight"]  # fmt: skip


@settings(deadline=None)
@given(st.text(st.characters(), max_size=300))
@example("")
def test_a_name_becomes_one_part_of_a_path(name: str) -> None:
    part = encode_name(name)
    assert is_key(part)
    assert "/" not in part
    assert len(part) <= 200
    assert not part.startswith("__")
    assert part not in (".", "..", "zarr.json", "c", "ranks")
    assert decode_name(part) == (None if "~" in part else name)


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name: str) -> None:
    test_a_name_becomes_one_part_of_a_path.hypothesis.inner_test(name)  # type: ignore[attr-defined]


def test_different_names_stay_different() -> None:
    odd = [*ODD, *(encode_name(name) for name in ODD), "x" * 201 + "y", "x" * 300]
    assert len({encode_name(name) for name in odd}) == len(set(odd))


def test_what_people_read() -> None:
    assert encode_name("model.layers.0.weight") == "model.layers.0.weight"
    assert encode_name("a/b c") == "a%2Fb%20c"
    assert encode_name("..") == "%2E."
    assert encode_name("zarr.json") == "%7Aarr.json"
    assert names.entry_key(ID, 2, 8) == f"entries/0000000003-0000000000000700-{RUN}/000002-of-000008.json"
    assert names.data_of(ID) == f"snapshots/0000000003-0000000000000700-{RUN}/"
    assert names.private_path(12, "c") == "ranks/000012/tensors/%63"
    assert names.values_path(0) == "ranks/000000/values"
    assert names.tombstone_key(ID) == f"deleted/0000000003-0000000000000700-{RUN}.json"
    assert names.lease_key(ID, uuid.UUID(int=1)).startswith(f"readers/0000000003-0000000000000700-{RUN}/00000000-")


@pytest.mark.parametrize("part", ["%2f", "a/b", "%", "%zz", "é", "__x", "zarr.json", "", "x~y", "%C3", "a" * 201])
def test_what_encode_name_never_makes(part: str) -> None:
    assert decode_name(part) is None


@settings(deadline=None)
@given(st.lists(ids, min_size=2))
def test_names_sort_as_snapshots_do(some: list[SnapshotId]) -> None:
    def order(id: SnapshotId) -> tuple[int, int, str]:
        return (id.generation, id.step, id.run)

    assert sorted(map(names.snapshot_name, some)) == [names.snapshot_name(id) for id in sorted(some, key=order)]


@settings(deadline=None)
@given(ids, st.integers(0, 999_999), st.integers(1, 999_999))
def test_keys_both_ways(id: SnapshotId, rank: int, world: int) -> None:
    assert names.parse_snapshot(names.snapshot_name(id)) == id
    assert names.parse_tombstone(names.tombstone_key(id)) == id
    assert names.parse_entry(names.entry_key(id, rank, world)) == ((id, rank, world) if rank < world else None)
    for key in (names.entry_key(id, rank, world), names.tombstone_key(id), names.lease_key(id, uuid.uuid4())):
        assert is_key(key)


@pytest.mark.parametrize(
    "key",
    ["", "entries/", "entries/x/000000-of-000001.json", f"entries/0000000003-0000000000000700-{RUN}/000001-of-000001.json",
     f"entries/0000000003-0000000000000700-{RUN}/000000-of-000001.json.tmp",
     f"entries/0000000003-0000000000000700-{RUN}/000000-of-000001.json\n",
     f"0000000003-0000000000000700-{RUN}/000000-of-000001.json",
     f"entries/a/0000000003-0000000000000700-{RUN}/000000-of-000001.json",
     f"entries/0000000003-000000000000070٣-{RUN}/000000-of-000001.json",
     f"entries/0000000003-0000000000000700-{RUN.upper()}/000000-of-000001.json"],
)  # fmt: skip
def test_foreign_keys_mean_nothing(key: str) -> None:
    assert names.parse_entry(key) is None
    assert names.parse_tombstone(key) is None
