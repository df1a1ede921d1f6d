"""What several ranks' values make together, for a job that comes back with other ranks. Pure.

Values belong to parameters, modules and extras by name (``state``). A rank that comes back alone with what several had
needs the values of all of them: ``merged`` has them in one tree, its own namesake's first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from ..errors import Corrupt, LayoutMismatch
from .codec import encode

SHARED: Final = ("groups", "state", "loose", "modules")
"""The sections that tell of parameters and modules, whichever rank has them now; the others belong to one rank."""

Leaf = Callable[[object], Any]


def joined(names: Sequence[str]) -> str:
    """The names of a group's parameters as one text, which takes no time to capture."""
    return json.dumps(names, separators=(",", ":"))


def merged(own: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """*own*, and in its shared sections what *others* have besides; of the same name, the first counts."""
    found = {**own, **{section: dict(own[section]) for section in SHARED}}
    for other in others:
        for section in SHARED:
            for name, value in other[section].items():
                if section == "groups" and name in found[section]:
                    found[section][name] = [*found[section][name], *value]
                else:
                    found[section].setdefault(name, value)
    return found


class Hyperparameters:
    """The options of one optimizer's groups, by the names of their parameters: these may be grouped another way now."""

    def __init__(self, what: str, groups: Sequence[Mapping[str, Any]], leaf: Leaf) -> None:
        """*groups* as they were captured; *leaf* as for ``codec.encode``. Raises ``Corrupt`` if they are none."""
        self._what = what
        self._groups = groups
        self._leaf = leaf
        self._group_of: dict[str, int] = {}
        for index, group in enumerate(groups):
            try:
                names = json.loads(group["params"])
            except (TypeError, ValueError) as error:
                raise Corrupt(f"{what}: group {index} of the snapshot does not name its parameters") from error
            for name in names:
                self._group_of.setdefault(name, index)

    def of(self, names: Sequence[str]) -> Mapping[str, Any] | None:
        """The options that all parameters of these *names* had; None without any.

        Raises ``LayoutMismatch`` if there are some that no group had, or that had different options.
        """
        if unknown := [name for name in names if name not in self._group_of]:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise LayoutMismatch(f"{self._what}: no group of the snapshot has {', '.join(unknown[:5])}{more}")
        indices = sorted({self._group_of[name] for name in names})
        if len({self._bits(index) for index in indices}) > 1:
            first, other = (next(n for n in names if self._group_of[n] == i) for i in indices[:2])
            raise LayoutMismatch(
                f"{self._what}: {first} and {other} are in one group now, and were in groups of different options"
            )
        options: Mapping[str, Any] | None = self._groups[indices[0]]["options"] if indices else None
        return options

    def _bits(self, index: int) -> bytes:
        return encode(self._groups[index]["options"], "options", self._leaf).to_bytes()
