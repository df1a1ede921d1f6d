"""The commands on tiers: real folders, and a real S3 server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from holdfast.errors import ConfigError, TierUnreachable
from holdfast.ops.answers import Asked
from holdfast.ops.sources import Agents, Tiers, Words, find, read_words
from holdfast.storage import store
from holdfast.storage.names import data_of, entry_key, snapshot_name, tombstone_key
from holdfast.storage.store import Found
from holdfast.tests.ops.agents import Holdfast, document
from holdfast.tests.ops.states import JOB, NAMES, RUN, WORLD, state
from holdfast.tests.ops.test_cli import DOCS, keys
from holdfast.tests.storage.memory import Memory
from holdfast.tests.storage.weed import Weed

OLD, NEW = state(5), state(6, changed=("model.weight", "model.mean"))


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    """A folder with two snapshots."""
    folder = tmp_path / "tier"
    OLD.spill(str(folder))
    NEW.spill(str(folder))
    return folder


@pytest.fixture
def config(tmp_path: Path, tier: Path) -> Path:
    """A config of that tier, and of another one with copies of both."""
    shutil.copytree(tier, tmp_path / "far")
    file = tmp_path / "job.toml"
    file.write_text(f'job = "{JOB}"\n[[tier]]\nurl = "tier"\nkeep = 1\n[[tier]]\nurl = "{tmp_path}/far"\nkeep = 2\n')
    return file


def flip(file: Path, at: int = 0) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def chunk(tier: Path, name: str, held: Any = NEW) -> Path:
    """Some chunk of a tensor."""
    return next(iter(sorted((tier / data_of(held.id) / name).glob("c.*"))))


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latest", Words(None, "latest")),
        ("/5", Words(None, "/5")),
        ("abc/5", Words(None, "abc/5")),
        ("/tmp/x", Words("/tmp/x", None)),
        ("./abc/5", Words("./abc/5", None)),
        ("s3://b/run#abc/latest", Words("s3://b/run", "abc/latest")),
        ("a.toml#latest", Words("a.toml", "latest")),
        ("/tmp/a#b", Words("/tmp/a#b", None)),
        ("memory#/5", Words("memory", "/5")),
    ],
)
def test_what_words_mean(text: str, words: Words) -> None:
    assert read_words(text) == words


def test_what_sources_mean(tmp_path: Path, config: Path) -> None:
    asked = Asked(("/some.sock",), named=False)
    assert find(None, asked) == find("memory", asked) == Agents(asked)
    for text, address in (
        ("agent://h:1", "h:1"),
        ("h:1", "h:1"),
        ("/x/agent.sock", "/x/agent.sock"),
        ("unix:/y", "/y"),
    ):
        assert find(text, asked) == Agents(Asked((address,), named=True))
    here = Tiers(tmp_path.as_uri(), (tmp_path.as_uri(),))
    assert find(str(tmp_path), asked) == find(tmp_path.as_uri(), asked) == here
    found = find(str(config), asked)
    assert isinstance(found, Tiers)
    assert (found.urls, found.job) == (((tmp_path / "tier").as_uri(), (tmp_path / "far").as_uri()), JOB)
    empty = tmp_path / "empty.toml"
    empty.touch()
    for wrong in ("nothing", str(tmp_path / "nothing"), "ftp://x/y", "s3://", str(empty)):
        with pytest.raises(ConfigError):
            find(wrong, asked)


# -- ls, inspect ------------------------------------------------------------------------------------------------------


def test_ls_lists_a_tier(tier: Path, holdfast: Holdfast) -> None:
    state(9).spill(str(tier), 1)
    found = document(holdfast, "ls", str(tier), "--sizes")["snapshots"]
    assert [(s["step"], s["ranks"], s["complete"], s["job"], s["world"]) for s in found] == [
        (9, [1], False, JOB, 2), (6, [0, 1], True, JOB, 2), (5, [0, 1], True, JOB, 2),
    ]  # fmt: skip
    data = tier / data_of(NEW.id)
    assert found[1]["stored_bytes"] == sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    assert found[1]["source"] == tier.as_uri()
    code, out, _ = holdfast("ls", str(tier), tier.as_uri())
    assert code == 0
    assert out.count("cccccccc/9") == 2
    assert "1 of 2: 1" in out
    assert "holds no snapshots" in holdfast("ls", f"{tier.as_uri()}/none")[1]
    assert holdfast("ls", str(tier / "none"))[0] == 2


def test_ls_lists_every_tier_of_a_config(config: Path, holdfast: Holdfast) -> None:
    (config.parent / "tier" / tombstone_key(NEW.id)).parent.mkdir()
    (config.parent / "tier" / tombstone_key(NEW.id)).touch()
    found = document(holdfast, "ls", str(config))["snapshots"]
    assert [(Path(s["source"]).name, s["step"], s["complete"], s["deleted"]) for s in found] == [
        ("tier", 6, False, True), ("tier", 5, True, False), ("far", 6, True, False), ("far", 5, True, False),
    ]  # fmt: skip


def test_inspect_shows_a_snapshot_and_single_tensors(tier: Path, holdfast: Holdfast) -> None:
    found = document(holdfast, "inspect", f"{tier}#/5")
    assert (found["job"], found["run"], found["step"], found["ranks"], found["complete"]) == (JOB, RUN, 5, [0, 1], True)
    assert [tensor["name"] for tensor in found["tensors"]] == NAMES
    assert [len(tensor["slices"]) for tensor in found["tensors"]][:2] == [2, 2]
    assert [v["rank"] for v in found["values"]] == [0, 1]
    code, out, _ = holdfast("inspect", "--source", str(tier), "latest")
    assert (code, "cccccccc/6"[9:] in out, "0-1; 1 their own" in out, "0; 1 their own" in out) == (0, True, False, True)

    one = document(holdfast, "inspect", f"{tier}#latest", "model.weight", "--stats")["tensors"]
    assert [tensor["name"] for tensor in one] == ["model.weight"]
    numbers = NEW.of("model.weight").view(np.float32)
    stats = one[0]["stats"]
    assert (stats["min"], stats["max"], stats["nan"], stats["elements"]) == (
        pytest.approx(numbers.min()), pytest.approx(numbers.max()), 0, 24,
    )  # fmt: skip
    assert stats["mean"] == pytest.approx(numbers.astype(np.float64).mean())
    assert holdfast("inspect", f"{tier}#latest", "optim.*", "--stats")[0] == 0
    assert holdfast("inspect", f"{tier}#latest", "none.*")[0] == 2
    assert holdfast("inspect", f"{tier}#latest", "--explain")[0] == 2
    assert holdfast("inspect", f"{tier}#/7")[0] == 12
    assert holdfast("inspect", str(tier))[0] == 0


# -- restore ----------------------------------------------------------------------------------------------------------


def test_restore_writes_files(tier: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    out = tmp_path / "out"
    done = document(holdfast, "restore", f"{tier}#latest", "--to", str(out), "--format", "safetensors")
    assert [path.name for path in out.iterdir()] == ["snapshot.safetensors"]  # what is in it: see test_export
    assert (done["step"], done["tensors"], done["files"], len(done["omitted"])) == (6, len(NAMES), 1, 2)
    code, printed, err = holdfast("restore", f"{tier}#/5", "--to", str(tmp_path / "t"), "--format", "torch")
    assert code == 0, err
    assert "8 tensors" in printed
    loaded = torch.load(tmp_path / "t" / "tensors.pt", weights_only=True)
    assert loaded["model.weight"].numpy().tobytes() == OLD.of("model.weight").tobytes()
    assert holdfast("restore", f"{tier}#/5", "--to", str(tmp_path / "t"), "--format", "zarr")[0] == 2
    group: Any = zarr.open_group(str(tmp_path / "tier" / data_of(OLD.id)), mode="r")  # what was spilled opens just so
    assert np.asarray(group["model.weight"][...]).tobytes() == OLD.of("model.weight").tobytes()


def test_restore_only_some_tensors_as_one_rank_has_them(tier: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    arguments = ("restore", f"{tier}#latest", "--format", "zarr", "--only", "model.m*", "--only", "model.weight")
    done = document(holdfast, *arguments, "--to", str(tmp_path / "out"), "--rank", "1")
    assert (done["tensors"], done["omitted"]) == (2, [])
    group: Any = zarr.open_group(str(tmp_path / "out"), mode="r")
    assert sorted(group.array_keys()) == ["model.mean", "model.weight"]
    assert np.asarray(group["model.mean"][:]).tobytes() == NEW.of("model.mean", 1).tobytes()
    assert list(group.group_keys()) == []
    assert holdfast(*arguments, "--to", str(tmp_path / "other"), "--rank", "2")[0] == 2


def test_what_is_not_whole_is_not_restored(tier: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    state(9).spill(str(tier), 1)
    to = ("--to", str(tmp_path / "out"), "--format", "zarr")
    code, _, err = holdfast("restore", f"{tier}#/9", *to)
    assert (code, "the images of ranks 0" in err) == (13, True)
    assert holdfast("restore", f"{tier}#/9", *to, "--only", "model.weight")[0] == 13
    assert not (tmp_path / "out").exists()
    assert holdfast("restore", f"{tier}#/9", *to, "--only", "model.mean")[0] == 0


def test_damage_is_noticed_and_taken_from_the_next_tier(config: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    tier = tmp_path / "tier"
    flip(chunk(tier, "model.cols"))
    flip(tier / entry_key(NEW.id, 1, WORLD), 40)
    to = ("--format", "torch", "--to")
    assert holdfast("restore", f"{tier}#latest", *to, str(tmp_path / "a"))[0] == 14
    assert not (tmp_path / "a").exists()
    code, _, err = holdfast("restore", f"{config}#latest", *to, str(tmp_path / "b"))
    assert code == 0, err
    assert "its bytes make the checksum" in err
    assert entry_key(NEW.id, 1, WORLD) in err
    found = torch.load(tmp_path / "b" / "tensors.pt", weights_only=True)["model.cols"]
    assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == NEW.of("model.cols").tobytes()


def test_nothing_of_a_reader_is_left(tier: Path, holdfast: Holdfast) -> None:
    before = sorted(tier.rglob("*"))
    assert holdfast("inspect", f"{tier}#latest", "--stats")[0] == 0
    assert holdfast("verify", str(tier))[0] == 0
    assert sorted(path for path in tier.rglob("*") if path.is_file()) == [path for path in before if path.is_file()]


# -- diff -------------------------------------------------------------------------------------------------------------


def test_diff_tells_what_differs_and_by_how_much(tier: Path, holdfast: Holdfast) -> None:
    code, out, err = holdfast("diff", f"{tier}#/5", f"{tier}#/6", "--json")
    assert code == 1, err
    found = json.loads(out)
    assert [d["name"] for d in found["differing"]] == ["model.weight", "model.mean"]
    ours, theirs = (s.of("model.weight").view(np.float32) for s in (OLD, NEW))
    assert found["differing"][0]["largest"] == pytest.approx(np.abs(ours - theirs).max())
    assert found["equal"] == len(NAMES) - 2
    assert found["values"] == [{"rank": rank, "paths": ["rng.torch"]} for rank in range(WORLD)]
    code, out, _ = holdfast("diff", "/5", "/6", "--source", str(tier))
    assert code == 1
    assert "values of rank 1: rng.torch" in out
    assert "2 tensors differ, 6 are equal" in out
    assert holdfast("diff", "/5", "/6", "--source", str(tier), "--only", "model.u*")[0] == 0
    same = holdfast("diff", f"{tier}#/5", f"{tier}#/5")
    assert (same[0], "nothing differs" in same[1]) == (0, True)


def test_diff_of_other_shapes_and_names() -> None:
    from holdfast.ops.compare import Comparison, pair_up
    from holdfast.ops.contents import Tensor

    def tensor(name: str, *shape: int) -> Tensor:
        return Tensor(name, "int8", shape, (), (), whole=True)

    found = Comparison()
    pairs = pair_up(
        [tensor("a", 2), tensor("b", 3), tensor("c", 4)], [tensor("b", 4), tensor("c", 4), tensor("d")], found
    )
    assert [pair[0].name for pair in pairs] == ["c"]
    assert (found.only_a, found.only_b, [pair[0].name for pair in found.unlike], found.same) == (
        ["a"],
        ["d"],
        ["b"],
        False,
    )


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_every_kind_of_damage(tier: Path, holdfast: Holdfast) -> None:
    found = document(holdfast, "verify", str(tier))["snapshots"]
    assert [(s["step"], s["ranks"], s["damaged"]) for s in found] == [(5, 2, []), (6, 2, [])]
    flip(chunk(tier, "model.weight"))
    chunk(tier, "model.cols").unlink()
    (tier / data_of(NEW.id) / "model.tail" / "zarr.json").write_text("{}")
    flip(tier / entry_key(OLD.id, 0, WORLD), 50)
    code, out, err = holdfast("verify", str(tier), "--json")
    assert (code, "4 objects are damaged" in err) == (14, True)
    damaged = {d["key"].partition("/")[2]: d for s in json.loads(out)["snapshots"] for d in s["damaged"]}
    names = sorted(key.removeprefix(snapshot_name(NEW.id) + "/") for key in damaged)
    assert [name.split("/")[0] for name in names] == [snapshot_name(OLD.id), "model.cols", "model.tail", "model.weight"]
    assert all(not d["mended"] and d["hindrance"] is None for d in damaged.values())
    assert holdfast("verify", f"{tier}#/5")[0] == 14
    assert holdfast("verify", f"{tier}#/7")[0] == 12


def test_verify_mends_from_another_tier(config: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    tier = tmp_path / "tier"
    flip(chunk(tier, "model.weight"))
    chunk(tmp_path / "far", "model.cols").unlink()
    (tier / data_of(NEW.id) / "model.tail" / "zarr.json").unlink()
    flip(tier / entry_key(OLD.id, 0, WORLD), 50)
    flip(chunk(tier, "model.flags", OLD))
    code, out, err = holdfast("verify", str(config), "--repair")
    assert code == 0, err + out
    assert out.count("mended: ") == 5
    assert holdfast("verify", str(config))[0] == 0
    assert holdfast("verify", str(tier))[0] == 0


def test_what_nobody_has_sound_is_not_mended(config: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    for name in ("tier", "far"):
        flip(chunk(tmp_path / name, "model.weight"))
    spoiled = tmp_path / "tier" / entry_key(NEW.id, 0, WORLD)
    flip(spoiled, 50)
    before = spoiled.read_bytes()
    code, out, _ = holdfast("verify", f"{config}#latest", "--repair", "--json")
    assert code == 14
    faults = [d for s in json.loads(out)["snapshots"] for d in s["damaged"]]
    assert [(Path(d["place"]).name, d["mended"]) for d in faults] == [("tier", False), ("tier", False), ("far", False)]
    assert any("no tier has an undamaged copy" in (d["hindrance"] or "") for d in faults)
    assert spoiled.read_bytes() == before  # an entry would say that what it names is sound


# -- copy, prune ------------------------------------------------------------------------------------------------------


def test_copy_carries_snapshots_on_and_takes_up_what_was_begun(tier: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    far = tmp_path / "far"
    NEW.spill(str(far), 0)
    done = document(holdfast, "copy", str(tier), str(far))["copied"]
    assert [(c["step"], c["ranks"], c["there"]) for c in done] == [(6, [1], [0])]
    code, out, _ = holdfast("copy", str(tier), str(far), "--all")
    assert (code, "cccccccc/5: 2 of 2" in out, "cccccccc/6: 0 of 2 images copied (2 were there)" in out) == (
        0,
        True,
        True,
    )
    assert holdfast("verify", str(far))[0] == 0
    assert holdfast("diff", f"{tier}#/5", f"{far}#/5")[0] == 0
    state(9).spill(str(tier), 1)
    assert holdfast("copy", f"{tier}#/9", str(far))[0] == 13
    assert holdfast("copy", str(tier), str(tier))[0] == 2
    assert holdfast("copy", f"{tier}#/5", str(far), "--all")[0] == 2


def test_prune_says_what_it_would_do_and_does_it(config: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    dry = document(holdfast, "prune", str(config), "--dry-run")
    assert [[(v["step"], v["goes"]) for v in tier["verdicts"]] for tier in dry["tiers"]] == [
        [(5, True), (6, False)], [(5, False), (6, False)],
    ]  # fmt: skip
    assert len(document(holdfast, "ls", str(config))["snapshots"]) == 4
    assert "would go" in holdfast("prune", str(config), "--dry-run")[1]
    assert "freed" in holdfast("prune", str(config))[1]
    left = document(holdfast, "ls", str(config))["snapshots"]
    assert [(Path(s["source"]).name, s["step"]) for s in left] == [("tier", 6), ("far", 6), ("far", 5)]
    far = str(tmp_path / "far")
    assert holdfast("prune", far)[0] == 2  # how many to keep, nobody has said
    done = document(holdfast, "prune", far, "--keep", "1")["tiers"][0]
    assert [(r["step"], r["done"]) for r in done["removals"]] == [(5, True)]
    assert holdfast("prune")[0] == 2


def test_prune_takes_the_config_from_the_environment(
    config: Path, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG", str(config))
    assert len(document(holdfast, "prune", "--dry-run", "--keep", "2")["tiers"]) == 2


def test_every_json_key_of_these_commands_is_documented(config: Path, tmp_path: Path, holdfast: Holdfast) -> None:
    flip(chunk(tmp_path / "tier", "model.weight"))
    commands = [
        ["ls", str(config)], ["inspect", f"{config}#latest", "--stats"], ["verify", f"{config}#latest"],
        ["diff", f"{config}#/5", f"{config}#/6"], ["copy", f"{config}#latest", str(tmp_path / "new")], ["prune", str(config)],
        ["restore", f"{config}#latest", "--to", str(tmp_path / "out"), "--format", "zarr"],
    ]  # fmt: skip
    text = DOCS.read_text("utf-8")
    for command in commands:
        section = text.partition(f"## holdfast {command[0]}\n")[2].partition("\n## ")[0]
        said = set(keys(json.loads(holdfast(*command, "--json")[1])))
        assert {key for key in said if f"`{key}`" not in section} == set(), command


# -- object stores ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weed() -> Iterator[Weed]:
    with Weed() as server:
        yield server


@pytest.mark.slow
def test_everything_on_s3(
    weed: Weed, tier: Path, tmp_path: Path, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in weed.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    bucket = weed.bucket() + "/run"
    assert holdfast("copy", str(tier), bucket, "--all")[0] == 0
    assert [s["step"] for s in document(holdfast, "ls", bucket)["snapshots"]] == [6, 5]
    assert holdfast("verify", bucket)[0] == 0
    assert holdfast("diff", f"{bucket}#/6", f"{tier}#/6")[0] == 0
    assert holdfast("restore", f"{bucket}#latest", "--to", str(tmp_path / "out"), "--format", "torch")[0] == 0
    flip(chunk(tier, "model.weight"))
    assert holdfast("verify", str(tier), "--repair", "--from", bucket)[0] == 0
    assert holdfast("prune", bucket, "--keep", "1")[0] == 0
    assert [s["step"] for s in document(holdfast, "ls", bucket)["snapshots"]] == [6]
    assert holdfast("ls", weed.bucket().replace("test-", "none-"))[0] in (0, 20)


class _Down(Memory):
    """A tier that does not answer."""

    async def list(self, prefix: str) -> list[Found]:
        raise TierUnreachable(f"{self.url}: no answer")


def test_a_tier_that_is_down_is_told(config: Path, holdfast: Holdfast, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several is gone around; the only one is a failure."""
    real = store.open_store
    down = (config.parent / "tier").as_uri()
    for module in ("sources", "listing"):
        monkeypatch.setattr(f"holdfast.ops.{module}.open_store", lambda url: _Down(url) if url == down else real(url))
    code, out, err = holdfast("ls", str(config))
    assert (code, "not answering" in err, out.count("cccccccc/")) == (0, True, 2)
    assert holdfast("inspect", f"{config}#latest")[0] == 0
    assert holdfast("ls", down)[0] == 20
    code, out, _ = holdfast("verify", str(config), "--json")
    assert (code, len(json.loads(out)["snapshots"])) == (20, 2)
