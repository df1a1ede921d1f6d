"""Groups of any roster: complete, even, the same in any order, and spread as well as an exhaustive search could."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from holdfast.erasure.placement import Group, Mode, Node, Protection, groups
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def protections(draw: st.DrawFn) -> Protection:
    if draw(st.integers(0, 3)) == 0:
        return Protection(Mode.AUTO)
    m = draw(st.integers(1, 6))
    return Protection(Mode.FIXED, draw(st.integers(1, 10)), m)


@st.composite
def nested(draw: st.DrawFn, most: int = 40) -> list[Node]:
    """Nodes on hosts in racks in zones: domains within each other; the names say nothing, some racks may have none."""
    count = draw(st.integers(2, most))
    numbers = {level: draw(st.integers(1, count)) for level in ("zone", "rack", "host")}
    host_of = [draw(st.integers(0, numbers["host"] - 1)) for _ in range(count)]
    rack_of = [draw(st.integers(0, numbers["rack"] - 1)) for _ in range(numbers["host"])]
    zone_of = [draw(st.integers(0, numbers["zone"] - 1)) for _ in range(numbers["rack"])]
    labels = draw(st.permutations([f"{i:03}" for i in range(3 * count)]))
    levels = draw(st.permutations(["zone", "rack", "host"]))
    said = draw(st.booleans())
    found = []
    for i, host in enumerate(host_of):
        rack = rack_of[host]
        domains = {"host": labels[host], "rack": labels[rack], "zone": labels[zone_of[rack]]}
        if not said and rack == 0:
            del domains["rack"]
        found.append(Node(labels[i], tuple((level, domains[level]) for level in levels if level in domains)))
    return found


@st.composite
def crossing(draw: st.DrawFn) -> list[Node]:
    """Nodes whose domains at different levels have nothing to do with each other."""
    count = draw(st.integers(2, 40))
    levels = draw(st.permutations(["feed", "rack", "host"]))
    numbers = {level: draw(st.integers(1, count)) for level in levels}
    return [
        Node(f"n{i}", tuple((level, str(draw(st.integers(0, numbers[level] - 1)))) for level in levels))
        for i in range(count)
    ]


def most_together(found: Sequence[Group], nodes: Sequence[Node], level: str) -> dict[str, int]:
    """For every domain of *level*, the most members that one group has in it."""
    domain = {node.name: node.domain(level) for node in nodes}
    most = Counter[str]()
    for group in found:
        most |= Counter(domain[name] for name in group.members)
    return dict(most)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.one_of(nested(), crossing()), protections())
def test_every_node_is_in_one_group_of_at_least_m_plus_1(nodes: list[Node], protection: Protection) -> None:
    found = groups(nodes, protection)
    assert Counter(name for group in found for name in group.members) == Counter(node.name for node in nodes)
    sizes = [group.n for group in found]
    assert max(sizes) - min(sizes) <= 1
    assert all(group.n >= group.m + 1 for group in found)
    if protection.mode is Mode.AUTO:
        assert max(sizes) <= 10
        assert {group.m for group in found} == {1 if len(nodes) <= 5 else 2}
    else:
        wanted = protection.k + protection.m
        assert {group.m for group in found} == {min(protection.m, len(nodes) - 1)}
        assert min(wanted * 3 // 4, len(nodes)) <= min(sizes)
        assert max(sizes) < 2 * wanted


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.one_of(nested(), crossing()), protections(), st.integers(0, 2**32))
def test_order_does_not_matter(nodes: list[Node], protection: Protection, seed: int) -> None:
    order = random.Random(seed)
    shuffled = [Node(node.name, tuple(order.sample(node.domains, len(node.domains)))) for node in nodes]
    order.shuffle(shuffled)
    assert groups(shuffled, protection) == groups(nodes, protection)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(nested(), protections())
def test_no_domain_has_more_in_a_group_than_it_must(nodes: list[Node], protection: Protection) -> None:
    """The pigeonhole principle is the witness: c nodes in g groups, ceil(c / g) in one of them at least."""
    found = groups(nodes, protection)
    for level in ("zone", "rack", "host"):
        sizes = Counter(node.domain(level) for node in nodes)
        assert most_together(found, nodes, level) == {d: -(-c // len(found)) for d, c in sizes.items()}


@settings(derandomize=True, deadline=None, max_examples=300)
@given(crossing(), protections())
def test_where_levels_cross_the_widest_is_even(nodes: list[Node], protection: Protection) -> None:
    found = groups(nodes, protection)
    domains = {level: Counter(node.domain(level) for node in nodes) for level in ("feed", "rack", "host")}
    fewest = min(map(len, domains.values()))
    if sum(len(sizes) == fewest for sizes in domains.values()) > 1:
        return  # a tie: which is wider is a matter of names
    (level,) = (level for level, sizes in domains.items() if len(sizes) == fewest)
    expected = {domain: -(-c // len(found)) for domain, c in domains[level].items()}
    assert most_together(found, nodes, level) == expected


def can_be_apart(nodes: Sequence[Node], level: str, sizes: Sequence[int]) -> bool:
    """Whether groups of *sizes* exist without two members in one domain of *level*: tried out, node after node."""
    taken: list[set[str]] = [set() for _ in sizes]

    def place(i: int) -> bool:
        if i == len(nodes):
            return True
        domain = nodes[i].domain(level)
        for group, size in zip(taken, sizes, strict=True):
            if len(group) < size and domain not in group:
                group.add(domain)
                if place(i + 1):
                    return True
                group.remove(domain)
        return False

    return place(0)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(nested(most=9), protections())
def test_members_are_apart_whenever_that_is_possible(nodes: list[Node], protection: Protection) -> None:
    found = groups(nodes, protection)
    for level in ("rack", "host"):
        apart = max(most_together(found, nodes, level).values()) == 1
        assert apart == can_be_apart(nodes, level, [group.n for group in found])
