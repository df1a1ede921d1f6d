"""A run that was preempted is told apart from one that finished, and goes on with none of its machines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from holdfast.errors import ConfigError, HoldfastError
from holdfast.ops.demo import driver
from holdfast.ops.demo.driver import Plan, Run
from holdfast.ops.demo.journal import Journal, LifeStarted, StepDone, Stopped, finish
from holdfast.ops.demo.nodes import Node
from holdfast.ops.demo.schedule import Aim, Target

RANKS = 2


class Script:
    """A launcher that starts nothing: how its job stands is what the test says. Made like either of the real ones.

    Attributes:
        code: what the next ``poll`` finds.
        started: the first life of each start.
    """

    def __init__(self, *arguments: Any, **_options: Any) -> None:
        self.arguments: list[str] = arguments[1]
        self.environment: Mapping[str, str] = arguments[2]
        self.code: int | None = None
        self.started: list[int] = []
        scripts.append(self)

    def start(self, first_life: int) -> None:
        self.started.append(first_life)
        self.code = None

    def poll(self) -> int | None:
        return self.code

    def end(self) -> None:
        pass


scripts: list[Script] = []


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts.clear()
    for name in ("Torchrun", "Workers"):
        monkeypatch.setattr(driver, name, Script)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two ranks on one node, to be preempted once."""
    return Plan(
        nodes=1, ranks=RANKS, protect="auto", permute=False, strategy="ddp", steps=40, targets=[Aim(Target.PREEMPT)],
        kills=1, seed=0, out=tmp_path, timeout_s=60.0,
    )  # fmt: skip


def attacked(plan: Plan) -> Run:
    return Run(plan, "attacked", time.monotonic() + plan.timeout_s, protected=True)


def lived(run: Run, life: int, *steps: int, start: int = 0, stopped: bool = False, ranks: int = RANKS) -> None:
    """*ranks* ranks trained *steps* in *life*, and ended because of a notice, or just so."""
    for rank in range(ranks):
        with Journal(run.folder, rank) as journal:
            journal.write(LifeStarted(life, start, 0.0, {}))
            for step in steps:
                journal.write(StepDone(life, step, (1.0).hex(), 0.0))
            if stopped:
                journal.write(Stopped(life, steps[-1] if steps else start, 0.0))


def nodes_of(run: Run) -> list[Node]:
    return list(run._nodes)


def test_a_run_has_ended_only_once_every_rank_finished(plan: Plan) -> None:
    with attacked(plan) as run:
        assert run.goes_on()
        lived(run, 0, 1, 2)
        for rank in range(RANKS):
            finish(run.folder, rank, {})
        assert run.goes_on(), "processes are still there"
        scripts[0].code = 0
        assert not run.goes_on()
        assert (scripts[0].started, run.moved) == ([0], [])


def test_a_preempted_run_starts_again_with_nothing(plan: Plan) -> None:
    with attacked(plan) as run:
        (node,) = nodes_of(run)
        node.shm.mkdir(parents=True)
        lived(run, 0, 1, 2, 3, stopped=True)
        scripts[0].code = 0
        assert run.goes_on()
        assert (scripts[0].started, run.moved, run.relaunches) == ([0, 1], [0], 0)
        assert (node.shm.exists(), node.lost) == (False, False)
        lived(run, 1, 4, 5, start=3, stopped=True)
        scripts[0].code = 0
        assert run.goes_on()
        assert (scripts[0].started, run.moved) == ([0, 1, 2], [0, 1])


def test_all_simulated_nodes_are_taken_away(plan: Plan) -> None:
    with attacked(replace(plan, nodes=2, ranks=1)) as run:
        lived(run, 0, 1, stopped=True)
        scripts[0].code = 0
        assert run.goes_on()
        assert [node.lost for node in nodes_of(run)] == [True, True]
        assert scripts[0].started == [0, 1]


def test_ranks_that_leave_early_without_a_notice_end_the_run(plan: Plan) -> None:
    with attacked(plan) as run:
        lived(run, 0, 1, 2, stopped=True, ranks=1)
        with Journal(run.folder, 1) as journal:
            journal.write(LifeStarted(0, 0, 0.0, {}))
        (run.folder / "run.log").touch()
        scripts[0].code = 0
        with pytest.raises(HoldfastError, match=r"code 0 at step 2 of 40; ranks \[1\] were not preempted"):
            run.goes_on()


def test_a_job_that_is_preempted_before_each_first_step_does_not_start_for_ever(plan: Plan) -> None:
    with attacked(plan) as run:
        lived(run, 0, 1, stopped=True)
        scripts[0].code = 0
        assert run.goes_on()
        lived(run, 1, start=1, stopped=True)
        (run.folder / "run.log").touch()
        scripts[0].code = 0
        with pytest.raises(HoldfastError, match="code 0 at step 1 of 40, without a step"):
            run.goes_on()


def test_a_preemption_has_a_tier_in_the_output_folder(plan: Plan) -> None:
    (plan.out / "tier" / "entries" / "old").mkdir(parents=True)
    with attacked(plan) as run:
        assert run.tier == (plan.out / "tier").as_uri()
        assert {f"--tier={run.tier}", "--grace=60.0"} <= set(scripts[0].arguments)
        assert not (plan.out / "tier").exists(), "what an earlier demo left there is of another job"
    reference = Run(plan, "reference", time.monotonic(), protected=False)
    assert (reference.tier, [text for text in scripts[1].arguments if text.startswith(("--tier", "--grace"))]) == (
        None,
        [],
    )
    for other in (replace(plan, kills=0), replace(plan, targets=[Aim(Target.RANK)])):
        assert attacked(other).tier is None


def test_a_tier_that_was_named_is_shared_with_others_and_left_alone(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "mine" / "entries").mkdir(parents=True)
    named = replace(plan, tier=str(tmp_path / "mine"), targets=[Aim(Target.RANK)])
    with attacked(named) as run:
        assert run.tier is not None
        assert run.tier == (tmp_path / "mine").as_uri() + "/" + scripts[0].environment["HOLDFAST_JOB"]
        assert f"--tier={run.tier}" in scripts[0].arguments
        assert not any(text.startswith("--grace") for text in scripts[0].arguments), "nobody gives notice"
    assert (tmp_path / "mine" / "entries").exists()
    with pytest.raises(ConfigError, match="gone with the agents"):
        replace(plan, tier="memory://here").check()


def test_what_the_user_has_set_up_for_other_jobs_is_kept_out(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG", "/mine.toml")
    monkeypatch.setenv("HOLDFAST_AGENT", "/mine.sock")
    attacked(plan)
    assert not {"HOLDFAST_CONFIG", "HOLDFAST_AGENT"} & scripts[0].environment.keys()
