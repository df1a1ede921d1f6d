"""Every format, from a source in this process's memory, read by the library that it is for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from holdfast.errors import ConfigError, StateRefused, TierFull
from holdfast.ops.contents import Opened, Tensor, tensors
from holdfast.ops.export import FORMATS, Wanted, exporter
from holdfast.ops.export.folder import appearing
from holdfast.snapshot.codec import decode, encode
from holdfast.snapshot.layout import ITEM_BYTES, Layout, Slice
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.ops.states import HELD, NAMES, RUN, WORLD, HeldBytes, state, values_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

STATE = state(5)
DTYPES = sorted(ITEM_BYTES)


def wanted(opened: Opened, *, values: bool = True) -> Wanted:
    found = tensors({rank: image.layout for rank, image in opened.images.items()})
    return Wanted(opened, tuple(found), values)


def written(format: str, what: Wanted, folder: Path) -> tuple[Path, list[str]]:
    folder.mkdir()
    done: list[int] = []
    omitted = asyncio.run(exporter(format)(what, folder, done.append))
    assert sum(done) == what.nbytes
    return folder, omitted


def torch_tensor(name: str, rank: int = 0) -> torch.Tensor:
    piece = next(piece for piece in HELD[0] if piece.name == name)
    return as_torch(piece.dtype, piece.shape, STATE.of(name, rank))


def as_torch(dtype: str, shape: tuple[int, ...], data: Any) -> torch.Tensor:
    kind = getattr(torch, dtype)
    return torch.from_numpy(data.copy()).view(kind).reshape(shape) if data.nbytes else torch.empty(shape, dtype=kind)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit."""
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def every_dtype() -> Opened:
    """A tensor of each dtype."""
    pieces = [Slice(f"t.{dtype}", dtype, (3, 5), (0, 0), (3, 5), chunk=(2, 5)) for dtype in DTYPES]
    layout = Layout.of(1, pieces)
    data = np.random.default_rng(3).integers(0, 2, layout.values_offset, np.uint8)
    values = encode({}, "values")
    out = np.concatenate([data, np.empty(values.nbytes, np.uint8)])
    values.write_into(out[layout.values_offset :])
    image = HeldBytes(layout, out)
    return Opened("here", "job", SnapshotId(1, 5, RUN), 1, {0: image}, {0: values.nbytes})


def expected(opened: Opened) -> dict[str, torch.Tensor]:
    image = opened.images[0]
    assert isinstance(image, HeldBytes)
    return {
        p.slice.name: as_torch(p.slice.dtype, p.slice.shape, image.content[p.offset : p.end])
        for p in image.layout.placed
    }


# -- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_loads_with_its_library(tmp_path: Path) -> None:
    folder, omitted = written("safetensors", wanted(STATE.opened()), tmp_path / "out")
    found = load_file(folder / "snapshot.safetensors")
    assert sorted(found) == sorted(NAMES)
    assert all(same(found[name], torch_tensor(name)) for name in NAMES)
    with safe_open(folder / "snapshot.safetensors", "pt") as file:
        assert file.metadata()["step"] == "5"
    assert "no place for what is no tensor" in omitted[0]
    assert "2 tensors of which ranks have bytes of their own" in omitted[1]


