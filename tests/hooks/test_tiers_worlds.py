"""Several ranks and tiers: what all of them wait for, hear of and end with together."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast import Checkpointer, Tier
from holdfast.agent import wire_pb2 as wire
from holdfast.agent.client import error_text, wire_id
from holdfast.errors import ConfigError, HoldfastError, TierFull
from holdfast.snapshot.record import SnapshotId
from holdfast.tests.hooks.nodes import WAIT_S, Node
from holdfast.tests.hooks.test_tiers import lost
from holdfast.tests.hooks.worlds import Rank, Trained, build, run_world


def _attached(here: Rank, seed: int = 1, **options: Any) -> tuple[Trained, Checkpointer]:
    kind, place, _ = here.said
    job = build(kind, here, seed)
    options = {"tiers": [Tier(place, every=1000)], "every": 1000, **options}
    return job, job.attach(here, **options)


# -- waiting -------------------------------------------------------------------------------------------------------------


def _persists(here: Rank) -> Any:
    """Waits for three snapshots, each as soon as it is taken."""
    job, ckpt = _attached(here)
    with ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            job.turn()
            ckpt.wait(ckpt.snapshot(step), "persisted", WAIT_S)
        job.turn()
        ckpt.step(4)  # the beat tells all
        return ckpt.persisted


def _comes_back(here: Rank) -> Any:
    job, ckpt = _attached(here, seed=2)
    with ckpt:
        return ckpt.restore(), job.bits()


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_all_ranks_wait_until_it_is_persisted(node: Node, tmp_path: Path, kind: str, world: int) -> None:
    told = run_world(_persists, world, node, (kind, str(tmp_path / "tier"), {}))
    assert told == [3] * world
    lost(node)
    back = run_world(_comes_back, world, node, (kind, str(tmp_path / "tier"), {}))
    assert {step for step, _ in back} == {3}


def _refused(here: Rank) -> Any:
    """What each rank is told of a tier that does not take it; and whether training, and snapshots in memory, go on."""
    job, ckpt = _attached(here)
    with ckpt:
        ckpt.restore()
        if here.said[2].get("alone") and here.rank == 1:
            _refuse(ckpt)
        job.turn()
        ticket = ckpt.snapshot(1)
        error: list[str] = []
        try:
            ckpt.wait(ticket, "persisted", 3.0)
        except HoldfastError as raised:
            error = [type(raised).__name__, str(raised)]
        for step in range(2, 500):
            if (ckpt.watermark or 0) > 3:
                break
            job.turn()
            ckpt.snapshot(step)
        return error, ckpt.watermark, ckpt.persisted


def _refuse(ckpt: Checkpointer) -> None:
    """Have the agent answer this rank that the tier is full."""

    def spill(id: SnapshotId, tiers: int) -> None:
        error = error_text(TierFull("no room, by the test"))
        ckpt._holding._hear(wire.FromAgent(spilled=wire.Spilled(id=wire_id(id), tier=0, error=error)))

    ckpt._holding.spill = spill  # type: ignore[method-assign]


def test_a_tier_that_refuses_one_rank_is_an_error_on_all(node: Node, tmp_path: Path) -> None:
    told = run_world(_refused, 2, node, ("ddp", str(tmp_path / "tier"), {"alone": True}))
    assert told[1][0] == ["TierFull", "no room, by the test"]
    assert told[0][0][0] == "PeerFailed"
    assert "rank 1 failed: TierFull: no room, by the test" in told[0][0][1]
    assert all(watermark > 3 and persisted is None for _, watermark, persisted in told)


def test_a_tier_that_cannot_be_written_says_why(node: Node, tmp_path: Path) -> None:
    place = tmp_path / "tier"
    place.mkdir()
    (place / "entries").write_text("no folder")
    told = run_world(_refused, 2, node, ("fsdp2", str(place), {}))
    for error, watermark, persisted in told:
        assert error[0] in ("TierUnreachable", "DeadlinePassed", "PeerFailed")
        assert str(place) in error[1], error
        assert watermark > 3
        assert persisted is None
    assert str(place) in node.status().tiers[0].trouble


def _other_tiers(here: Rank) -> Any:
    kind, place, _ = here.said
    try:
        build(kind, here, 1).attach(here, tiers=[Tier(f"{place}-{here.rank}")])
    except ConfigError as error:
        return str(error)
    return None


def test_ranks_that_name_other_tiers_are_refused(node: Node, tmp_path: Path) -> None:
    told = run_world(_other_tiers, 2, node, ("ddp", str(tmp_path / "tier"), {}))
    assert all("ranks [1] name other tiers" in error for error in told)


def _torn(here: Rank) -> Any:
    """A snapshot that is due in the tier is torn on rank 1: all give it up, and the next is spilled instead."""
    job, ckpt = _attached(here, tiers=[Tier(here.said[1], every=5)], every=1)
    with ckpt:
        ckpt.restore()
        for step in range(1, 9):
            job.turn()
            ticket = ckpt.snapshot(step)
            if here.rank == 1 and step == 5:
                with torch.no_grad():
                    next(iter(job.model.parameters())).to_local().mul_(2.0)  # type: ignore[attr-defined]
            with contextlib.suppress(HoldfastError):
                ckpt.wait(ticket)
            here.barrier()
        at = 8
        while ckpt.persisted is None and at < 500:
            at += 1
            job.turn()
            ckpt.step(at)
        return ckpt.persisted, dict(ckpt.stats().skipped)


def test_what_is_given_up_is_spilled_with_the_next(node: Node, tmp_path: Path) -> None:
    told = run_world(_torn, 2, node, ("fsdp2", str(tmp_path / "tier"), {}))
    assert told[1][1].get("torn") == 1, told
    assert told[0][0] == told[1][0]
    assert 5 < told[0][0] < 10, told


# -- preemption ----------------------------------------------------------------------------------------------------------


def _preempted(here: Rank) -> Any:
    """Rank 1 is told, with one snapshot under way; in the last step it can take none. All ranks stop alike."""
    kind, place, how = here.said
    job = build(kind, here, 1)
    with job.attach(here, tiers=[Tier(place, every=1000)], every=1000, grace="20s") as ckpt:
        ckpt.restore()
        steps = 0
        while not ckpt.should_stop:
            steps += 1
            assert steps < 30
            job.turn()
            if steps == 3 and here.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if steps >= 3 and how.get("fails") and here.rank == 1:
                _break(ckpt)
            ckpt.step(steps)
        return steps, job.bits(), here.logged


def _break(ckpt: Checkpointer) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("by the test")

    ckpt._begin = fails  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_rank_is_preempted(node: Node, tmp_path: Path, kind: str) -> None:
    told = run_world(_preempted, 3, node, (kind, str(tmp_path / "tier"), {}))
    (steps,) = {steps for steps, *_ in told}
    assert steps in (3, 4, 5)
    lost(node)
    back = run_world(_comes_back, 3, node, (kind, str(tmp_path / "tier"), {}))
    assert [step for step, _ in back] == [steps] * 3
    assert [bits for _, bits in back] == [bits for _, bits, _ in told]


def test_a_rank_that_fails_in_the_last_step_stops_with_the_others(node: Node, tmp_path: Path) -> None:
    told = run_world(_preempted, 2, node, ("fsdp2", str(tmp_path / "tier"), {"fails": True}))
    assert len({steps for steps, *_ in told}) == 1, told
    assert all(any("could not be persisted" in line for line in logged) for *_, logged in told)
