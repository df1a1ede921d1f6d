"""The commands on what agents hold: real agents, asked over their socket (slots are mapped) and over TCP (they are streamed)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast.agent import reading
from holdfast.snapshot.record import SnapshotId
from holdfast.storage.tiers import Tier, TierSettings
from holdfast.tests.ops.agents import Cluster, Holdfast, Node, Trainer, document, until
from holdfast.tests.ops.states import HELD, JOB, NAMES, RUN, WORLD, State, state

OLD, NEW = state(5), state(6, changed=("model.weight",))


def seal(trainers: list[Trainer], slot: int, held: State) -> list[str]:
    """Have every rank take a snapshot; returns the paths of the slots."""
    paths = []
    for rank, trainer in enumerate(trainers):
        image = held.image(rank)
        paths.append(trainer.seal(slot, held.id, image.layout, image.content.tobytes()))
    return paths


@pytest.fixture
def job(cluster: Cluster) -> tuple[Node, list[Trainer], list[list[str]]]:
    """An agent with two ranks, both of whose slots are filled, and the paths of the slots."""
    node = cluster.node(job=JOB)
    trainers = [cluster.trainer(node, rank=rank, world=WORLD) for rank in range(WORLD)]
    return node, trainers, [seal(trainers, 0, OLD), seal(trainers, 1, NEW)]


Job = tuple[Node, list[Trainer], list[list[str]]]


def damage(path: str, trainer: Trainer, name: str) -> None:
    """Flip a bit of some tensor in a slot."""
    layout = OLD.image(trainer.rank).layout
    offset = next(placed.offset for placed in layout.placed if placed.slice.name == name)
    with open(path, "r+b") as file:
        start = os.path.getsize(path) - trainer.slots[0].place.image_bytes + offset
        file.seek(start)
        byte = file.read(1)[0]
        file.seek(start)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("over", ["socket", "tcp"])
def test_restore_out_of_memory(
    job: Job, tmp_path: Path, holdfast: Holdfast, over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, _, _ = job
    mapped: list[str] = []
    real = reading.MappedSlot

    def open_mapped(copy: reading.Copy, id: SnapshotId) -> reading.MappedSlot:
        mapped.append(copy.path)
        return real(copy, id)

    monkeypatch.setattr(reading, "MappedSlot", open_mapped)
    address = node.address if over == "socket" else f"agent://{node.listen}"
    done = document(holdfast, "restore", f"{address}#latest", "--to", str(tmp_path / "out"), "--format", "torch")
    assert (done["source"], done["job"], done["step"], done["tensors"]) == ("memory", JOB, 6, len(NAMES))
    assert len(mapped) == (WORLD if over == "socket" else 0)
    found = torch.load(tmp_path / "out" / "tensors.pt", weights_only=True)
    for name in NAMES:
        assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == NEW.of(name).tobytes()
    values = torch.load(tmp_path / "out" / "values.pt", weights_only=True)["ranks"]
    assert values[1]["values"]["rng"]["torch"].tolist() == list(range(6, 22))


def test_the_usual_agents_are_meant_where_no_source_is_named(job: Job, tmp_path: Path, holdfast: Holdfast) -> None:
    assert holdfast("restore", f"{RUN}/5", "--to", str(tmp_path / "out"), "--format", "zarr")[0] == 0
    assert (
        holdfast("restore", "memory#latest", "--to", str(tmp_path / "b"), "--format", "zarr", "--job", "none")[0] == 5
    )
    code, out, _ = holdfast("diff", "/5", "/6")
    assert (code, "model.weight" in out, "1 tensors differ, 7 are equal" in out) == (1, True, True)


def test_inspect_single_tensors_in_memory(job: Job, holdfast: Holdfast) -> None:
    found = document(holdfast, "inspect", "latest", "model.*", "--stats")
    assert (found["source"], found["complete"], found["values"]) == ("memory", True, [])
    assert [tensor["name"] for tensor in found["tensors"]] == [name for name in NAMES if name.startswith("model.")]
    numbers = NEW.of("model.weight").view(np.float32)
    assert found["tensors"][0]["stats"]["max"] == pytest.approx(numbers.max())
    assert document(holdfast, "inspect", "latest", "--source", job[0].address)["sound"]  # as ever, if all is asked for


def test_memory_and_a_tier_compare_copy_and_verify(job: Job, tmp_path: Path, holdfast: Holdfast) -> None:
    node, trainers, paths = job
    tier = str(tmp_path / "tier")
    code, out, err = holdfast("copy", "memory", tier, "--all")
    assert code == 0, err
    assert "cccccccc/6: 2 of 2 images copied" in out
    assert document(holdfast, "copy", f"{node.address}#/5", tier)["copied"][0]["there"] == [0, 1]
    assert document(holdfast, "diff", "latest", f"{tier}#latest")["same"]
    assert holdfast("verify", tier)[0] == 0
    assert [s["source"] for s in document(holdfast, "ls", "memory", tier)["snapshots"]] == (
        ["memory"] * 2 + [Path(tier).as_uri()] * 2
    )

    chunk = next((Path(tier) / "snapshots").glob("*-0000000000000006-*/model.cols/c.0.0"))
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    next((Path(tier) / "snapshots").glob("*-0000000000000006-*/ranks/000001/values/c.0")).unlink()
    assert holdfast("verify", tier)[0] == 14
    code, out, err = holdfast("verify", tier, "--repair", "--from", "memory")
    assert (code, out.count("mended: ")) == (0, 2), err
    assert document(holdfast, "diff", "latest", f"{tier}#latest")["same"]

    damage(paths[1][0], trainers[0], "model.weight")
    code, out, _ = holdfast("verify", "memory", "--json")
    assert code == 14
    assert [(s["step"], len(s["damaged"])) for s in json.loads(out)["snapshots"]] == [(6, 1), (5, 0)]
    assert holdfast("verify", "memory#/5")[0] == 0


@pytest.mark.parametrize("over", ["socket", "tcp"])
def test_damaged_memory_is_never_written_out(job: Job, tmp_path: Path, holdfast: Holdfast, over: str) -> None:
    node, trainers, paths = job
    damage(paths[1][1], trainers[1], "model.cols")
    source = node.address if over == "socket" else node.listen
    code, _, err = holdfast("restore", "latest", "-s", source, "--to", str(tmp_path / "out"), "--format", "safetensors")
    assert (code, "blocks of cccccccc/6 of rank 1 do not match their checksum: 0" in err) == (14, True)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())
    assert holdfast("copy", f"{source}#latest", str(tmp_path / "tier"))[0] == 14
    assert holdfast("restore", f"{source}#/5", "--to", str(tmp_path / "out"), "--format", "safetensors")[0] == 0


def test_of_two_copies_the_sound_one_is_read(cluster: Cluster, tmp_path: Path, holdfast: Holdfast) -> None:
    nodes = [cluster.node(job=JOB, name="n0"), cluster._start("other", JOB, "n1")]
    nodes[1].await_ready()
    both = [[cluster.trainer(node, rank=rank, world=WORLD) for rank in range(WORLD)] for node in nodes]
    paths = [seal(trainers, 0, OLD) for trainers in both]
    damage(paths[0][0], both[0][0], "model.weight")
    damage(paths[0][1], both[0][1], "model.cols")
    damage(paths[1][1], both[1][1], "model.mean")  # in another block: but these images are of one
    addresses = [option for node in nodes for option in ("--agent", node.address)]
    to = ("--to", str(tmp_path / "out"), "--format", "zarr")
    code, _, err = holdfast("restore", "latest", *addresses, *to)
    assert (code, err.count("do not match their checksum")) == (14, 4)  # each copy once, and the last word
    paths[1] = seal(both[1], 0, OLD)
    code, _, err = holdfast("restore", "latest", *addresses, *to)
    assert (code, err.count("do not match their checksum")) == (0, 2), err
    assert holdfast("restore", "latest", "--agent", nodes[0].address, *to)[0] == 2  # it is there already


def test_lost_images_are_not_computed_for_a_reader(cluster: Cluster, tmp_path: Path, holdfast: Holdfast) -> None:
    trainer = cluster.trainer(cluster.node(job=JOB), rank=1, world=WORLD)
    image = OLD.image(1)
    trainer.seal(0, OLD.id, image.layout, image.content.tobytes())
    code, _, err = holdfast("restore", "/5", "--to", str(tmp_path / "out"), "--format", "torch")
    assert (code, "the images of ranks 0 cannot be had" in err) == (13, True)
    assert holdfast("restore", "/5", "--to", str(tmp_path / "out"), "--format", "torch", "--only", "model.mean")[0] == 0
    assert holdfast("inspect", "/5", "model.weight", "--stats")[0] == 13
    assert document(holdfast, "inspect", "/5", "model.weight")["tensors"][0]["whole"] is False


def test_spill_asks_the_agents(cluster: Cluster, holdfast: Holdfast) -> None:
    assert holdfast("spill")[0] == 5
    node = cluster.node(job=JOB)
    code, out, err = holdfast("spill")
    assert (code, "refused: no trainer is attached" in out) == (11, True), err
    cluster.trainer(node)
    code, out, err = holdfast("spill", "--json", "--tiers", "1")
    assert (code, json.loads(out)["asked"]) == (
        11, [{"job": JOB, "agent": "n0", "accepted": False, "reason": "the job has no tiers"}],
    )  # fmt: skip


def test_what_lies_in_tiers_alone_is_explained_and_shown(cluster: Cluster, tmp_path: Path, holdfast: Holdfast) -> None:
    """Its node is lost with all memory; a new one knows the tiers from its trainers."""
    tier = tmp_path / "tier"
    settings = [TierSettings.parse(Tier(str(tier))).to_json()]
    node = cluster.node(job=JOB)
    trainers = [cluster.trainer(node, rank=rank, world=WORLD, tiers=settings) for rank in range(WORLD)]
    seal(trainers, 0, OLD)
    for trainer in trainers:
        trainer.slots[0].mark_complete()
        trainer.spill(OLD.id)
    assert document(holdfast, "diff", "latest", f"{tier}#latest")["same"]
    seal(trainers, 1, NEW)
    (shown,) = document(holdfast, "status")["agents"][0]["tiers"]
    assert (shown["url"], shown["newest"]["step"], shown["lag_steps"], shown["spills"]) == (tier.as_uri(), 5, 1, 2)
    assert "1 step" in holdfast("status")[1]
    code, out, err = holdfast("spill", "--json")
    assert (code, json.loads(out)["asked"][0]["accepted"]) == (0, True), err
    assert [trainer.heard("due").due.tiers for trainer in trainers] == [1, 1]

    cluster.lose(node)
    node = cluster.node(job=JOB)
    cluster.trainer(node, rank=0, world=WORLD, tiers=settings)
    found = document(holdfast, "inspect", "--explain")
    assert (found["step"], found["restorable"], found["chosen"], found["complete"]) == (5, True, True, False)
    assert [(i["source"], i["tier"], i["readers"]) for i in found["images"]] == [
        ("tier", tier.as_uri(), ["n0"])
    ] * WORLD
    assert f"read from {tier.as_uri()} by n0" in holdfast("inspect", "--explain")[1]


def test_a_snapshot_that_is_overwritten_meanwhile_is_gone(job: Job, holdfast: Holdfast, tmp_path: Path) -> None:
    _, trainers, _ = job
    trainers[0].open(1, SnapshotId(1, 7, RUN))
    until(lambda: holdfast("inspect", "/6", "model.mean")[0] == 0)
    code, _, err = holdfast("restore", "/6", "--to", str(tmp_path / "out"), "--format", "zarr")
    assert code == 13, err
    assert len(HELD) == WORLD
