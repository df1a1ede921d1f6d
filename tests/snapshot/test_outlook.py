"""What could still be lost: counted by losing it, for groups of every kind, whole, degraded, and unprotected."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from holdfast.snapshot.beat import NONE
from holdfast.snapshot.outlook import Spare, spare_nodes
from holdfast.snapshot.record import SnapshotId
from holdfast.snapshot.recovery import Held, HeldParity, prospects
from hypothesis import given, settings
from hypothesis import strategies as st

ID = SnapshotId(1, 7, "a" * 32)
LATER = SnapshotId(1, 8, "a" * 32)


def image(rank: int, world: int, agent: str, *, complete: bool = True, id: SnapshotId = ID) -> Held:
    return Held(id, rank, world, NONE, agent, f"/{agent}/{rank}", 1000, complete, rank)


def group(ranks: Sequence[int], agents: Sequence[str], m: int, key: int = 1) -> list[HeldParity]:
    """All parity of one lane of a group."""
    return [HeldParity(ID, key, index, tuple(ranks), m, agent) for index, agent in enumerate(agents)]


def names(count: int) -> list[str]:
    return [f"n{index}" for index in range(count)]


def protected(n: int, m: int, *, complete: bool = True) -> tuple[list[Held], list[HeldParity]]:
    """One rank on each of *n* nodes of one group."""
    return [image(rank, n, f"n{rank}", complete=complete) for rank in range(n)], group(range(n), names(n), m)


def without(lost: Collection[str], held: list[Held], parities: list[HeldParity]) -> tuple[list[Held], list[HeldParity]]:
    return [h for h in held if h.agent not in lost], [p for p in parities if p.agent not in lost]


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (6, 2), (8, 3), (12, 4)])
def test_a_whole_group_spares_what_it_promises_and_then_less(n: int, m: int) -> None:
    held, parities = protected(n, m)
    for gone in range(m + 1):
        assert spare_nodes(ID, *without(names(gone), held, parities)) == Spare(m - gone)
    assert spare_nodes(ID, *without(names(m + 1), held, parities)) is None


def test_without_parity_nothing_may_be_lost_but_copies() -> None:
    held = [image(rank, 2, "n0") for rank in range(2)]
    assert spare_nodes(ID, held, []) == Spare(0)
    assert spare_nodes(ID, [*held, *(image(rank, 2, "n1") for rank in range(2))], []) == Spare(1)
    assert spare_nodes(ID, held[:1], []) is None
    assert spare_nodes(ID, [], []) is None


def test_what_is_not_known_to_have_been_complete_cannot_be_rebuilt() -> None:
    held, parities = protected(6, 2, complete=False)
    assert spare_nodes(ID, held, parities) == Spare(0)
    assert spare_nodes(ID, *without(["n0"], held, parities)) is None
    held[3] = replace(held[3], complete=True)
    assert spare_nodes(ID, held, parities) == Spare(0), "the one who knows may be the one who is lost"
    later = [replace(image(rank, 6, f"n{rank}", id=LATER), watermark=ID.step, complete=False) for rank in (1, 5)]
    assert spare_nodes(ID, [*held, *later], parities) == Spare(2), "two records of the next step know it too"


def test_the_weakest_group_counts() -> None:
    held = [image(rank, 9, f"n{rank}") for rank in range(9)]
    parities = group(range(6), names(6), 2, key=1) + group(range(6, 9), names(9)[6:], 1, key=2)
    assert spare_nodes(ID, held, parities) == Spare(1)
    assert spare_nodes(ID, *without(["n7"], held, parities)) == Spare(0)
    assert spare_nodes(ID, *without(["n1", "n2"], held, parities)) == Spare(0)
    assert spare_nodes(ID, *without(["n0"], held, parities)) == Spare(1)


def test_ranks_that_share_a_node_are_lost_together() -> None:
    agents = [f"n{rank // 2}" for rank in range(8)]
    held = [image(rank, 8, agent) for rank, agent in enumerate(agents)]
    lanes = [group(range(lane, 8, 2), names(4), 2, key=lane) for lane in range(2)]
    assert spare_nodes(ID, held, [*lanes[0], *lanes[1]]) == Spare(2)
    assert spare_nodes(ID, held, lanes[0]) == Spare(0), "the second lane has no parity"
    doubled = [replace(parity, agent=f"n{parity.index // 2}") for parity in group(range(8), names(8), 3)]
    assert spare_nodes(ID, held, doubled) == Spare(1), "to lose two nodes is to lose four members of a group"


def test_of_large_groups_only_so_much_is_counted() -> None:
    held, parities = protected(32, 8)
    assert spare_nodes(ID, held, parities) == Spare(3, exact=False)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(data=st.data(), n=st.integers(2, 6))
def test_the_count_is_that_of_the_plan_itself(data: st.DataObject, n: int) -> None:
    """Every number of agents is lost, in all ways, and the plan is asked what it makes of the rest."""
    m = data.draw(st.integers(1, n - 1))
    held, parities = protected(n, m, complete=data.draw(st.booleans()))
    held = data.draw(st.lists(st.sampled_from(held), unique=True, min_size=n - 1))
    extra = [
        image(rank, n, f"n{at}")
        for rank, at in data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n)), max_size=2))
    ]
    held = [*held, *(h for h in extra if h.path not in {e.path for e in held})]
    parities = data.draw(st.lists(st.sampled_from(parities), unique=True))
    agents = sorted({h.agent for h in held} | {p.agent for p in parities})

    def restorable(lost: Collection[str]) -> bool:
        left, guards = without(lost, held, parities)
        return any(p.id == ID and p.reason is None for p in prospects(left, parities=guards))

    found = spare_nodes(ID, held, parities)
    survived = [all(restorable(lost) for lost in combinations(agents, count)) for count in range(len(agents) + 1)]
    expected = survived.index(False) - 1
    assert found == (Spare(expected) if expected >= 0 else None)


def test_every_snapshot_has_a_prospect_and_its_own_number_of_ranks() -> None:
    held, parities = protected(3, 1, complete=False)
    held, parities = without(["n0"], held, parities)
    older = SnapshotId(1, 2, "b" * 32)
    found = list(prospects([*held, image(0, 1, "n1", id=older)], parities=parities))
    assert [(p.id, p.complete, len(p.sources)) for p in found] == [(ID, False, 0), (older, True, 1)]
    assert found[0].reason is not None
    assert found[0].reason.endswith("not known to have been complete, so nothing of it may be rebuilt")
    assert [p.reason for p in prospects([replace(h, complete=True) for h in held], parities=parities)] == [None]
