"""Which kills an attacked run gets, and when each is due. Pure: every choice follows from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self

from ...errors import ConfigError

STEPS_PER_KILL: Final = 4
"""Fewest steps for each kill: room to reach its step, to make progress, and not to end before the last."""

STEPS_TO_STOP: Final = 16
"""Fewest steps after the last kill if it may be a preemption notice: all ranks have to hear of it, and to find a free slot."""


class Target(Enum):
    """What a kill hits: ``trainer`` the process of every rank, ``rank`` that of one, ``agent`` one agent, ``all`` every
    trainer and agent; ``node`` a node: its trainers, its agent, and its memory. ``preempt`` kills nothing at once: one rank gets
    a preemption notice, and once the job has ended by itself, all its machines are taken away with their memory.
    """

    TRAINER = "trainer"
    RANK = "rank"
    AGENT = "agent"
    ALL = "all"
    NODE = "node"
    PREEMPT = "preempt"

    @property
    def ends_life(self) -> bool:
        """Whether training processes end, so that the job has to start again."""
        return self is not Target.AGENT


@dataclass(frozen=True, slots=True)
class Aim:
    """What the user wants hit: *target*, and if that is ``node``, how many at once."""

    target: Target
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Like ``rank``, ``node``, or ``node,node``. Raises ``ConfigError``."""
        names = text.split(",")
        known = [target.value for target in Target]
        if names[0] not in known or len(set(names)) > 1 or (len(names) > 1 and names[0] != Target.NODE.value):
            raise ConfigError(
                f"--kill {text!r}: {', '.join(known)} can be killed, and several nodes at once: node,node"
            )
        return cls(Target(names[0]), len(names))

    def __str__(self) -> str:
        return ",".join([self.target.value] * self.count)


@dataclass(frozen=True, slots=True)
class Planned:
    """A kill to come: once *step* is reached, wait *fraction* of a step's time, then hit *target*.

    ``rank`` is the one that a kill of a single rank hits, or that gets the notice of a preemption; ``nodes`` are those that a
    kill of nodes takes, and whose agent one of an agent hits.
    """

    target: Target
    step: int
    fraction: float
    rank: int
    nodes: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: the newest life (-1: none yet), the newest step of it, and the newest of all lives before.

    ``loss`` is the newest one seen, of rank 0.
    """

    life: int = -1
    step: int = 0
    step_before: int = 0
    loss: float | None = None

    @property
    def newest_step(self) -> int:
        return max(self.step, self.step_before)


@dataclass(frozen=True, slots=True)
class Landed:
    """A kill that happened, in *life*, after *step* had been seen, *wall_s* seconds after the epoch.

    ``nodes`` names those that were lost with their memory. ``exit_s``: how long after the notice of a preemption the last rank
    had ended.
    """

    target: Target
    life: int
    step: int
    wall_s: float
    victims: Sequence[str]
    nodes: Sequence[str] = ()
    exit_s: float | None = None

    @property
    def aim(self) -> Aim:
        """What was to be hit."""
        return Aim(self.target, max(1, len(self.nodes)))


def plan_kills(
    seed: int, *, kills: int, targets: Sequence[Aim], steps: int, ranks: int, nodes: int = 1
) -> list[Planned]:
    """Spread *kills* over a run of *steps*: one at a random instant of each of as many equal parts.

    Every one of *targets* gets its turn, in random order, as far as *kills* reaches.

    Raises:
        ConfigError: *steps* are too few for so many kills, or there are kills but no targets, or more nodes to kill at once
            than there are.
    """
    if kills and not targets:
        raise ConfigError(f"{kills} kills, and nothing to kill: name a target")
    # The end stays free: a kill that falls due there could come too late.
    spared = STEPS_TO_STOP if kills and any(aim.target is Target.PREEMPT for aim in targets) else STEPS_PER_KILL
    if steps < STEPS_PER_KILL * kills + spared:
        raise ConfigError(
            f"{kills} kills need at least {STEPS_PER_KILL * kills + spared} steps, {steps} were asked for"
        )
    if (most := max((aim.count for aim in targets), default=0)) > nodes:
        raise ConfigError(f"{most} nodes cannot be killed, as there are {nodes}")
    dice = random.Random(seed)  # noqa: S311  # a repeatable choice, not a secret
    turns = [targets[index % len(targets)] for index in range(kills)]
    dice.shuffle(turns)
    room = steps - spared
    return [
        Planned(
            target=aim.target,
            step=dice.randint(1 + room * index // kills, room * (index + 1) // kills),
            fraction=dice.random(),
            rank=dice.randrange(ranks),
            nodes=tuple(sorted(dice.sample(range(nodes), aim.count))),
        )
        for index, aim in enumerate(turns)
    ]


def due(planned: Planned, progress: Progress, last: Landed | None) -> bool:
    """Whether *planned* may land now: its step is reached, and since the *last* kill there was a step of progress."""
    if progress.step < planned.step:
        return False
    if last is None:
        return True
    if last.target.ends_life:
        return progress.life > last.life and progress.step > progress.step_before
    return progress.newest_step > last.step


def advanced(progress: Progress, life: int, step: int, loss: float | None = None) -> Progress:
    """*progress* after some rank was seen at *step* of *life*. News of an older life may come late."""
    loss = progress.loss if loss is None else loss
    if life < progress.life:
        return Progress(progress.life, progress.step, max(progress.step_before, step), loss)
    if life == progress.life:
        return Progress(life, max(progress.step, step), progress.step_before, loss)
    return Progress(life, step, progress.newest_step, loss)
