"""The simulator bites: with any of these changes to the code under test, a schedule that fails is found, and soon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from holdfast.agent import guard
from holdfast.agent.guard import Cell, Guard, Offer, Stage
from holdfast.hooks import pulse
from holdfast.hooks.pulse import Pulse
from holdfast.snapshot import beat, recovery
from holdfast.snapshot.beat import Agreed
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.slots import SlotState
from holdfast.snapshot.slots import Stage as slots_stage
from holdfast.tests.simulation import agents, jobs, trainers
from holdfast.tests.simulation.schedules import DIETS, failure, schedule

_DIETS = {**DIETS, "restarts": {"trainer": 1.0}}
Change = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[str, range, Change]] = {}
"""By what is wrong: a diet on which it shows, the seeds of schedules one of which shows it, and the change."""


def mutant(diet: str, within: int, first: int = 0) -> Callable[[Change], Change]:
    """*first* is near the seed that shows it now, so that the search is long only after the code has changed."""

    def note(change: Change) -> Change:
        MUTANTS[change.__name__] = diet, range(first, first + within), change
        return change

    return note


@mutant("everything", 1000, first=700)
def keep_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "_may_go", lambda self, cell, lane, id: cell.stage is Stage.HELD)


@mutant("processes", 4000)
def parity_of_something_newer_goes(patch: pytest.MonkeyPatch) -> None:
    def may_go(self: Guard, cell: Cell, lane: int, id: SnapshotId) -> bool:
        return cell.stage is Stage.HELD and cell.id != self.keep

    patch.setattr(Guard, "_may_go", may_go)


@mutant("restarts", 4000, first=1500)
def what_the_job_relies_on_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jobs, "relied_on", lambda held, parities, newest: recovery.Relied(None, ()))


@mutant("nodes", 2000, first=300)
def images_are_rebuilt_that_were_never_complete(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recovery, "known_complete", lambda images: set(images))


@mutant("nodes", 4000)
def the_complete_word_is_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainers.Rank, "mark_complete", lambda self, id: None)


@mutant("nodes", 1000)
def the_watermark_is_reported_before_all_know_it(patch: pytest.MonkeyPatch) -> None:
    settle = Pulse._settle

    def too_early(self: Pulse, timeout_s: float) -> Any:
        verdict = settle(self, timeout_s)
        self.known = self.agreed.watermark
        return verdict

    patch.setattr(Pulse, "_settle", too_early)


@mutant("network", 1000)
def a_watermark_learned_late_is_not_marked(patch: pytest.MonkeyPatch) -> None:
    start = Pulse.start

    def without_marking(self: Pulse, standing: Any) -> None:
        advanced, self._advanced = self._advanced, lambda step: None
        start(self, standing)
        self._advanced = advanced

    patch.setattr(Pulse, "start", without_marking)


@mutant("nodes", 1000)
def all_parity_of_a_snapshot_is_taken_for_the_same(patch: pytest.MonkeyPatch) -> None:
    def loosely(offers: Iterable[Offer | None], tolerance: int) -> int:
        return next(offer.id.step for offer in offers if offer is not None)

    patch.setattr(guard, "key_of", loosely)


@mutant("nodes", 1000)
def parity_counts_in_any_place_of_the_group(patch: pytest.MonkeyPatch) -> None:
    cells = agents.Agent.cells

    def of_any_member(self: agents.Agent, table: Any, roster: Any) -> list[list[Cell]]:
        found = cells(self, table, roster)
        for (lane, index), parity in self.memory.cells.items():
            if parity is not None and lane < len(found):
                found[lane][index] = Cell(Stage.HELD, parity.id, parity.key)
        return found

    patch.setattr(agents.Agent, "cells", of_any_member)


@mutant("network", 400)
def guarded_is_told_when_the_first_lane_is_held(patch: pytest.MonkeyPatch) -> None:
    filled = Guard.filled

    def too_early(self: Guard, lane: int, attempt: int, now_s: float) -> list[guard.Action]:
        job = self._job(lane, attempt)
        early: list[guard.Action] = [] if job is None else [guard.TellGuarded(job.id)]
        return early + filled(self, lane, attempt, now_s)

    patch.setattr(Guard, "filled", too_early)


@mutant("network", 1000)
def what_fails_is_not_tried_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guard._Lane, "may_try", lambda self, id, now_s: id not in self.failures)
    patch.setattr(Guard, "tick", lambda self, now_s: [])


@mutant("processes", 1000)
def nobody_asks_a_restarted_agent_for_its_offers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Guard, "_others", lambda self: [])


@mutant("network", 2000, first=580)
def complete_here_skips_what_is_not(patch: pytest.MonkeyPatch) -> None:
    def newest(agreed: Agreed, sealed: frozenset[int]) -> int:
        return max([agreed.watermark, *(step for step in agreed.outstanding if step in sealed)])

    patch.setattr(pulse, "complete_here", newest)


@mutant("network", 2000)
def one_rank_is_enough(patch: pytest.MonkeyPatch) -> None:
    """The watermark is what the rank itself has, not what all have."""
    facts = Pulse._facts

    def hopeful(self: Pulse, standing: Any) -> beat.Facts:
        return replace(facts(self, standing), complete=max([self.agreed.watermark, *self.agreed.outstanding]))

    patch.setattr(Pulse, "_facts", hopeful)


@mutant("network", 50)
def the_newest_slot_is_overwritten(patch: pytest.MonkeyPatch) -> None:
    def newest(slots: list[SlotState], watermark: SnapshotId | None) -> int | None:
        free = [i for i, slot in enumerate(slots) if slot.stage is slots_stage.FREE]
        sealed = [
            (slot.id, i) for i, slot in enumerate(slots) if slot.stage is slots_stage.SEALED and slot.id is not None
        ]
        return free[0] if free else max(sealed)[1] if sealed and watermark is not None else None

    patch.setattr(trainers, "overwritable", newest)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    diet, seeds, change = MUTANTS[name]
    change(monkeypatch)
    found = next((seed for seed in seeds if failure(schedule(seed, _DIETS[diet])) is not None), None)
    assert found is not None, f"{len(seeds)} schedules do not notice that {name.replace('_', ' ')}"
    words, log = failure(schedule(found, _DIETS[diet])) or ("", [])
    print(f"after {found - seeds.start + 1} schedules: {words}\n...\n" + "\n".join(log[-10:]))