def test_safetensors_has_no_place_for_some_dtypes(tmp_path: Path) -> None:
    opened = every_dtype()
    with pytest.raises(StateRefused, match="safetensors has no dtype complex"):
        written("safetensors", wanted(opened), tmp_path / "all")
    lacking = {"complex32", "complex128"}
    found = tuple(t for t in wanted(opened).tensors if t.dtype not in lacking)
    folder, _ = written("safetensors", Wanted(opened, found, values=False), tmp_path / "known")
    with safe_open(folder / "snapshot.safetensors", "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    want = {name: tensor for name, tensor in expected(opened).items() if name.removeprefix("t.") not in lacking}
    assert held.keys() == want.keys()
    assert all(same(held[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800", "a\nb"])
def test_safetensors_has_no_place_for_some_names(name: str, tmp_path: Path) -> None:
    layout = Layout.of(1, [Slice(name, "int8", (1,), (0,), (1,))])
    image = HeldBytes(layout, np.zeros(layout.values_offset, np.uint8))
    opened = Opened("here", "job", STATE.id, 1, {0: image}, {0: 0})
    with pytest.raises(StateRefused, match="is no name for a tensor"):
        written("safetensors", wanted(opened, values=False), tmp_path / "out")


# -- torch ------------------------------------------------------------------------------------------------------------


def test_torch_loads_with_weights_only(tmp_path: Path) -> None:
    folder, omitted = written("torch", wanted(STATE.opened()), tmp_path / "out")
    assert omitted == []
    found = torch.load(folder / "tensors.pt", weights_only=True)
    assert list(found) == NAMES
    assert all(same(found[name], torch_tensor(name)) for name in NAMES)
    assert found["model.cols"].untyped_storage().nbytes() == found["model.cols"].nbytes

    document = torch.load(folder / "values.pt", weights_only=True)
    assert (document["step"], document["world"], sorted(document["ranks"])) == (5, WORLD, [0, 1])
    assert same(document["ranks"][1]["tensors"]["model.mean"], torch_tensor("model.mean", 1))
    assert document["ranks"][0]["tensors"] == {}
    for rank in range(WORLD):
        values = document["ranks"][rank]["values"]
        assert values["extras"] == {"seen": {rank, 7}, "big": 1 << 70, "keys": {(1, "a"): [0, 1, 2]}}
        assert values["groups"][""][0]["options"]["betas"] == (0.9, 0.95)
        assert values["rng"]["torch"].tolist() == list(range(5, 21))
        assert values["rng"]["python"][1].dtype is torch.uint32


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_without_values_torch_writes_tensors_alone(tmp_path: Path) -> None:
    folder, _ = written("torch", wanted(every_dtype(), values=False), tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["tensors.pt"]
    found, want = torch.load(folder / "tensors.pt", weights_only=True), expected(every_dtype())
    assert found.keys() == want.keys()
    assert all(same(found[name], want[name]) for name in want)


# -- dcp --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_dcp_loads_with_its_own_load(tmp_path: Path) -> None:
    folder, omitted = written("dcp", wanted(STATE.opened()), tmp_path / "out")
    assert len(omitted) == 2
    into: dict[str, Any] = {name: torch.zeros_like(torch_tensor(name)) for name in NAMES}
    dcp_load(into, checkpoint_id=folder, no_dist=True)
    assert all(same(into[name], torch_tensor(name)) for name in NAMES)

    nested = {"model": {"weight": torch.zeros(6, 4)}}  # as state_dict() gives it
    dcp_load(nested, checkpoint_id=folder, no_dist=True)
    assert same(nested["model"]["weight"], torch_tensor("model.weight"))


# -- zarr -------------------------------------------------------------------------------------------------------------


def test_zarr_opens_with_zarr(tmp_path: Path) -> None:
    folder, omitted = written("zarr", wanted(STATE.opened()), tmp_path / "out")
    assert omitted == []
    group: Any = zarr.open_group(str(folder), mode="r")
    assert group.attrs["holdfast"]["step"] == 5
    arrays: dict[str, Any] = dict(group.arrays())
    assert sorted(arrays) == sorted(NAMES)
    for name in NAMES:
        piece = next(piece for piece in HELD[0] if piece.name == name)
        assert arrays[name].shape == piece.shape
        assert arrays[name].attrs["holdfast"]["dtype"] == piece.dtype
        assert np.asarray(arrays[name][...]).tobytes() == STATE.of(name).tobytes()
    for rank in range(WORLD):
        values = np.asarray(group[f"ranks/{rank:06d}/values"][:])
        assert decode(values)["extras"] == values_of(5, rank)["extras"]  # type: ignore[index]
    own = group["ranks/000001/tensors/model.mean"]
    assert np.asarray(own[:]).tobytes() == STATE.of("model.mean", 1).tobytes()
    assert own.attrs["holdfast"]["start"] == [0]


def test_zarr_has_every_dtype_and_cuts_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor.cell, "__defaults__", (32,))  # a few rows to a chunk, the last one padded
    monkeypatch.setattr(Tensor.boxes, "__defaults__", (32,))
    monkeypatch.setattr("holdfast.ops.contents.stream.__defaults__", (32,))
    opened = every_dtype()
    folder, _ = written("zarr", wanted(opened), tmp_path / "out")
    group: Any = zarr.open_group(str(folder), mode="r")
    for name, tensor in expected(opened).items():
        array = group[name]
        assert array.shape == (3, 5)
        assert np.asarray(array[...]).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(list((folder / "t.complex128").glob("c.*"))) == 2


# -- all --------------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(UnicodeEncodeError), appearing(target) as fresh:
        (fresh / "file").write_bytes(b"half" + "\ud800".encode())
    assert list(target.parent.iterdir()) == []
    target.mkdir()  # empty: may be taken
    with appearing(target) as fresh:
        (fresh / "file").write_text("whole")
        assert list(target.iterdir()) == []
    assert (target / "file").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(ConfigError, match="is there already"), appearing(target):
        pass
    with pytest.raises(ConfigError, match="cannot write"), appearing(target / "file" / "below"):
        pass
    with pytest.raises(TierFull, match="No space left"), appearing(tmp_path / "full"), open("/dev/full", "w") as full:
        full.write("x" * (1 << 20))


@pytest.mark.parametrize("format", sorted({*FORMATS} - {"torch", "dcp"}))
def test_only_torch_and_dcp_import_torch(format: str) -> None:
    code = (
        f"import sys, holdfast.ops.restore\nfrom holdfast.ops.export import exporter\nexporter({format!r})\n"
        "print('torch' in sys.modules, 'zarr' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split() == ["False", "False"]
