"""Who guards whom: nodes are split into groups, members spread over failure domains. Pure.

"4+2" on 13 nodes gives two groups, of 7 and of 6 nodes. Any 2 nodes of each may be lost: k = n - m is 5 in one, 4 in the other.

A *domain* is what fails at once: ("rack", "r1") is the domain r1 of the level "rack". Levels are ordered from wide to narrow by
counting, whatever their names: the fewer domains a level has, the wider it is (there are fewer racks than hosts, as a rack
has several). Between equals "host" comes last, the others by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError

GROUP_NODES_LIMIT = 32
"""The largest k+m that can be asked for. (Where the nodes do not divide evenly, a group may become up to twice as large.)"""

_AUTO_GROUP_NODES = 10
_AUTO_PAIR_NODES = 5  # up to here, one node that may be lost is enough: a second would cost half the memory or more
_NARROWEST = "host"


class Mode(Enum):
    """Whether groups are wanted, and who chooses their shape."""

    OFF = "off"
    AUTO = "auto"
    FIXED = "k+m"


@dataclass(frozen=True, slots=True)
class Protection:
    """How much protection is wanted. *k* and *m* are 0 unless the mode is fixed."""

    mode: Mode
    k: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Protection:
        """What the user wrote.

        Args:
            text: "k+m" as in "4+2" (any m nodes may be lost of each group of about k+m nodes; ``1 <= k``, ``1 <= m``,
                ``k + m <= 32``), "auto" (m = 1 up to 5 nodes, else 2; groups of at most 10 nodes), or "off".

        Raises:
            ConfigError: anything else.
        """
        for mode in (Mode.OFF, Mode.AUTO):
            if text.strip() == mode.value:
                return cls(mode)
        found = re.fullmatch(r"([0-9]{1,4})\+([0-9]{1,4})", text.strip())
        if found is None:
            raise ConfigError(f'protection {text!r} is none of "auto", "off" and k+m, such as "4+2"')
        k, m = int(found[1]), int(found[2])
        if k < 1 or m < 1 or k + m > GROUP_NODES_LIMIT:
            raise ConfigError(
                f"protection {text!r} has k={k} and m={m}: both must be at least 1, and k+m at most {GROUP_NODES_LIMIT}"
            )
        return cls(Mode.FIXED, k, m)

    def __str__(self) -> str:
        return f"{self.k}+{self.m}" if self.mode is Mode.FIXED else self.mode.value

    def shape(self, nodes: int) -> tuple[int, int]:
        """The number of groups that *nodes* nodes form, and how many nodes of each may be lost; (0, 0) for none.

        Group sizes then differ by one at most and are at least m + 1. With too few nodes for the m that is wanted, m is one less
        than there are nodes: the last one has everything.
        """
        if self.mode is Mode.OFF or nodes < 2:
            return 0, 0
        if self.mode is Mode.AUTO:
            return -(-nodes // _AUTO_GROUP_NODES), 1 if nodes <= _AUTO_PAIR_NODES else 2
        m = min(self.m, nodes - 1)
        wanted = self.k + self.m
        # The whole number nearest to nodes / wanted. A half goes down: larger groups need less memory for parity.
        nearest = (2 * nodes + wanted - 1) // (2 * wanted)
        return max(1, min(nearest, nodes // (m + 1))), m


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """One node: its *name*, unique in the job, and its failure domains as (level, domain), in any order.

    "host" is always among them.
    """

    name: str
    domains: tuple[tuple[str, str], ...]

    def domain(self, level: str) -> str:
        """Its domain at *level*; empty if it does not say. Nodes that do not say are taken to be together."""
        return dict(self.domains).get(level, "")


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that protect each other: names in member order (sorted), any *m* of which may be lost."""

    members: tuple[str, ...]
    m: int

    @property
    def n(self) -> int:
        """The number of members."""
        return len(self.members)

    @property
    def k(self) -> int:
        """Members that it takes to have everything."""
        return self.n - self.m


def groups(nodes: Sequence[Node], protection: Protection) -> tuple[Group, ...]:
    """The groups that *nodes* form: the same ones for the same nodes, in whatever order. None for a single node, or "off".

    Every node is in exactly one group. Where domains lie within each other (hosts in racks), every domain is spread as evenly as
    can be: a domain of c nodes has at most ceil(c / number of groups) in any group, at every level. So no two members
    share a rack if no rack has more nodes than there are groups. Where levels cross (a power feed serves halves of two
    racks), this holds for the widest level, and for narrower ones as far as swapping pairs of nodes gets.

    Raises:
        ConfigError: two nodes have one name, or a node has two domains at one level.
    """
    _check(nodes)
    count, m = protection.shape(len(nodes))
    if count == 0:
        return ()
    deal = _Deal(nodes, count)
    deal.mend()
    named = [tuple(sorted(node.name for node in dealt)) for dealt in deal.groups]
    return tuple(Group(members, m) for members in sorted(named))


