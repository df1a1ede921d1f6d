"""What the agents of a job hold together: the snapshots, and what the restore plan would make of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from ..agent import wire_pb2 as wire
from ..agent.client import AgentClient
from ..agent.inventory import held_images, held_parities, in_tiers
from ..errors import ConfigError, SnapshotUnknown
from ..snapshot.outlook import Spare, spare_nodes
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, HeldParity, InTier, Prospect, prospects
from .answers import Answered, Answers, Asked, ask

LATEST: Final = "latest"
_LIST_S: Final = 60.0  # for an agent to list its tiers
_LOOKS: Final = 4  # at a job that moves on meanwhile
_NAME: Final = re.compile(r"(?:([0-9a-fA-F-]*)/)?(\d+|latest)")


@dataclass(frozen=True, slots=True)
class Copy:
    """One image, and the address of the agent that holds it."""

    address: str
    agent: str
    image: wire.Image


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All images of one snapshot that were found in memory, by rank. *world_in_tiers* counts where there are none: it lies in
    tiers only."""

    job: str
    id: SnapshotId
    copies: tuple[Copy, ...]
    world_in_tiers: int = 0

    @property
    def world(self) -> int:
        """How many ranks the snapshot was taken of."""
        return self.copies[0].image.world if self.copies else self.world_in_tiers

    @property
    def ranks(self) -> list[int]:
        """The ranks whose image is held, in order."""
        return sorted({copy.image.rank for copy in self.copies})

    @property
    def complete(self) -> bool:
        """Whether an image of every rank is held."""
        return self.ranks == list(range(self.world))

    @property
    def nbytes(self) -> int:
        """Length of the images together; what is held several times counts once."""
        return sum({copy.image.rank: copy.image.image_bytes for copy in self.copies}.values())


Holdings = tuple[wire.StatusReport, wire.ImageList, wire.TierList]


def ask_holdings(asked: Asked, *, tiers: bool = False) -> Answers[Holdings]:
    """Which snapshots each agent holds, and for which job; with *tiers*, also what it finds in those that it knows.

    No two agents are asked at the same instant. If a job trains on so fast that their answers have no snapshot in common, they
    are asked again, a few times.
    """
    for _ in range(_LOOKS):
        answers = ask(asked, _stored if tiers else _holdings, lambda holdings: holdings[0])
        if not any(job.moved_on for job in by_job(answers.given).values()):
            break
    return answers


def _holdings(client: AgentClient) -> Holdings:
    return client.status(), client.inventory(), wire.TierList()


def _stored(client: AgentClient) -> Holdings:
    report, images, none = _holdings(client)
    return report, images, client.stored(_LIST_S) if report.tiers else none


def snapshots(given: Iterable[Answered[Holdings]]) -> list[Snapshot]:
    """The snapshots held, by job, then newest first."""
    found: dict[tuple[str, SnapshotId], list[Copy]] = {}
    for answered in given:
        report, images, _ = answered.answer
        for image in images.images:
            id = SnapshotId(image.generation, image.step, image.run)
            found.setdefault((report.job, id), []).append(Copy(answered.address, report.agent, image))
    newest_first = sorted(found.items(), key=lambda entry: entry[0][1], reverse=True)
    return [
        Snapshot(job, id, tuple(sorted(copies, key=lambda copy: copy.image.rank)))
        for (job, id), copies in sorted(newest_first, key=lambda entry: entry[0][0])
    ]


class Named(Protocol):
    """What can be chosen by name. ``job`` is empty where it is not known."""

    @property
    def job(self) -> str: ...
    @property
    def id(self) -> SnapshotId: ...
    @property
    def complete(self) -> bool: ...


_Named = TypeVar("_Named", bound=Named)


def is_name(text: str) -> bool:
    """Whether *text* is the name of a snapshot: RUN/STEP, /STEP, RUN/latest or latest."""
    match = _NAME.fullmatch(text)
    return match is not None and (match[1] is not None or match[2] == LATEST)


def choose(name: str, held: Sequence[_Named], good: Callable[[_Named], bool] = lambda s: s.complete) -> _Named:
    """The one snapshot that *name* means; "latest" is the newest that is *good*. *held* has the newer ones of a job first.

    Raises:
        ConfigError: *name* is none, or means several.
        SnapshotUnknown: nothing that is held goes by that name.
    """
    match = _NAME.fullmatch(name)
    if match is None or not is_name(name):
        raise ConfigError(f"{name!r} names no snapshot: RUN/STEP, /STEP, RUN/latest or latest does")
    run = (match[1] or "").replace("-", "").lower()
    found = [s for s in held if s.id.run.startswith(run)]
    found = _newest(filter(good, found)) if match[2] == LATEST else [s for s in found if s.id.step == int(match[2])]
    if not found:
        raise SnapshotUnknown(f"no snapshot {name} is held; held are: {_listed(held) or 'none'}")
    if len(found) > 1:
        raise ConfigError(f"{name} may be any of {_listed(found)}; say more of the run, or which --job")
    return found[0]


def _newest(held: Iterable[_Named]) -> list[_Named]:
    """The newest snapshot of each job; *held* has the newer ones of a job first."""
    newest: dict[str, _Named] = {}
    for s in held:
        newest.setdefault(s.job, s)
    return list(newest.values())


def _listed(held: Iterable[Named]) -> str:
    words = (str(s.id) + (f" of job {s.job}" if s.job else "") + ("" if s.complete else " (incomplete)") for s in held)
    return ", ".join(words)


@dataclass(slots=True)
class JobHoldings:
    """What the agents of one job hold, as the restore plan sees it.

    Attributes:
        stored: what they find in tiers; tier_urls: what each tier is called, by its index.
        attached: of each rank whose trainer lives, the agent that it is attached to.
        prospects: of every snapshot that anybody holds or knows of, newest first.
    """

    images: list[Held] = field(default_factory=list)
    parities: list[HeldParity] = field(default_factory=list)
    stored: list[InTier] = field(default_factory=list)
    tier_urls: dict[int, str] = field(default_factory=dict)
    attached: dict[int, str] = field(default_factory=dict)
    prospects: dict[SnapshotId, Prospect] = field(default_factory=dict)

    @property
    def moved_on(self) -> bool:
        """Whether all that was seen may have been overwritten meanwhile by something newer: it makes no snapshot."""
        return bool(self.attached and self.images) and all(p.reason is not None for p in self.prospects.values())

    def spare(self, id: SnapshotId) -> Spare | None:
        """How many more agents may be lost, and *id* can still be restored."""
        return spare_nodes(id, self.images, self.parities)


def by_job(given: Iterable[Answered[Holdings]]) -> Mapping[str, JobHoldings]:
    """What was answered, put together for each job."""
    jobs: dict[str, JobHoldings] = {}
    for answered in given:
        report, images, tiers = answered.answer
        job = jobs.setdefault(report.job, JobHoldings())
        job.images += held_images(images)
        job.parities += held_parities(images)
        job.stored += in_tiers(tiers)
        job.tier_urls |= {index: tier.url for index, tier in enumerate(report.tiers)}
        job.attached |= {trainer.rank: report.agent for trainer in report.trainers if trainer.alive}
    for job in jobs.values():
        job.prospects = {p.id: p for p in prospects(job.images, parities=job.parities, stored=job.stored)}
    return jobs
