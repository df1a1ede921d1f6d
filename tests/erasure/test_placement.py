"""Placement by example: what is asked for, the groups that it gives, and what is said about them."""

from __future__ import annotations

import pytest
from holdfast.erasure.placement import Group, Mode, Node, Protection, groups, shared, tolerance
from holdfast.errors import ConfigError


def node(name: str, **domains: str) -> Node:
    return Node(name, (*domains.items(), ("host", f"host-{name}")))


def nodes(count: int, per_rack: int = 1) -> list[Node]:
    return [node(f"n{i:02}", rack=f"r{i // per_rack:02}") for i in range(count)]


@pytest.mark.parametrize("text", ["auto", "off", "4+2", "1+1", "30+2", "1+31"])
def test_protection_round_trips(text: str) -> None:
    assert str(Protection.parse(text)) == text
    assert Protection.parse(f" {text}\n") == Protection.parse(text)


def test_protection_is_what_was_written() -> None:
    assert Protection.parse("4+2") == Protection(Mode.FIXED, 4, 2)
    assert Protection.parse("04+002") == Protection.parse("4+2")
    assert Protection.parse("auto") == Protection(Mode.AUTO)
    assert Protection.parse("off") == Protection(Mode.OFF)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "none of"),
        ("4", "none of"),
        ("4+", "none of"),
        ("4+2+1", "none of"),
        ("4 + 2", "none of"),
        ("-4+2", "none of"),
        ("4.0+2", "none of"),
        ("٤+٢", "none of"),
        ("AUTO", "none of"),
        ("99999999999+1", "none of"),
        ("0+2", "k=0 and m=2"),
        ("4+0", "at least 1"),
        ("31+2", "k\\+m at most 32"),
        ("9999+1", "k\\+m at most 32"),
    ],
)
def test_anything_else_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        Protection.parse(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    ("protection", "count", "sizes", "m"),
    [
        ("off", 8, [], 0),
        ("auto", 1, [], 0),
        ("auto", 2, [2], 1),
        ("auto", 5, [5], 1),
        ("auto", 6, [6], 2),
        ("auto", 10, [10], 2),
        ("auto", 11, [5, 6], 2),
        ("auto", 25, [8, 8, 9], 2),
        ("4+2", 0, [], 0),
        ("4+2", 1, [], 0),
        ("4+2", 2, [2], 1),  # a mirror
        ("4+2", 3, [3], 2),
        ("4+2", 6, [6], 2),
        ("4+2", 9, [9], 2),
        ("4+2", 10, [5, 5], 2),
        ("4+2", 13, [6, 7], 2),
        ("1+1", 5, [2, 3], 1),
        ("1+4", 8, [8], 4),  # two groups of four could not lose four
        ("2+6", 4, [4], 3),
    ],
)
def test_sizes(protection: str, count: int, sizes: list[int], m: int) -> None:
    found = groups(nodes(count), Protection.parse(protection))
    assert sorted(group.n for group in found) == sizes
    assert {group.m for group in found} <= {m}
    assert all(group.k == group.n - group.m >= 1 for group in found)


def test_racks_are_spread_over_groups() -> None:
    """Two groups of six on six racks of two: one node of each rack in each."""
    found = groups(nodes(12, per_rack=2), Protection.parse("4+2"))
    assert [group.members for group in found] == [
        ("n00", "n02", "n04", "n06", "n08", "n10"),
        ("n01", "n03", "n05", "n07", "n09", "n11"),
    ]


def test_several_nodes_of_one_machine_part() -> None:
    alike = [Node(f"n{i}", (("host", f"h{i // 2}"),)) for i in range(8)]
    for group in groups(alike, Protection.parse("3+1")):
        assert len({int(name[1:]) // 2 for name in group.members}) == 4


def test_levels_are_told_apart_by_counting() -> None:
    """Simulated nodes: all on one host, in racks that are made up. The host is the wider level then."""
    made_up = [Node(f"n{i}", (("host", "laptop"), ("rack", f"r{i % 3}"))) for i in range(6)]
    for group in groups(made_up, Protection.parse("2+1")):
        assert len({int(name[1:]) % 3 for name in group.members}) == 3


def test_unnamed_domains_are_spread_like_one() -> None:
    half = [*(node(f"a{i}", rack="r0") for i in range(3)), *(node(f"b{i}") for i in range(3))]
    found = groups(half, Protection.parse("1+1"))
    assert [sorted(name[0] for name in group.members) for group in found] == [["a", "b"]] * 3


def test_where_levels_cross_the_widest_is_even() -> None:
    """Two power feeds, four racks, every rack on both feeds: each pair has both feeds, and two racks."""
    crossing = [node(f"n{i}", feed=f"f{i % 2}", rack=f"r{i // 2}") for i in range(8)]
    for group in groups(crossing, Protection.parse("1+1")):
        a, b = (int(name[1:]) for name in group.members)
        assert a % 2 != b % 2
        assert a // 2 != b // 2


def test_bad_rosters_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 nodes are named 'n00'"):
        groups([*nodes(2), node("n00")], Protection.parse("auto"))
    with pytest.raises(ConfigError, match="'x' names 2 domains of the level 'host'"):
        groups([*nodes(2), Node("x", (("host", "a"), ("host", "b")))], Protection.parse("auto"))


def test_tolerance_counts_the_living() -> None:
    group = Group(("a", "b", "c", "d"), 2)
    assert tolerance(group, ["a", "b", "c", "d", "stranger"]) == 2
    assert tolerance(group, {"a", "d"}) == 0
    assert tolerance(group, ["c"]) == -1


def test_shared_domains_in_words() -> None:
    roster = [
        Node("a", (("rack", "r1"), ("host", "h1"))),
        Node("b", (("rack", "r1"), ("host", "h1"))),
        Node("c", (("rack", "r1"), ("host", "h2"))),
        Node("d", (("rack", "r2"), ("host", "h3"))),
        Node("e", (("host", "h4"),)),
        Node("f", (("host", "h5"),)),
    ]
    assert shared(Group(("a", "d", "e", "f"), 1), roster) == []
    assert shared(Group(("a", "b", "d"), 1), roster) == [
        "a and b share host h1, and no more than 1 may be lost at once"
    ]
    assert shared(Group(("a", "b", "c", "d"), 2), roster) == [
        "a, b and c share rack r1, and no more than 2 may be lost at once",
        "a and b share host h1",
    ]