def tolerance(group: Group, alive: Collection[str]) -> int:
    """How many more nodes *group* may lose while those in *alive* live; below 0, it has lost too many."""
    return group.m - sum(member not in alive for member in group.members)


def shared(group: Group, nodes: Sequence[Node]) -> list[str]:
    """Where several members of *group* would fail at once, in words, widest level first; the worst are marked.

    *nodes* is the whole roster. Members that are together at two levels are named at the narrower one only.
    """
    members = [node for node in nodes if node.name in group.members]
    together: dict[tuple[str, ...], tuple[str, str]] = {}
    levels = _levels(nodes)
    for level in levels:
        for domain in {node.domain(level) for node in members} - {""}:
            within = tuple(sorted(node.name for node in members if node.domain(level) == domain))
            if len(within) > 1:
                together[within] = (level, domain)
    found = sorted(together.items(), key=lambda item: (levels.index(item[1][0]), item[1][1]))
    return [_sentence(within, level, domain, group.m) for within, (level, domain) in found]


class _Deal:
    """Nodes dealt to *count* groups like cards, in the order of their domains, the widest level first.

    The nodes of a domain that lies within others come one after the other then, so the deal is even at all such levels.
    """

    def __init__(self, nodes: Sequence[Node], count: int) -> None:
        levels = _levels(nodes)
        self._own = {node: [(level, node.domain(level)) for level in levels] for node in nodes}
        ordered = sorted(nodes, key=lambda node: ([domain for _, domain in self._own[node]], node.name))
        self.groups = [ordered[i::count] for i in range(count)]
        self._in_group = [Counter(domain for node in group for domain in self._own[node]) for group in self.groups]
        sizes = Counter(domain for own in self._own.values() for domain in own)
        self._fair = {domain: -(-size // count) for domain, size in sizes.items()}

    def mend(self) -> None:
        """Swap nodes between groups while that spreads some level better, and no wider one worse.

        There is nothing to swap unless levels cross. Every swap lowers the list, by level, of how many nodes there are above the
        fair number of their domain: so it ends.
        """
        places = [(g, i) for g, group in enumerate(self.groups) for i in range(len(group))]
        while any(self._improve(g, i) for g, i in places):
            pass

    def _improve(self, g: int, i: int) -> bool:
        """Make the first swap that helps of the node at place *i* of group *g*, if there are too many like it."""
        node = self.groups[g][i]
        if all(self._in_group[g][domain] <= self._fair[domain] for domain in self._own[node]):
            return False
        for h, group in enumerate(self.groups):
            for j, other in enumerate(group):
                if h != g and self._change(g, node, h, other) < [0] * len(self._own[node]):
                    self.groups[g][i], group[j] = other, node
                    self._move(node, g, h)
                    self._move(other, h, g)
                    return True
        return False

    def _change(self, g: int, node: Node, h: int, other: Node) -> list[int]:
        """By level, how many more nodes would be above the fair number if *node* of *g* and *other* of *h* were swapped."""
        return [
            0 if a == b else self._one_less(g, a) + self._one_more(h, a) + self._one_less(h, b) + self._one_more(g, b)
            for a, b in zip(self._own[node], self._own[other], strict=True)
        ]

    def _one_more(self, group: int, domain: tuple[str, str]) -> int:
        return 1 if self._in_group[group][domain] >= self._fair[domain] else 0

    def _one_less(self, group: int, domain: tuple[str, str]) -> int:
        return -1 if self._in_group[group][domain] > self._fair[domain] else 0

    def _move(self, node: Node, source: int, target: int) -> None:
        self._in_group[source].subtract(self._own[node])
        self._in_group[target].update(self._own[node])


def _check(nodes: Sequence[Node]) -> None:
    for name, times in Counter(node.name for node in nodes).items():
        if times > 1:
            raise ConfigError(f"{times} nodes are named {name!r}: every node needs a name of its own")
    for node in nodes:
        for level, times in Counter(level for level, _ in node.domains).items():
            if times > 1:
                raise ConfigError(
                    f"node {node.name!r} names {times} domains of the level {level!r}: it can be in one only"
                )


def _levels(nodes: Sequence[Node]) -> list[str]:
    """All levels, widest first."""
    found = {level for node in nodes for level, _ in node.domains}
    domains = {level: len({node.domain(level) for node in nodes}) for level in found}
    return sorted(found, key=lambda level: (domains[level], level == _NARROWEST, level))


def _sentence(within: Sequence[str], level: str, domain: str, m: int) -> str:
    said = f"{', '.join(within[:-1])} and {within[-1]} share {level} {domain}"
    return said if len(within) <= m else f"{said}, and no more than {m} may be lost at once"
