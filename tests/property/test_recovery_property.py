"""The restore plan against a slow, obvious twin, on any inventory."""

from __future__ import annotations

from holdfast.snapshot.beat import NONE
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import Held, plan
from hypothesis import given, settings
from hypothesis import strategies as st

# Runs with the number of their ranks; two of one generation, as after two restores from the same snapshot.
RUNS = {(1, "a" * 32): 2, (2, "b" * 32): 2, (2, "c" * 32): 2, (3, "d" * 32): 3}


@st.composite
def inventories(draw: st.DrawFn) -> list[Held]:
    """Sealed images, one per slot, of a few runs and steps."""
    held = []
    for agent in ("n0", "n1"):
        for slot in range(draw(st.integers(0, 7))):
            (generation, run), world = draw(st.sampled_from(list(RUNS.items())))
            id = SnapshotId(generation, draw(st.integers(1, 3)), run)
            watermark = draw(st.sampled_from([NONE, NONE, 1, 2, 3]))
            rank = draw(st.integers(0, world - 1))
            held.append(Held(id, rank, world, watermark, agent, f"{slot}", slot))
    return held


@st.composite
def full_inventories(draw: st.DrawFn) -> list[Held]:
    """As above, and some snapshots whole, so that there is something to choose from."""
    held = draw(inventories())
    for number, ((generation, run), world) in enumerate(RUNS.items()):
        for step in draw(st.sets(st.integers(1, 3), max_size=2)):
            id, missing = SnapshotId(generation, step, run), draw(st.integers(0, 2 * world))
            watermark = draw(st.sampled_from([NONE, step - 1 or NONE]))
            held += [
                Held(id, r, world, watermark, "n2", f"{number}/{step}/{r}", r) for r in range(world) if r != missing
            ]
    return held


@st.composite
def damages(draw: st.DrawFn) -> tuple[list[Held], set[Held]]:
    """An inventory, and the copies in it that are damaged."""
    held = draw(full_inventories())
    return held, draw(st.sets(st.sampled_from(held), max_size=6)) if held else set()


def had(held: list[Held], id: SnapshotId, ranks: int, damaged: set[Held]) -> bool:
    """Whether of every rank's image of *id* a sound copy is there."""
    return all(any(h.id == id and h.rank == r and h not in damaged for h in held) for r in range(ranks))


@settings(derandomize=True, deadline=None, max_examples=250)
@given(given=damages())
def test_the_plan_is_the_twins(given: tuple[list[Held], set[Held]]) -> None:
    held, damaged = given
    found = plan(held, damaged)
    whole = {h.id: h.world for h in held if had(held, h.id, h.world, damaged)}
    assert found.chosen == max(whole, default=None)

    assert [h.rank for h in found.sources] == list(range(whole[found.chosen]) if found.chosen else [])
    for source in found.sources:
        assert source in held
        assert source.id == found.chosen
        assert source not in damaged

    known = {h.id for h in held if had(held, h.id, h.world, set())}
    known |= {SnapshotId(h.id.generation, h.watermark, h.id.run) for h in held if h.watermark != NONE}
    newer = [id for id in {h.id for h in held} | known if found.chosen is None or id > found.chosen]
    assert [r.id for r in found.rejected] == sorted(newer, reverse=True)
    lost = sorted(known & set(newer), reverse=True)
    assert (found.loss is not None) == bool(lost)
    if lost:
        assert found.loss is not None
        assert found.loss.startswith(f"{lost[0]} was complete and cannot be had: ")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(given=damages(), data=st.data())
def test_order_and_repetition_do_not_matter(given: tuple[list[Held], set[Held]], data: st.DataObject) -> None:
    held, damaged = given
    again = data.draw(st.permutations(held))
    again += data.draw(st.lists(st.sampled_from(held), max_size=5)) if held else []
    found = plan(again, [*damaged, *damaged])
    assert found == plan(held, damaged)
    assert found.explain() == plan(iter(held), damaged).explain()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(held=full_inventories())
def test_striking_damage_ends(held: list[Held]) -> None:
    """As ``Restorer.newest`` does it: each damaged copy found is had from elsewhere, or makes the plan older, down to none."""
    damaged: set[Held] = set()
    seen: list[SnapshotId] = []
    while (found := plan(held, damaged)).chosen is not None:
        assert not seen or found.chosen <= seen[-1]
        assert not seen or found.chosen == seen[0] or found.loss is not None
        seen.append(found.chosen)
        source = found.sources[len(seen) % found.world]
        assert isinstance(source, Held)
        assert source not in damaged
        damaged.add(source)
    assert len(set(seen)) == len({h.id for h in held if had(held, h.id, h.world, set())})
