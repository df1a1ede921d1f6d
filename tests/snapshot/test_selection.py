"""Which part of a snapshot is restored, under which names, and what does not fit."""

from __future__ import annotations

import pytest
from holdfast.errors import ConfigError
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.selection import ALL, Misfits, Selection, misfits


def named(name: str, dtype: str = "float32", *shape: int) -> Slice:
    shape = shape or (2,)
    return Slice(name, dtype, shape, (0,) * len(shape), shape)


def test_misfits_name_every_tensor() -> None:
    live = [named("a"), named("b"), named("c")]
    held = [named("b", "float64"), named("c", "float32", 2, 1), named("d")]
    found = misfits(live, held)
    assert found == Misfits(
        ("a",),
        ("d",),
        ("b: float32[2] live, float64[2] in the snapshot", "c: float32[2] live, float32[2, 1] in the snapshot"),
    )
    assert found.lines().split("\n  ")[0] == "a: in the live state, not in the snapshot"
    assert found.lines(1).endswith("and 3 more")


def test_cuts_are_no_misfit() -> None:
    whole = named("a", "float32", 4)
    assert not misfits([whole], [whole.narrowed(0, 1), whole.narrowed(1, 3)])
    assert not misfits([], [])


def test_the_longest_renaming_counts() -> None:
    renamed = Selection(rename={"model.": "model.old.", "model.head.": "model.top.", "model.head.bias": "model.shift"})
    assert renamed.live_name("model.body.weight") == "model.old.body.weight"
    assert renamed.live_name("model.head.weight") == "model.top.weight"
    assert renamed.live_name("model.head.bias") == "model.shift"
    assert renamed.live_name("optim.head.bias") == "optim.head.bias"
    assert not renamed.whole


@pytest.mark.parametrize("rename", [{"a.": "b"}, {"a": "b."}, {".": "b."}, {"": "b"}])
def test_renamings_that_mean_nothing(rename: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Selection(rename=rename)


def test_two_tensors_of_one_name() -> None:
    """Rows of one and rows of the other would make up a tensor that never was."""
    renamed = Selection(rename={"model.a": "model.b", "model.old.": "model.new."}, only=("model.*",))
    renamed.check(["model.a", "model.a", "model.c", "model.old.b"])
    with pytest.raises(ConfigError, match=r"model\.a and model\.b of the snapshot would both be model\.b"):
        renamed.check(["model.a", "model.b"])
    with pytest.raises(ConfigError, match=r"both be model\.new\.x"):
        renamed.check(["model.new.x", "model.old.x"])
    Selection(rename={"a": "b", "b": "a"}).check(["a", "b"])
    Selection(rename={"a": "b"}, only=("c",)).check(["a", "b", "c"])


def test_a_layout_keeps_its_places() -> None:
    layout = Layout.of(1, [named("model.a"), named("optim.a.exp_avg"), named("model.b")])
    chosen = Selection(only=("model.*",), rename={"model.b": "model.c"}).of(layout)
    assert [p.slice.name for p in chosen.placed] == ["model.a", "", "model.c"]
    assert [p.offset for p in chosen.placed] == [p.offset for p in layout.placed]
    assert chosen.placed[1].slice.nbytes == 0
    assert ALL.of(layout) is layout
