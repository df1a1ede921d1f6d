"""Which part of a snapshot is restored, and under which names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Final

from ..errors import ConfigError
from .layout import Layout, Slice


@dataclass(frozen=True, slots=True)
class Selection:
    """What a restore takes of a snapshot.

    Attributes:
        strict: whatever does not fit is an error; otherwise it is left out, and reported.
        only: patterns as in a shell, of live names; empty for all.
        rename: a name in the snapshot, or with a dot at its end the beginning of some, and what it is called in the live state.
    """

    strict: bool = True
    only: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for a renaming of a beginning to a whole name, or the other way round."""
        for old, new in self.rename.items():
            if old.endswith(".") != new.endswith(".") or not old.rstrip(".") or not new.rstrip("."):
                raise ConfigError(
                    f"rename {old!r} to {new!r}: either both are names, or both are beginnings that end with a dot"
                )

    @property
    def whole(self) -> bool:
        """Whether all of the snapshot comes back: the run goes on where it was."""
        return self.strict and not self.only and not self.rename

    def wants(self, name: str) -> bool:
        """Whether the tensor, or module, of that live name is to be restored."""
        return not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)

    def live_name(self, name: str) -> str:
        """What the snapshot's *name* is called in the live state; the longest renaming that applies counts."""
        if name in self.rename:
            return self.rename[name]
        best = max((old for old in self.rename if old.endswith(".") and name.startswith(old)), key=len, default="")
        return self.rename[best] + name[len(best) :] if best else name

    def check(self, names: Iterable[str]) -> None:
        """Raise ``ConfigError`` if two of the snapshot's *names* that are wanted would be called the same."""
        called: dict[str, str] = {}
        for name in sorted(set(names)) if self.rename else ():
            other = called.setdefault(self.live_name(name), name)
            if other != name and self.wants(self.live_name(name)):
                raise ConfigError(f"rename: {other} and {name} of the snapshot would both be {self.live_name(name)}")

    def of(self, layout: Layout) -> Layout:
        """*layout* with its slices under their live names; those that are not wanted hold nothing.

        Slices keep their places and numbers, so what is read by them is the same.
        """
        if self.whole:
            return layout
        placed = tuple(replace(p, slice=replace(p.slice, name=self.live_name(p.slice.name))) for p in layout.placed)
        return replace(
            layout, placed=tuple(p if self.wants(p.slice.name) else replace(p, slice=_nothing(p.slice)) for p in placed)
        )


ALL: Final = Selection()


@dataclass(frozen=True, slots=True)
class Misfits:
    """What a snapshot and the live state do not have in common, by name.

    Attributes:
        missing: live, and not in the snapshot.
        unexpected: in the snapshot, and not live.
        mismatched: of another dtype or global shape; says which.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def lines(self, most: int = 20) -> str:
        """In words, one line each."""
        lines = [
            *(f"{name}: in the live state, not in the snapshot" for name in self.missing),
            *(f"{name}: in the snapshot, not in the live state" for name in self.unexpected),
            *self.mismatched,
        ]
        more = [f"and {len(lines) - most} more"] if len(lines) > most else []
        return "\n  ".join([*sorted(lines)[:most], *more])


def misfits(live: Iterable[Slice], saved: Iterable[Slice]) -> Misfits:
    """Compare by name, dtype and global shape; how tensors are cut into slices does not matter."""
    mine = {s.name: (s.dtype, s.shape) for s in live}
    theirs = {s.name: (s.dtype, s.shape) for s in saved}
    differing = [
        f"{name}: {mine[name][0]}{list(mine[name][1])} live, {theirs[name][0]}{list(theirs[name][1])} in the snapshot"
        for name in mine.keys() & theirs.keys()
        if mine[name] != theirs[name]
    ]
    return Misfits(
        tuple(sorted(mine.keys() - theirs.keys())),
        tuple(sorted(theirs.keys() - mine.keys())),
        tuple(sorted(differing)),
    )


def _nothing(piece: Slice) -> Slice:
    return replace(piece, name="", shape=(0,), start=(0,), extent=(0,), members=(), chunk=None)
