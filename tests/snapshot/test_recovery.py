"""The restore plan: which snapshot, from where, why not a newer one; and when something was lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

from holdfast.snapshot.beat import NONE
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import Held, InTier, Persisted, Plan, Rejected, plan

RUN, TWIN, NEXT = (run * 32 for run in "abc")


def id(step: int, generation: int = 1, run: str = RUN) -> SnapshotId:
    return SnapshotId(generation, step, run)


def image(
    id: SnapshotId, rank: int, *, world: int = 2, watermark: int = NONE, agent: str = "n0", slot: int = 0
) -> Held:
    return Held(id, rank, world, watermark, agent, f"/shm/rank-{rank:05d}.slot-{slot}", 1000 + rank)


def both(id: SnapshotId, *, watermark: int = NONE, slot: int = 0) -> list[Held]:
    return [image(id, rank, watermark=watermark, slot=slot) for rank in (0, 1)]


def chosen(held: Iterable[Held], world: int = 2, damaged: Iterable[Held] = ()) -> SnapshotId | None:
    return plan(held, damaged).chosen


def test_nothing_is_held() -> None:
    assert plan([]) == Plan(None, (), (), None)
    assert plan([]).explain() == "nothing to restore"


def test_the_newest_complete_one() -> None:
    held = both(id(4)) + both(id(5), slot=1)
    assert plan(held) == Plan(id(5), tuple(both(id(5), slot=1)), (), None)


def test_a_newer_one_that_never_was_complete_is_no_loss() -> None:
    found = plan([*both(id(4)), image(id(5), 1, watermark=4, slot=1)])
    assert found.chosen == id(4)
    assert found.rejected == (Rejected(id(5), "1 of 2 images cannot be had: rank 0 missing"),)
    assert found.loss is None


def test_a_later_run_counts_more_than_a_later_step() -> None:
    assert chosen(both(id(900)) + both(id(3, 2, NEXT), slot=1)) == id(3, 2, NEXT)


def test_runs_of_one_generation_are_never_mixed() -> None:
    """Both went back to the same point, and reached step 5 again."""
    assert chosen([image(id(5, 2, TWIN), 0), image(id(5, 2, NEXT), 1), *both(id(4), slot=1)]) == id(4)


def test_steps_are_never_mixed() -> None:
    assert chosen([image(id(5), 0), image(id(6), 1)]) is None


def test_a_watermark_says_what_was_complete() -> None:
    """The records of step 6 know that step 5 was complete; what is left cannot make up for it."""
    held = [*both(id(4)), image(id(6), 0, watermark=5, slot=1)]
    found = plan(held)
    assert found.chosen == id(4)
    assert [r.id.step for r in found.rejected] == [6, 5]
    assert (
        found.loss == f"{id(5)} was complete and cannot be had: known to have been complete, but no image of it is left"
    )
    assert found.explain().endswith(found.loss)


def test_a_watermark_of_what_is_older_than_the_choice_is_no_loss() -> None:
    assert plan(both(id(6), watermark=5)).loss is None


def test_damage_counts_as_missing_and_as_loss() -> None:
    found = plan(both(id(5)) + both(id(4), slot=1), [image(id(5), 1)])
    assert found.chosen == id(4)
    assert found.rejected == (Rejected(id(5), "1 of 2 images cannot be had: rank 1 damaged"),)
    assert found.loss is not None


def test_damage_to_what_is_not_chosen_does_not_matter() -> None:
    assert plan(both(id(5)) + both(id(4), slot=1), [image(id(4), 0, slot=1)]).chosen == id(5)


def test_another_copy_of_what_is_damaged_is_as_good_as_before() -> None:
    """Images were brought to another node, as for a restore there, and then one on its own node is damaged."""
    copies = [replace(held, agent="n1") for held in both(id(5))]
    held = [*both(id(5)), *copies, *both(id(4), slot=1)]
    bad = image(id(5), 1)
    assert plan(held, [bad]) == Plan(id(5), (image(id(5), 0), copies[1]), (), None)
    assert chosen(held, 2, [bad, copies[1]]) == id(4)


def test_all_is_lost() -> None:
    found = plan(both(id(5)), both(id(5)))
    assert (found.chosen, found.sources) == (None, ())
    assert (
        found.loss
        == f"{id(5)} was complete and cannot be had: 2 of 2 images cannot be had: rank 0 damaged, rank 1 damaged"
    )
    assert "nothing to restore" in found.explain()


def test_another_number_of_ranks() -> None:
    """However many ranks want it back, a snapshot is whole if all that took it are there."""
    found = plan([image(id(5), rank, world=4) for rank in range(4)])
    assert (found.chosen, found.world) == (id(5), 4)
    assert [source.rank for source in found.sources] == [0, 1, 2, 3]


def test_images_that_do_not_agree_on_the_ranks_make_no_snapshot() -> None:
    found = plan([image(id(5), 0, world=1), image(id(5), 1, world=2)])
    assert found.chosen is None
    assert found.rejected[0].reason == "images of it say that 1 or 2 ranks took it"


def test_many_missing_are_counted() -> None:
    (rejected,) = plan([image(id(5), 3, world=16)]).rejected
    assert rejected.reason.startswith("15 of 16 images cannot be had: rank 0 missing, rank 1 missing")
    assert rejected.reason.endswith("rank 8 missing and 7 more")


def test_one_of_several_copies_whatever_the_order() -> None:
    copies = [image(id(5), 0, agent="n2"), image(id(5), 0, agent="n1", slot=1), image(id(5), 0, agent="n1", slot=0),
              image(id(5), 1)]  # fmt: skip
    plans = {plan([*order, copies[0]]) for order in permutations(copies)}
    (only,) = plans
    assert only.sources == (copies[2], copies[3])


def test_the_plan_explains_itself() -> None:
    found = plan([*both(id(4)), image(id(5), 1, slot=1)])
    assert found.explain().splitlines() == [
        "passed over aaaaaaaa/5: 1 of 2 images cannot be had: rank 0 missing",
        "restore aaaaaaaa/4 (generation 1)",
        "  rank 0: /shm/rank-00000.slot-0 of agent n0, 1000 bytes",
        "  rank 1: /shm/rank-00001.slot-0 of agent n0, 1001 bytes",
    ]


def test_images_that_disagree_on_the_number_of_ranks() -> None:
    held = [image(id(5), 0, world=1), image(id(5), 0, world=2, agent="n1")]
    assert plan(held) == plan(held[::-1])


def in_tier(snapshot: SnapshotId, *ranks: tuple[int, int], world: int = 2, tier: int = 0, agent: str = "n1") -> InTier:
    return InTier(snapshot, world, tier, ranks, agent)


def test_a_tier_gives_what_memory_lost() -> None:
    a = id(5)
    found = plan([], stored=[in_tier(a, (0, 2))])
    assert (found.chosen, found.sources) == (a, (Persisted(0, 0, ("n1",)), Persisted(1, 0, ("n1",))))
    assert "read from tier 0 by n1" in found.explain()


def test_memory_comes_before_tiers_and_near_tiers_before_far_ones() -> None:
    a = id(5)
    held = image(a, 0)
    stored = [in_tier(a, (0, 2), tier=1), in_tier(a, (1, 2), tier=0, agent="n2"), in_tier(a, (0, 2), tier=0)]
    assert plan([held], stored=stored).sources == (held, Persisted(1, 0, ("n1", "n2")))
    assert plan([held], stored=stored, unreadable=[(a, 1, 0)]).sources == (held, Persisted(1, 1, ("n1",)))


def test_newer_in_memory_alone_is_passed_over_for_what_a_tier_has_whole() -> None:
    a, b = id(5), id(9)
    held = image(b, 0)
    found = plan([held], stored=[in_tier(a, (0, 2)), in_tier(b, (0, 1))])
    assert found.chosen == a
    assert [r.id for r in found.rejected] == [b]


def test_parts_of_node_local_tiers_make_a_whole() -> None:
    a = id(5)
    parts = [in_tier(a, (0, 1), agent="n1"), in_tier(a, (1, 2), agent="n2")]
    assert plan([], stored=parts).sources == (Persisted(0, 0, ("n1",)), Persisted(1, 0, ("n2",)))
    assert plan([], stored=parts[:1]).chosen is None
    assert plan([], stored=parts[:1]).loss is None  # a spill that was cut short: nothing was persisted
    assert plan([], stored=parts, unreadable=[(a, 1, 0)]).loss is not None  # it was whole, and is not any more


def test_a_tier_of_another_world_will_do() -> None:
    found = plan([], stored=[in_tier(id(5), (0, 3), world=3)])
    assert (found.chosen, found.world) == (id(5), 3)


def test_what_was_persisted_on_a_disk_that_is_lost_is_not_passed_over_in_silence() -> None:
    """A part of a snapshot in a tier may be a spill that was cut short; unless it was known to be whole."""
    part = in_tier(id(5), (0, 1))
    assert plan([], stored=[part]).loss is None
    decision = plan([], stored=[replace(part, whole=True)])
    assert decision.chosen is None
    assert decision.loss is not None
    assert "rank 1 missing" in decision.explain()


def test_what_was_lost_is_named() -> None:
    a, b = id(5), id(9)
    found = plan([], stored=[in_tier(a, (0, 2)), replace(in_tier(b, (0, 1), world=4), whole=True)])
    assert (found.chosen, found.lost) == (a, b)
    assert plan([], stored=[in_tier(a, (0, 2))]).lost is None
