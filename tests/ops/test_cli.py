"""``status``, ``ls`` and ``inspect`` against real agents, with a trainer that speaks the agent's protocol itself."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from holdfast.agent import wire_pb2 as wire
from holdfast.erasure.kernel import crc32c
from holdfast.errors import ConfigError, SnapshotUnknown, every_error
from holdfast.ops import cli
from holdfast.ops.answers import whom
from holdfast.ops.held import Copy, Snapshot, choose
from holdfast.snapshot.layout import Layout, Slice
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.ops.agents import OTHER_RUN, RUN, VALUES, Cluster, Holdfast, document, small, until

DOCS = Path(cli.__file__).parents[1] / "docs" / "cli.md"
BIG = 1 << 20  # float32 elements; 4 MiB


# -- status -----------------------------------------------------------------------------------------------------------


def test_status_shows_agent_trainers_slots_and_skips(cluster: Cluster, holdfast: Holdfast) -> None:
    node = cluster.node()
    trainer = cluster.trainer(node, world=2)
    figures = {"step": 7, "watermark": 6, "taken": 5, "last_stall_s": 0.0005, "last_copy_s": 0.25,
               "image_bytes": 100 << 20, "copied_bytes": 1 << 20}  # fmt: skip
    trainer.report(skipped={"slots-busy": 2, "agent-away": 3}, **figures)
    trainer.open(1, SnapshotId(1, 8, RUN))
    layout, image = small()
    trainer.seal(0, SnapshotId(1, 7, RUN), layout, image)

    found = document(holdfast, "status")
    assert found["silent"] == []
    (agent,) = found["agents"]
    assert agent["address"] == node.address
    assert (agent["agent"], agent["job"], agent["pid"], agent["alone"]) == ("n0", "job", node.pid, True)
    assert (agent["shm"], agent["listen"], agent["limit_bytes"]) == (str(node.settings.shm), node.listen, None)
    assert agent["idle_s"] == 0 < agent["uptime_s"]
    assert agent["reserved_bytes"] == sum(path.stat().st_size for path in node.settings.shm.glob("rank-*"))
    assert agent["trainers"] == [
        {"rank": 0, "world": 2, "pid": os.getpid(), "state": "alive", "skipped": {"slots-busy": 2, "agent-away": 3}}
        | figures
    ]
    sealed, staging = agent["slots"]
    assert sealed == {
        "rank": 0, "slot": 0, "state": "sealed", "run": RUN, "generation": 1, "step": 7, "image_bytes": len(image),
        "capacity_bytes": 1 << 16,
    }  # fmt: skip
    assert (staging["state"], staging["run"], staging["image_bytes"]) == ("staging", None, None)

    code, out, _ = holdfast("status")
    assert code == 0
    for shown in (
        "alone: no other node",
        "0/2",
        "0.50 ms",
        "250 ms",
        "1.0 MiB of 100",
        "5: agent-away 3, slots-busy 2",
        "aaaaaaaa/7",
    ):
        assert shown in out


def test_a_trainer_that_has_told_nothing_yet_shows_no_figures(cluster: Cluster, holdfast: Holdfast) -> None:
    cluster.trainer(cluster.node())
    (trainer,) = document(holdfast, "status")["agents"][0]["trainers"]
    assert trainer["skipped"] == {}
    assert {trainer[key] for key in ("step", "watermark", "taken", "last_stall_s", "copied_bytes")} == {None}
    assert holdfast("status")[0] == 0


@pytest.mark.parametrize(("goodbye", "state"), [(True, "ended"), (False, "gone")])
def test_status_tells_a_trainer_that_ended_from_one_that_is_gone(
    cluster: Cluster, holdfast: Holdfast, goodbye: bool, state: str
) -> None:
    cluster.trainer(cluster.node()).leave(goodbye=goodbye)
    until(lambda: document(holdfast, "status")["agents"][0]["trainers"][0]["state"] == state)
    assert "nobody attached for" in holdfast("status")[1]


def test_what_others_named_cannot_steer_the_terminal(cluster: Cluster, holdfast: Holdfast) -> None:
    folder = cluster.folder / "job"
    folder.mkdir(mode=0o700)
    (folder / "[red]\x1b[31mfile").touch()
    cluster.node()
    assert document(holdfast, "status")["agents"][0]["foreign"] == ["[red]\x1b[31mfile"]
    assert "left alone: [red]?[31mfile" in holdfast("status")[1]


# -- which agents -----------------------------------------------------------------------------------------------------


def test_an_agent_is_asked_over_its_socket_or_its_tcp_address(cluster: Cluster, holdfast: Holdfast) -> None:
    node = cluster.node()
    cluster.node(job="other")
    for address in (node.address, f"unix:{node.address}", node.listen, f"agent://{node.listen}"):
        found = document(holdfast, "status", "--agent", address)["agents"]
        assert [agent["pid"] for agent in found] == [node.pid]
    assert len(document(holdfast, "status")["agents"]) == 2
    both = document(holdfast, "status", "--agent", node.address, "--agent", f"unix:{node.address}")
    assert len(both["agents"]) == 1


def test_a_socket_that_nobody_answers_at_is_reported(cluster: Cluster, holdfast: Holdfast) -> None:
    node = cluster.node()
    dead = cluster.folder / "dead" / "agent.sock"
    dead.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
    found = document(holdfast, "status")
    assert [agent["pid"] for agent in found["agents"]] == [node.pid]
    assert [(s["address"], s["error"]) for s in found["silent"]] == [(str(dead), "AgentUnreachable")]
    code, out, _ = holdfast("status")
    assert (code, f"{dead}: not answering" in out) == (0, True)
    code, out, err = holdfast("ls")
    assert (code, "no snapshots are held" in out, f"not answering: {dead}" in err) == (0, True, True)


def test_an_agent_asked_for_by_name_must_answer(cluster: Cluster, holdfast: Holdfast) -> None:
    code, out, err = holdfast("status", "--agent", str(cluster.folder / "agent.sock"))
    assert (code, out) == (5, "")
    assert "AgentUnreachable; remedy: retry" in err
    assert holdfast("ls", "--job", f"no-such-job-{uuid.uuid4().hex[:8]}")[0] == 5
    assert holdfast("status", "--agent", "127.0.0.1:1")[0] == 5


def test_a_link_is_not_trusted_as_a_socket(cluster: Cluster, holdfast: Holdfast) -> None:
    link = cluster.folder / "link.sock"
    link.symlink_to(cluster.node().address)
    assert holdfast("status", "--agent", str(link))[0] == 7


def test_a_node_without_agents_is_no_failure(cluster: Cluster, holdfast: Holdfast) -> None:
    assert document(holdfast, "status") == {"groups": [], "agents": [], "silent": []}
    assert document(holdfast, "ls") == {"snapshots": [], "silent": []}
    assert "no agent of yours" in holdfast("status")[1]
    assert holdfast("inspect", "latest")[0] == 12


SHM = f"/dev/shm/holdfast-{os.getuid()}"


@pytest.mark.parametrize(
    ("agents", "job", "environment", "address"),
    [
        (["/a/s"], None, {"HOLDFAST_AGENT": "/b/s"}, "/a/s"),
        (["unix:/a/s"], None, {}, "/a/s"),
        (["agent://h:1"], None, {}, "h:1"),
        (["[::1]:80"], None, {}, "[::1]:80"),
        ([], "j", {"HOLDFAST_AGENT": "/b/s", "HOLDFAST_SHM": "/c", "HOLDFAST_JOB": "k"}, f"{SHM}/j/agent.sock"),
        ([], None, {"HOLDFAST_AGENT": "unix:/b/s", "HOLDFAST_SHM": "/c", "HOLDFAST_JOB": "k"}, "/b/s"),
        ([], None, {"HOLDFAST_SHM": "/c", "HOLDFAST_JOB": "k"}, "/c/agent.sock"),
        ([], None, {"HOLDFAST_JOB": "k"}, f"{SHM}/k/agent.sock"),
    ],
)
def test_options_win_over_the_environment(
    agents: list[str], job: str | None, environment: Mapping[str, str], address: str
) -> None:
    asked = whom(agents, job, environment)
    assert (asked.addresses, asked.named) == ((address,), True)


@pytest.mark.parametrize("agents", [[""], ["unix:"], ["agent://host"], ["agent:///path"]])
def test_what_is_no_address_is_refused(agents: list[str]) -> None:
    with pytest.raises(ConfigError):
        whom(agents, None, {})


def test_agent_and_job_exclude_each_other() -> None:
    with pytest.raises(ConfigError):
        whom(["/a/s"], "j", {})


# -- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_groups_images_by_snapshot_over_all_agents(cluster: Cluster, holdfast: Holdfast) -> None:
    here, there = cluster.node(name="n0"), cluster.node(job="job2", name="n1")
    trainers = [cluster.trainer(here, rank=rank, world=2) for rank in range(2)]
    for rank, trainer in enumerate(trainers):
        trainer.seal(0, SnapshotId(1, 5, RUN), *small(rank=rank, world=2))
    path = trainers[1].seal(1, SnapshotId(2, 3, OTHER_RUN), *small(rank=1, world=2))
    cluster.trainer(there).seal(0, SnapshotId(1, 9, "c" * 32), *small())

    found = document(holdfast, "ls")["snapshots"]
    assert [(s["job"], s["run"], s["step"], s["ranks"], s["complete"]) for s in found] == [
        ("job", OTHER_RUN, 3, [1], False),  # of a later generation, hence newer
        ("job", RUN, 5, [0, 1], True),
        ("job2", "c" * 32, 9, [0], True),
    ]
    size = len(small()[1])
    assert [s["image_bytes"] for s in found] == [size, 2 * size, size]
    assert found[0]["images"] == [
        {"rank": 1, "image_bytes": size, "agent": "n0", "address": here.address, "path": path, "trainer_alive": True}
    ]
    code, out, _ = holdfast("ls")
    assert code == 0
    for shown in ("bbbbbbbb/3", "1 of 2: 1", "aaaaaaaa/5", "2 of 2", "n1"):
        assert shown in out
    assert [s["job"] for s in document(holdfast, "ls", "--agent", there.listen)["snapshots"]] == ["job2"]


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_shows_every_slice_with_its_checksum(cluster: Cluster, holdfast: Holdfast) -> None:
    node = cluster.node()
    images = []
    for rank in range(2):
        layout, image = small(rank=rank, world=2)
        cluster.trainer(node, rank=rank, world=2).seal(0, SnapshotId(1, 5, RUN), layout, image)
        images.append(np.frombuffer(image, np.uint8))

    found = document(holdfast, "inspect", "aaaa/5")
    assert (found["run"], found["step"], found["ranks"], found["complete"], found["sound"]) == (
        RUN, 5, [0, 1], True, True,
    )  # fmt: skip
    weight, step = found["tensors"]
    assert (weight["name"], weight["dtype"], weight["shape"], weight["bytes"]) == ("net.weight", "float32", [4, 3], 48)
    assert weight["slices"] == [
        {
            "rank": rank, "start": [2 * rank, 0], "extent": [2, 3], "bytes": 24,
            "crc32c": f"{crc32c(images[rank][:24]):08x}", "damaged": False,
        }
        for rank in range(2)
    ]  # fmt: skip
    assert [(s["rank"], s["start"], s["extent"], s["bytes"]) for s in step["slices"]] == [
        (0, [], [], 8),
        (1, [], [], 8),
    ]
    assert [(v["bytes"], v["crc32c"]) for v in found["values"]] == [(len(VALUES), f"{crc32c(VALUES):08x}")] * 2

    code, out, _ = holdfast("inspect", "latest")
    assert code == 0
    for shown in ("net.weight", "float32", "[4, 3]", "1: [2, 0]+[2, 3]", f"{crc32c(images[1][:24]):08x}", "(values)"):
        assert shown in out


def test_inspect_shows_damage_and_fails_with_the_exit_code_of_corrupt(cluster: Cluster, holdfast: Holdfast) -> None:
    layout = Layout.of(1, [Slice(name, "float32", (BIG,), (0,), (BIG,)) for name in ("first", "second")])
    trainer = cluster.trainer(cluster.node(), image_bytes=layout.values_offset + len(VALUES))
    path = trainer.seal(0, SnapshotId(1, 5, RUN), layout, bytes(layout.values_offset) + VALUES)
    assert document(holdfast, "inspect", "/5")["sound"]
    with open(path, "r+b") as file:  # one bit, in the first byte of the second tensor
        file.seek(os.path.getsize(path) - trainer.slots[0].place.image_bytes + 4 * BIG)
        file.write(b"\1")

    code, out, err = holdfast("inspect", f"{RUN}/5", "--json")
    assert code == 14
    assert f"{path} (rank 0): 1 of 65 blocks" in err
    found = json.loads(out)
    assert (found["sound"], found["images"][0]["bad_blocks"]) == (False, [32])
    assert [t["slices"][0]["damaged"] for t in found["tensors"]] == [False, True]
    assert [v["damaged"] for v in found["values"]] == [False]

    code, out, _ = holdfast("inspect", f"{RUN}/5")
    assert (code, out.count("DAMAGED"), "damaged: rank 0, blocks 32 of" in out) == (14, 1, True)


def test_an_unknown_snapshot_has_its_own_exit_code(cluster: Cluster, holdfast: Holdfast) -> None:
    cluster.trainer(cluster.node()).seal(0, SnapshotId(1, 5, RUN), *small())
    code, out, err = holdfast("inspect", "aaaa/6")
    assert (code, out) == (12, "")
    assert "held are: aaaaaaaa/5 of job job" in err
    assert holdfast("inspect", "6")[0] == 2


def held(job: str, generation: int, step: int, run: str, *ranks: int, world: int = 1) -> Snapshot:
    copies = [Copy("/s", "n0", wire.Image(run=run, step=step, rank=rank, world=world)) for rank in ranks or (0,)]
    return Snapshot(job, SnapshotId(generation, step, run), tuple(copies))


HELD = [
    held("j", 3, 9, "c" * 32, 0, world=2),
    held("j", 2, 7, OTHER_RUN, 0, 1, world=2),
    held("j", 1, 7, RUN, 0, 1, world=2),
    held("j", 1, 6, RUN, 0, 1, world=2),
]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("latest", 1),  # the newest is not complete
        ("aaaa/latest", 2),
        ("A/7", 2),
        (f"{uuid.UUID(RUN)}/6", 3),
        ("/6", 3),
        ("/9", 0),  # asked for by its step: shown though it is not complete
    ],
)
def test_names_of_snapshots(name: str, index: int) -> None:
    assert choose(name, HELD) is HELD[index]


@pytest.mark.parametrize("name", ["/7", "7", "", "a", "a/", "a/b", "x/7", "a/-1", "/7/8"])
def test_names_that_mean_nothing_or_several_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        choose(name, HELD)


@pytest.mark.parametrize("name", ["/8", "d/7", "cccc/latest"])
def test_names_of_nothing_held(name: str) -> None:
    with pytest.raises(SnapshotUnknown):
        choose(name, HELD)


def test_latest_of_two_jobs_is_ambiguous() -> None:
    with pytest.raises(ConfigError, match="--job"):
        choose("latest", [*HELD, held("k", 1, 1, RUN)])


# -- docs/cli.md ------------------------------------------------------------------------------------------------------


def test_the_documented_exit_codes_are_those_of_the_errors() -> None:
    cells = [[cell.strip(" `") for cell in line.split("|")[1:4]] for line in DOCS.read_text("utf-8").splitlines()]
    documented = [(code, name, remedy) for code, name, remedy in (row for row in cells if len(row) == 3)]
    ours = [kind for kind in every_error() if kind.__module__ == "holdfast.errors"]
    expected = {(str(kind.exit_code), kind.__name__, kind.remedy.value) for kind in ours}
    assert expected == {row for row in documented if row[0].isdigit() and row[1]}


def test_every_command_and_option_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    context = click.Context(cli.group)
    for name in cli.group.list_commands(context):
        assert f"## holdfast {name}" in text
        section = text.partition(f"## holdfast {name}")[2].partition("\n## ")[0]
        command = cli.group.get_command(context, name)
        assert command is not None
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert {option for option in options if f"`{option}" not in section} == set()


def test_every_json_key_is_documented(cluster: Cluster, holdfast: Holdfast) -> None:
    trainer = cluster.trainer(cluster.node())
    trainer.seal(0, SnapshotId(1, 5, RUN), *small())
    dead = cluster.folder / "dead" / "agent.sock"
    dead.parent.mkdir()
    dead.touch()
    for command in (["status"], ["ls"], ["inspect", "latest"]):
        intro, _, rest = DOCS.read_text("utf-8").partition("\n## holdfast agent")
        section = intro + rest.partition(f"## holdfast {command[0]}")[2].partition("\n## ")[0]
        assert {key for key in keys(document(holdfast, *command)) if f"`{key}`" not in section} == set()


def keys(value: Any) -> Iterator[str]:
    """All keys of all objects in a JSON document."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from keys(item)
