"""``status``, ``ls`` and ``inspect --explain`` of a job on several nodes: all of them seen from one, whole and after losses."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.trust import Trust
from holdfast.errors import AgentUnreachable, AgentUntrusted
from holdfast.ops import certs
from holdfast.ops.answers import Answered, Answers, Silent
from holdfast.ops.groups import groups
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.ops.agents import RUN, Cluster, Holdfast, Node, Trainer, document, small
from holdfast.tests.ops.test_cli import DOCS, keys

STEP = SnapshotId(1, 5, RUN)
NEXT = SnapshotId(1, 6, RUN)


@pytest.fixture
def trio(cluster: Cluster) -> list[Node]:
    """Three nodes, any one of which may be lost, and step 5 protected on all of them."""
    nodes = cluster.nodes(3)
    cluster.snapshot(cluster.group(nodes, "2+1"), 0, STEP)
    return nodes


def asking(node: Node) -> list[str]:
    return ["--agent", node.address]


def explained(holdfast: Holdfast, node: Node, *arguments: str) -> dict[str, Any]:
    return document(holdfast, "inspect", *arguments, "--explain", *asking(node))


# -- all is well ------------------------------------------------------------------------------------------------------


def test_status_of_one_agent_shows_its_group(trio: list[Node], holdfast: Holdfast) -> None:
    found = document(holdfast, "status", *asking(trio[1]))
    (group,) = found["groups"]
    protected = {"run": RUN, "generation": 1, "step": 5}
    assert (group["job"], group["tolerance"], group["spare"]) == ("job", 1, 1)
    assert (group["protected"], group["newest_step"], group["lag_steps"]) == (protected, 5, 0)
    assert [(m["agent"], m["address"], m["ranks"], m["reachable"]) for m in group["members"]] == [
        (node.name, node.listen, [rank], True) for rank, node in enumerate(trio)
    ]
    for member in group["members"]:
        assert (member["protected"], member["damaged_blocks"], member["trouble"]) == (protected, 0, "")
        assert member["parity_bytes"] > 0 < member["pulled_bytes"]
        assert member["protect_s"] > 0
    assert ([agent["agent"] for agent in found["agents"]], found["silent"]) == (["n1"], [])
    assert not found["agents"][0]["alone"]
    everyone = document(holdfast, "status", "--all", *asking(trio[1]))["agents"]
    assert [agent["agent"] for agent in everyone] == ["n1", "n0", "n2"]

    code, out, _ = holdfast("status", *asking(trio[1]))
    assert code == 0
    for shown in (
        "group of 3 nodes, job job: any 1 may be lost with their memory",
        "newest protected aaaaaaaa/5, 0 steps behind training; 1 more may be lost now",
        "2 more agents on other nodes: --all shows them",
        trio[2].listen,
    ):
        assert shown in out


def test_ls_of_one_agent_shows_the_images_of_all(trio: list[Node], holdfast: Holdfast) -> None:
    (found,) = document(holdfast, "ls", *asking(trio[0]))["snapshots"]
    assert (found["ranks"], found["complete"], found["restorable"], found["rebuilt"]) == ([0, 1, 2], True, True, [])
    assert found["image_bytes"] == 3 * len(small()[1])
    assert [(i["agent"], i["address"]) for i in found["images"]] == [
        ("n0", trio[0].address), ("n1", trio[1].listen), ("n2", trio[2].listen),
    ]  # fmt: skip
    inspected = document(holdfast, "inspect", *asking(trio[0]))
    assert ([i["rank"] for i in inspected["images"]], inspected["sound"]) == ([0, 1, 2], True)


def test_a_whole_snapshot_is_explained(trio: list[Node], holdfast: Holdfast) -> None:
    found = explained(holdfast, trio[2])
    assert (found["step"], found["restorable"], found["chosen"], found["reason"]) == (5, True, True, None)
    assert (found["known_complete"], found["spare_nodes"], found["spare_exact"], found["newer"]) == (True, 1, True, [])
    assert [(i["source"], i["agent"], i["attached"]) for i in found["images"]] == [
        ("own", node.name, node.name) for node in trio
    ]
    code, out, _ = holdfast("inspect", "--explain", *asking(trio[2]))
    assert code == 0
    for shown in (
        f"snapshot {RUN}/5 of job job, generation 1: can be restored",
        "its own slot",
        "1 more node may be lost",
    ):
        assert shown in out


def test_two_groups_are_seen_from_either(cluster: Cluster, holdfast: Holdfast) -> None:
    nodes = cluster.nodes(4)
    cluster.snapshot(cluster.group(nodes, "1+1"), 0, STEP)
    for node in (nodes[0], nodes[3]):
        found = document(holdfast, "status", *asking(node))["groups"]
        assert sorted(rank for group in found for member in group["members"] for rank in member["ranks"]) == [
            0,
            1,
            2,
            3,
        ]
        assert [(len(group["members"]), group["spare"]) for group in found] == [(2, 1), (2, 1)]
        assert document(holdfast, "ls", *asking(node))["snapshots"][0]["complete"]
    pair = [member["agent"] for member in found[0]["members"]]
    cluster.lose(*(node for node in nodes if node.name == pair[0]))
    left = next(node for node in nodes if node.name != pair[0])
    assert [group["spare"] for group in document(holdfast, "status", *asking(left))["groups"]] == [0, 1]
    assert explained(holdfast, left)["spare_nodes"] == 0


# -- something is lost ------------------------------------------------------------------------------------------------


def test_a_lost_node_is_seen_by_all_commands(trio: list[Node], cluster: Cluster, holdfast: Holdfast) -> None:
    cluster.lose(trio[2])
    found = document(holdfast, "status", *asking(trio[0]))
    (group,) = found["groups"]
    assert ([m["reachable"] for m in group["members"]], group["spare"]) == ([True, True, False], 0)
    assert (group["protected"]["step"], group["members"][2]["protected"]) == (5, None)
    assert [(s["address"], s["error"]) for s in found["silent"]] == [(trio[2].listen, "AgentUnreachable")]
    out = holdfast("status", *asking(trio[0]))[1]
    for shown in ("0 more may be lost now", " NO ", f"{trio[2].listen}: not answering"):
        assert shown in out

    (listed,) = document(holdfast, "ls", *asking(trio[0]))["snapshots"]
    assert (listed["ranks"], listed["complete"], listed["restorable"], listed["rebuilt"]) == ([0, 1], False, True, [2])
    code, out, err = holdfast("ls", *asking(trio[0]))
    assert (code, "rebuilding 2" in out, f"not answering: {trio[2].listen}" in err) == (0, True, True)


def test_a_lost_image_is_explained_and_what_could_still_be_lost(
    trio: list[Node], cluster: Cluster, holdfast: Holdfast
) -> None:
    cluster.lose(trio[2])
    found = explained(holdfast, trio[0])
    assert (found["restorable"], found["complete"], found["known_complete"], found["spare_nodes"]) == (
        True, False, True, 0,
    )  # fmt: skip
    assert [image["source"] for image in found["images"]] == ["own", "own", "rebuilt"]
    assert {key: found["images"][2][key] for key in ("attached", "parity_of", "group_ranks", "tolerance")} == {
        "attached": None, "parity_of": ["n0", "n1"], "group_ranks": [0, 1, 2], "tolerance": 1,
    }  # fmt: skip
    out = holdfast("inspect", "--explain", *asking(trio[0]))[1]
    for shown in (
        "held by nobody; rebuilt by the group of ranks 0-2, of whose 3 members any 1 may be lost, with the parity of n0, n1",
        "no more node may be lost, whichever, and it can still be restored",
    ):
        assert shown in out


def test_one_loss_too_many_is_explained_and_has_its_exit_code(
    trio: list[Node], cluster: Cluster, holdfast: Holdfast
) -> None:
    cluster.lose(trio[0], trio[2])
    (group,) = document(holdfast, "status", *asking(trio[1]))["groups"]
    assert group["spare"] == -1
    assert "1 more than that cannot be reached" in holdfast("status", *asking(trio[1]))[1]
    assert not document(holdfast, "ls", *asking(trio[1]))["snapshots"][0]["restorable"]

    code, out, err = holdfast("inspect", "/5", "--explain", *asking(trio[1]))
    reason = "the group of ranks 0, 1, 2 survives the loss of 1 of its 3 members; the images of ranks 0, 2 are lost"
    assert (code, "cannot be restored" in out, reason in out, reason in err) == (13, True, True, True)
    assert out.count("held by nobody") == 2
    code, _, err = holdfast("inspect", "--explain", *asking(trio[1]))
    assert (code, "nothing that is held can be restored: aaaaaaaa/5: 2 of 3 images" in err) == (13, True)


def test_newer_ones_that_never_were_complete_are_passed_over(
    trio: list[Node], cluster: Cluster, holdfast: Holdfast
) -> None:
    trainers = sorted(cluster.trainers, key=lambda trainer: trainer.rank)
    for trainer in trainers[:2]:
        trainer.seal(1, NEXT, *small(rank=trainer.rank, world=3))
        trainer.report(step=6)
    found = explained(holdfast, trio[0])
    assert (found["step"], found["chosen"]) == (5, True)
    (newer,) = found["newer"]
    assert (newer["step"], newer["reason"]) == (6, "1 of 3 images cannot be had: rank 2 missing")
    (group,) = document(holdfast, "status", *asking(trio[2]))["groups"]
    assert (group["protected"]["step"], group["newest_step"], group["lag_steps"]) == (5, 6, 1)
    assert "1 step behind training" in holdfast("status", *asking(trio[2]))[1]

    code, out, _ = holdfast("inspect", "/6", "--explain", *asking(trio[0]))
    assert (code, "held by nobody" in out) == (13, True)
    finish(trainers[2])
    older = explained(holdfast, trio[0], "/5")
    assert (older["restorable"], older["chosen"], [n["reason"] for n in older["newer"]]) == (True, False, [None])
    out = holdfast("inspect", "/5", "--explain", *asking(trio[0]))[1]
    assert "can be restored, but a restore takes aaaaaaaa/6, which is newer" in out


def finish(trainer: Trainer) -> None:
    trainer.seal(1, NEXT, *small(rank=trainer.rank, world=3))


# -- who can be asked -------------------------------------------------------------------------------------------------


def test_agents_that_ask_for_certificates_are_asked_with_them(
    cluster: Cluster, holdfast: Holdfast, tmp_path: Path
) -> None:
    certs.make(tmp_path, [certs.Node("node"), certs.Node("tool")], datetime.now(UTC))
    nodes = cluster.nodes(3, trust=Trust(tmp_path / "ca.pem", tmp_path / "node.pem", tmp_path / "node.key"))
    cluster.snapshot(cluster.group(nodes, "2+1"), 0, STEP)
    found = document(holdfast, "status", *asking(nodes[0]))
    assert [(s["error"], "--tls-ca" in s["reason"]) for s in found["silent"]] == [("AgentUntrusted", True)] * 2
    (group,) = found["groups"]
    assert ([m["reachable"] for m in group["members"]], group["spare"]) == ([True] * 3, 1), "as their peer says"
    assert document(holdfast, "ls", *asking(nodes[0]))["snapshots"][0]["ranks"] == [0]

    tls = [
        f"--tls-{kind}={tmp_path / name}"
        for kind, name in (("ca", "ca.pem"), ("cert", "tool.pem"), ("key", "tool.key"))
    ]
    for index, address in enumerate((nodes[0].address, nodes[1].listen)):
        to = ("--to", str(tmp_path / f"out{index}"), "--format", "zarr")
        assert holdfast("restore", "latest", "--agent", address, *to, *tls)[0] == 0, "streamed, over TLS"
        assert document(holdfast, "status", "--agent", address, *tls)["silent"] == []
        assert document(holdfast, "ls", "--agent", address, *tls)["snapshots"][0]["complete"]
        assert document(holdfast, "inspect", "--agent", address, *tls)["sound"]
    assert holdfast("status", "--agent", nodes[1].listen)[0] == 5, "without certificates nobody answers there"
    assert holdfast("status", tls[0])[0] == 2


def test_another_job_at_a_peers_address_is_not_taken_for_it(
    trio: list[Node], cluster: Cluster, holdfast: Holdfast
) -> None:
    cluster.lose(trio[2])
    cluster.node(job="other", name="n9", listen=trio[2].listen)
    found = document(holdfast, "status", "--all", *asking(trio[0]))
    assert [agent["agent"] for agent in found["agents"]] == ["n0", "n1"]
    assert [(s["address"], s["error"]) for s in found["silent"]] == [(trio[2].listen, "AgentMismatch")]
    assert found["groups"][0]["spare"] == 0


def test_all_that_is_said_of_groups_is_documented(trio: list[Node], cluster: Cluster, holdfast: Holdfast) -> None:
    cluster.lose(trio[2])
    text = DOCS.read_text("utf-8")
    intro = text.partition("\n## holdfast agent")[0]
    for command, *options in (["status", "--all"], ["ls"], ["inspect", "--explain"]):
        section = intro + text.partition(f"## holdfast {command}")[2].partition("\n## ")[0]
        said = set(keys(document(holdfast, command, *options, *asking(trio[0]))))
        assert {key for key in said if f"`{key}`" not in section} == set()


# -- putting together what they say: no agents ------------------------------------------------------------------------


def report(agent: str, protected: int | None, *, reachable: tuple[bool, ...] = (True, True, True)) -> wire.StatusReport:
    group = wire.GroupStatus(tolerance=2)
    for index, there in enumerate(reachable):
        group.members.append(
            wire.MemberStatus(agent=f"n{index}", address=f"h{index}:1", ranks=[index], reachable=there)
        )
    if protected is not None:
        group.protected.CopyFrom(wire.Id(run=RUN, generation=1, step=protected))
    return wire.StatusReport(agent=agent, job="j", group=group)


def silent(address: str, error: type[Exception] = AgentUnreachable) -> Silent:
    return Silent(address, error("silent"))  # type: ignore[arg-type]


def test_what_all_members_hold_is_what_is_protected() -> None:
    told = [Answered(f"h{index}:1", report(f"n{index}", step)) for index, step in enumerate((7, 5, 6))]
    (group,) = groups(Answers(tuple(told), ()))
    assert (group.protected, group.spare, group.newest_step, group.lag_steps) == (STEP, 2, None, None)
    told[1] = Answered("h1:1", report("n1", None))
    assert groups(Answers(tuple(told), ()))[0].protected is None


def test_who_was_not_asked_is_as_reachable_as_the_others_say() -> None:
    seen = Answered("h0:1", report("n0", 5, reachable=(True, True, False)))
    unasked = tuple(silent(f"h{index}:1", AgentUntrusted) for index in (1, 2))
    assert [m.reachable for m in groups(Answers((seen,), unasked))[0].members] == [True, True, False]
    dead = (silent("h1:1"), silent("h2:1"))
    (group,) = groups(Answers((seen,), dead))
    assert ([m.reachable for m in group.members], group.spare) == ([True, False, False], 0)
