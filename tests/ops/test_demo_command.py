"""What the demo prints, and the exit code that it ends with, follow from the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from holdfast.ops.demo import driver
from holdfast.ops.demo.command import demo
from holdfast.ops.demo.driver import Outcome
from holdfast.ops.demo.journal import RankRecord
from holdfast.ops.demo.schedule import Landed, Target
from holdfast.ops.demo.verdict import KillCost, Verdict

NOTICE = Landed(Target.PREEMPT, 0, 5, 50.0, ["rank 1"], exit_s=1.25)
RANK = Landed(Target.RANK, 0, 5, 50.0, ["rank 1"])


def verdict(landed: Landed, **changes: Any) -> Verdict:
    cost = KillCost(landed, 7, 7, 0.1, None, 9.5, {}, stop_s=0.5 if landed is NOTICE else None)
    facts: dict[str, Any] = {
        "differences": [], "losses_compared": 80, "repeated_steps": 0, "lives": 2, "costs": [cost], "stalls_ms": [1.0]
    }  # fmt: skip
    return Verdict(**facts | changes)


def shown(monkeypatch: pytest.MonkeyPatch, out: Path, found: Verdict, *options: str) -> Result:
    """The demo's output, were *found* its verdict."""
    record = RankRecord(0, [], {})
    landed = [cost.landed for cost in found.costs]
    outcome = Outcome(found, [record], [record], landed, 0, "file:///here")
    monkeypatch.setattr(driver, "run_demo", lambda _plan, _watch: outcome)
    arguments = ["--no-plot", "--out", str(out), "--kill", "preempt", "--kills", "1", "--seed", "1", *options]
    return CliRunner().invoke(demo, arguments)


def test_a_preemption_without_a_loss_is_a_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = shown(monkeypatch, tmp_path, verdict(NOTICE))
    assert result.exit_code == 0, result.output
    for words in ("preempt", "to exit", "1.25 s", "No step lost at 1 preemption", "Snapshots in file:///here"):
        assert words in result.output
    report = json.loads((tmp_path / "verdict.json").read_text())
    assert (report["preempted"][0]["stop_s"], report["tier"]) == (0.5, "file:///here")


def test_a_preemption_that_cost_a_step_is_none_though_all_bits_are_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = verdict(NOTICE, broken=["notice to rank 1 at step 5: stopped after step 7, and went on from step 6"])
    result = shown(monkeypatch, tmp_path, found)
    assert result.exit_code == 1
    assert "went on from step 6" in result.output
    assert "No step lost" not in result.output
    result = shown(monkeypatch, tmp_path, found, "--json")
    assert (result.exit_code, json.loads(result.stdout)["bit_exact"]) == (1, True)


def test_a_wrong_bit_or_a_kill_that_never_came_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shown(monkeypatch, tmp_path, verdict(NOTICE, differences=["rank 0: wrong"])).exit_code == 1
    assert shown(monkeypatch, tmp_path, verdict(NOTICE, costs=[])).exit_code == 1


def test_without_a_preemption_nothing_is_said_of_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = shown(monkeypatch, tmp_path, verdict(RANK))
    assert result.exit_code == 0
    assert not [words for words in ("to exit", "No step lost", "cost more") if words in result.output]
