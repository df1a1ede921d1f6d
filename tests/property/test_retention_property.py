"""Retention on any listing: what must never happen, against slow and obvious rules."""

from __future__ import annotations

from holdfast.snapshot.record import SnapshotId
from holdfast.storage.retention import Present, decide
from hypothesis import given, settings
from hypothesis import strategies as st

ids = st.builds(SnapshotId, st.integers(1, 4), st.integers(0, 30), st.sampled_from(["a" * 32, "b" * 32]))
listings = st.lists(
    st.builds(
        Present, ids, st.booleans(), st.sampled_from([False, False, False, True]), st.sampled_from([False, False, True])
    ),
    max_size=25,
    unique_by=lambda one: one.id,
)
keeps = st.integers(1, 4)
multiples = st.sampled_from([None, 1, 7, 10])
modest = settings(derandomize=True, deadline=None, max_examples=500)


@modest
@given(listing=listings, keep=keeps, multiple=multiples)
def test_the_rules(listing: list[Present], keep: int, multiple: int | None) -> None:
    verdicts = decide(listing, keep, multiple)
    assert [verdict.id for verdict in verdicts] == sorted(one.id for one in listing)
    goes = {verdict.id for verdict in verdicts if verdict.goes}
    complete = sorted(one.id for one in listing if one.complete)
    assert not goes & set(complete[-keep:])
    for one in listing:
        newer = sum(other.id > one.id and not other.complete for other in listing)
        if one.in_use or ((not complete or one.id > complete[-1]) and (one.elsewhere or newer < 2)):
            assert one.id not in goes
        if not one.complete and complete and one.id.generation < complete[-1].generation and not one.in_use:
            assert one.id in goes, "a later generation is complete: nobody finishes this"
        later = [
            o for o in listing if o.id > one.id and (o.id.run == one.id.run or o.id.generation > one.id.generation)
        ]
        if not one.complete and one.id in goes:
            assert any(other.complete for other in later) or len(later) >= 2
    hopes = [one for one in listing if not (one.complete or one.in_use or one.elsewhere or one.id in goes)]
    assert len(hopes) <= 2 * 3, "two of each of two runs, and two of what was before"
    if multiple is None:
        for run in ("a" * 32, "b" * 32):
            newest = [id for id in complete if id.generation == complete[-1].generation and id.run == run]
            assert not goes & set(newest[-keep:])
            used = {one.id for one in listing if one.in_use}
            assert set(newest[:-keep]) - set(complete[-keep:]) - used <= goes


@modest
@given(listing=listings, keep=keeps, multiple=multiples)
def test_what_stays_stays(listing: list[Present], keep: int, multiple: int | None) -> None:
    """Nothing more goes of what was left, however often it is asked, so several who prune do what one does."""
    verdicts = {verdict.id: verdict.goes for verdict in decide(listing, keep, None)}
    left = [one for one in listing if not verdicts[one.id]]
    assert not any(verdict.goes for verdict in decide(left, keep, None))
    # In any order, and cut off anywhere: what is left to be removed is the same.
    gone = [one for one in listing if verdicts[one.id]]
    rest = [*left, *gone[: len(gone) // 2]]
    assert {verdict.id for verdict in decide(rest, keep, None) if verdict.goes} == {
        one.id for one in gone[: len(gone) // 2]
    }
    # Milestones only add to what stays.
    stays = {verdict.id for verdict in decide(listing, keep, multiple) if not verdict.goes}
    assert {one.id for one in left} <= stays


@modest
@given(listing=listings, keep=keeps)
def test_each_multiple_has_its_milestone(listing: list[Present], keep: int) -> None:
    stays = {verdict.id for verdict in decide(listing, keep, 10) if not verdict.goes}
    for multiple in (1, 2, 3):
        inside = [one.id for one in listing if one.complete and one.id.step // 10 == multiple]
        if inside:
            assert stays & set(inside)
            newest = max(id.generation for id in inside)
            first = min(id.step for id in inside if id.generation == newest)
            # The newest generation's own first one stays, unless an earlier one stands for it on its way.
            assert any(id in stays and id.step <= first for id in inside)


@modest
@given(listing=listings, keep=keeps, multiple=multiples)
def test_keeping_fewer_never_keeps_more(listing: list[Present], keep: int, multiple: int | None) -> None:
    more = {verdict.id for verdict in decide(listing, keep + 1, multiple) if not verdict.goes}
    assert {verdict.id for verdict in decide(listing, keep, multiple) if not verdict.goes} <= more
