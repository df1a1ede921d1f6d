"""Bringing a snapshot back into the live state: plan, check, apply, compare; each stage together with all ranks.

Every stage ends with a gathering of outcomes, so no rank goes on alone: if one cannot, all learn why. A copy that turns
out damaged is struck from the plan; the image is then had from elsewhere, and if it cannot be, the next best snapshot is tried.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..crashpoints import reach
from ..errors import (
    ConfigError,
    Corrupt,
    HoldfastError,
    LayoutMismatch,
    RestoreDiverged,
    SnapshotLost,
    TierUnreachable,
)
from ..snapshot.arena import Slot
from ..snapshot.assembly import Read, assemble
from ..snapshot.beat import NONE
from ..snapshot.codec import decode, encode
from ..snapshot.layout import Layout
from ..snapshot.live import Source, SourceImage, apply, part_of
from ..snapshot.proof import Parts, identities, is_private, judged
from ..snapshot.record import SnapshotId
from ..snapshot.recovery import Held, Persisted, Plan, Rebuilt, plan
from ..snapshot.replicas import disagreeing, sums
from ..snapshot.selection import ALL, Selection
from ..snapshot.state import Survey, Targets, TrainingState, from_leaf, to_leaf
from ..snapshot.streams import fresh_streams, stream_digests
from ..snapshot.values import SHARED, merged
from .contract import Restored
from .found import Found, Result, together
from .images import Agent, Images, Windows
from .ranks import Ranks

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one rank is about to apply: verified as far as that is possible without reading the tensors' bytes.

    Attributes:
        shared: names of what replicas must hold alike afterwards.
        fresh: the ranks that draw from new random streams.
        described: all images, if others may be needed than this rank's and its replicas'.
    """

    images: dict[int, Source]
    targets: Targets
    reads: list[Read]
    values: dict[str, Any]
    shared: frozenset[str]
    fresh: tuple[int, ...] = ()
    described: _Described | None = None


@dataclass(frozen=True, slots=True)
class _Described:
    """What all ranks know of all images of a snapshot that other ranks took.

    Attributes:
        layouts, nbytes: of each image.
        alike: the random generators that drew the same numbers on all ranks.
        values: of those images that this rank has looked at.
        block_bytes: of those images whose checksums the rank knows that has looked at them.
        sources: of these, which this rank has.
    """

    layouts: dict[int, Layout]
    nbytes: dict[int, int]
    alike: frozenset[str]
    values: dict[int, dict[str, Any]]
    block_bytes: dict[int, int]
    sources: dict[int, SourceImage]


class _Bad(NamedTuple):
    """An image that some rank cannot use.

    Attributes:
        agent, path: the copy that it read; empty if that was brought to its node for it.
        nowhere: no source could give it: no copy, and not the group.
    """

    rank: int
    agent: str
    path: str
    nowhere: bool


@dataclass(slots=True)
class _Attempt:
    """What one rank reads in one attempt, and what it cannot use of that.

    Attributes:
        read: the copy of each rank's image that is read where it lies; what was brought here for this is not among them.
        damage: why the image of a rank cannot be used.
        nowhere: ranks whose images no source could give: every copy, and the group.
    """

    read: dict[int, Held] = field(default_factory=dict)
    damage: dict[int, str] = field(default_factory=dict)
    nowhere: set[int] = field(default_factory=set)

    def bad(self) -> list[_Bad]:
        """The damage, as it is told to other ranks."""
        copies = {rank: self.read.get(rank) for rank in sorted(self.damage)}
        return [
            _Bad(rank, copy.agent if copy else "", copy.path if copy else "", rank in self.nowhere)
            for rank, copy in copies.items()
        ]


@dataclass(slots=True)
class _Struck:
    """What the attempts so far have shown to be of no use.

    Attributes:
        copies: damaged, each by itself: other copies of the same image are as good as before.
        hopeless: images that their groups could not compute.
        unread: images that could not be read from a tier, and from which.
    """

    copies: set[Held] = field(default_factory=set)
    hopeless: set[tuple[SnapshotId, int]] = field(default_factory=set)
    unread: set[tuple[SnapshotId, int, int]] = field(default_factory=set)

    def left(self, images: Iterable[Held]) -> list[Held]:
        """Those of *images* that may be good."""
        bad = {copy.where for copy in self.copies}
        return [image for image in images if image.where not in bad]

    def strike(self, decision: Plan, found: Found, bad: Iterable[_Bad]) -> None:
        """*bad*, as the ranks said it, came of *decision* and *found*. Every attempt that fails strikes something."""
        id = decision.chosen
        assert id is not None
        for rank, agent, path, nowhere in bad:
            copies = [image for image in self.left(found.images) if (image.id, image.rank) == (id, rank)]
            source = decision.sources[rank]
            if nowhere:
                self.copies.update(copies)
                self.hopeless.add((id, rank))
                self.unread.update((id, rank, part.tier) for part in found.stored if part.id == id)
            elif read := [copy for copy in copies if (copy.agent, copy.path) == (agent, path)]:
                self.copies.update(read)
            elif isinstance(source, Rebuilt):
                self.hopeless.add((id, rank))
            elif isinstance(source, Persisted):
                self.unread.add((id, rank, source.tier))
            elif not path:  # it had been brought here, from there in all likelihood
                self.copies.add(source)


class Restorer:
    """One restore of one rank. Collective throughout: every rank calls the same methods in the same order."""

    def __init__(
        self,
        state: TrainingState,
        ranks: Ranks,
        timeout_s: float,
        mapped: Iterable[Slot] = (),
        here: str = "",
        agent: Agent | None = None,
        selection: Selection = ALL,
    ) -> None:
        """*mapped* are slots that need not be mapped again; *here* is the name of this node's *agent*, without which all images
        have to be on this node; *selection* says what is restored."""
        self._here = here
        self._agent = agent
        self._mapped = {slot.place.path: slot for slot in mapped}
        self._state = state
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._selection = selection
        self._unread: frozenset[tuple[SnapshotId, int, int]] = frozenset()

    def newest(self, found: Found) -> tuple[SnapshotId, Restored] | None:
        """Restore the newest snapshot that can be had, and say what came of it; None if none was ever complete.

        Raises:
            SnapshotLost: one was complete, and neither it nor an older one can be had. The live tensors may be partly
                overwritten if its images proved damaged only then.
            LayoutMismatch: it does not fit the live state; nothing is changed.
            ConfigError: there is nothing, and tiers hold another job's snapshots: perhaps it is this one, under another name.
            TierUnreachable: nothing is to be had, or not what was complete last, and a tier may have it that cannot be read now.
            RestoreDiverged: ranks that must agree do not.
        """
        struck = _Struck()
        while True:
            decision = plan(found.images, struck.copies, found.parities, struck.hopeless, found.stored, struck.unread)
            if decision.lost is not None and found.silent:
                raise TierUnreachable("\n".join([decision.explain(), "these tiers may have it:", *found.silent]))
            if decision.chosen is None:
                self._nothing_left(decision, found, struck)
                return None
            _log.log(logging.WARNING if decision.loss else logging.INFO, "%s", decision.explain())
            reach("restore.planned")
            self._unread = frozenset(struck.unread)
            left = replace(found, images=tuple(struck.left(found.images)))
            attempt = _Attempt()
            done = self._attempt(decision, self._read_once(decision, left), attempt)
            if done is not None:
                return decision.chosen, done
            struck.strike(decision, found, self._all_damage(attempt))

    def _read_once(self, decision: Plan, found: Found) -> Found:
        """*found*, with the images that come from tiers in the memory of their own ranks' nodes, as far as that goes. Collective.

        Replicas need each other's images. A tier may be slow and far away, so each image is read there once; the other nodes
        fetch it from the one that has it then. Other ranks than took it read the parts that they need.
        """
        rank, id, world = self._ranks.rank, decision.chosen, self._ranks.world
        persisted = any(isinstance(source, Persisted) for source in decision.sources)
        if world == 1 or decision.world != world or self._agent is None or not persisted:
            return found
        assert id is not None
        mine: list[dict[str, Any]] = []
        if isinstance(decision.sources[rank], Persisted):
            request = self._images(decision, found, None).request(rank)
            try:
                reply = self._agent.materialise(request, self._timeout_s)
            except HoldfastError as error:  # ``_prepare`` will meet it again, and judge
                _log.warning("%s of rank %d: %s", id, rank, error)
            else:
                _log.info("%s of rank %d: %s", id, rank, reply.how)
                mine = [{"rank": rank, "agent": self._here, "path": reply.path, "checks_crc": reply.checks_crc}]
        gathered = self._ranks.gather(json.dumps(mine).encode(), "reading tiers", self._timeout_s)
        brought = [
            Held(id=id, world=world, watermark=NONE, image_bytes=0, **entry)
            for part in gathered
            for entry in json.loads(part)
        ]
        return replace(found, images=(*found.images, *brought))

    def _nothing_left(self, decision: Plan, found: Found, struck: _Struck) -> None:
        """Raise unless it is certain that no snapshot ever was complete: starting afresh must not be an accident."""
        if found.silent:
            raise TierUnreachable("\n".join([decision.explain(), "these tiers may have more:", *found.silent]))
        if decision.loss or struck.copies or found.spoiled:
            lines = [f"{path}: it was sealed, and its record cannot be read" for path in found.spoiled]
            raise SnapshotLost("\n".join([decision.explain(), *lines]))
        if found.others:
            raise ConfigError(
                f"there is nothing of this job, but {'; '.join(found.others)}; if that is this job, name it so (job=, "
                f"HOLDFAST_JOB), or let it go on from there, Tier(…, any_job=True); else give it a tier of its own"
            )
        _log.info("%s", decision.explain())

    # -- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, decision: Plan, found: Found, attempt: _Attempt) -> Restored | None:
        """Restore as planned; None if images proved damaged on any rank, as *attempt* then says. Collective."""
        with ExitStack() as stack:
            windows = None if self._agent is None else Windows(self._agent, self._ranks.rank, self._timeout_s)
            if windows is not None:
                stack.callback(windows.close)
            images = self._images(decision, found, windows)
            prepared = self._prepare(decision, images, stack, attempt)
            if prepared is None:
                return None
            read_bytes = self._together("restoring", lambda: self._apply(prepared, attempt))
            if self._any(attempt.damage):
                return None
            proved_bytes = 0
            if prepared.described is not None and self._selection.whole:
                proved_bytes = self._prove(prepared, prepared.described)
            self._together("restoring values", lambda: self._finish(prepared))
            pulled_bytes = 0 if windows is None else windows.pulled_bytes
        self._compare(prepared.shared)
        reach("restore.applied")
        assert decision.chosen is not None
        misfits = prepared.targets.misfits
        return Restored(
            decision.chosen.step,
            decision.chosen.run,
            decision.world,
            prepared.fresh,
            misfits.missing,
            misfits.unexpected,
            misfits.mismatched,
            read_bytes,
            pulled_bytes,
            proved_bytes,
        )

    def _images(self, decision: Plan, found: Found, windows: Windows | None) -> Images:
        return Images(decision, found, self._here, self._agent, windows, self._mapped, self._unread, self._timeout_s)

    def _prepare(self, decision: Plan, images: Images, stack: ExitStack, attempt: _Attempt) -> _Prepared | None:
        """What this rank is to apply; None if images are damaged, here or elsewhere. Collective."""
        if decision.world == self._ranks.world:
            prepared = self._together("preparing the restore", lambda: self._as_before(images, stack, attempt))
            if self._any(attempt.damage):
                return None
            if not self._any(prepared is None):
                return prepared
        return self._anew(decision, images, stack, attempt)

    def _as_before(self, images: Images, stack: ExitStack, attempt: _Attempt) -> _Prepared | None:
        """If this rank holds what it held then: its own image, and those of its replicas, are all it takes. None if that is not
        so, or if images are damaged."""
        rank, survey = self._ranks.rank, self._state.survey()
        opened = {needed: self._open(needed, images, stack, attempt) for needed in self._needed(survey)}
        sources = {needed: source for needed, source in opened.items() if source is not None}
        values = None if attempt.damage else self._values(rank, sources[rank], attempt)
        if values is None:
            return None
        self._selection.check(p.slice.name for source in sources.values() for p in source.layout.placed)
        layouts = {owner: self._selection.of(source.layout) for owner, source in sources.items()}
        held = [
            placed.slice
            for owner, layout in layouts.items()
            for placed in layout.placed
            if owner == rank or rank in placed.slice.members
        ]
        targets = self._state.targets(held, self._selection, survey)
        if targets.misfits or self._state.lacks(values):
            return None
        try:
            reads = assemble([item.slice for item in targets.items], layouts, rank)
        except LayoutMismatch:
            return None
        shared = frozenset(piece.name for piece in held if piece.members)
        return _Prepared(sources, targets, reads, values, shared)

    def _anew(self, decision: Plan, images: Images, stack: ExitStack, attempt: _Attempt) -> _Prepared | None:
        """If ranks or meshes are others than they were: whatever any image holds may be needed. Collective."""
        id, rank, world = decision.chosen, self._ranks.rank, decision.world
        assert id is not None
        described = self._describe(world, images, stack, attempt)
        if described is None:
            return None
        namesake = rank % world
        own = self._together("reading values", lambda: self._own_values(namesake, images, stack, attempt, described))
        if self._any(attempt.damage) or own is None:
            return None
        self._selection.check(p.slice.name for layout in described.layouts.values() for p in layout.placed)
        layouts = {owner: self._selection.of(layout) for owner, layout in described.layouts.items()}
        held = [placed.slice for layout in layouts.values() for placed in layout.placed if placed.slice.name]
        if rank == 0 and world != self._ranks.world:
            _warn_of_private(layouts.values(), world)
        targets = self._together("comparing names", lambda: self._state.targets(held, self._selection))
        values = self._merged(own, described.values)
        targets = self._known_elsewhere(targets, self._state.foreign_modules(values))
        fresh = [part for part in own["rng"] if part not in described.alike] if rank >= world else []
        values["rng"] = fresh_streams(own["rng"], fresh, f"{id.run}/{id.step}/{rank}")
        drawn = self._selection.whole and described.alike < own["rng"].keys()
        new = range(world, self._ranks.world) if drawn else range(0)

        def finish() -> _Prepared:
            if targets.misfits and self._selection.strict:
                raise LayoutMismatch(f"the snapshot does not fit the live state:\n  {targets.misfits.lines()}")
            if self._selection.whole:
                self._state.check_values(values)
            wanted = [item.slice for item in targets.items]
            near = {q for q in range(world) if images.copy_here(q) is not None}
            reads = assemble(wanted, layouts, namesake, near=near, alike=True)
            sources: dict[int, Source] = {}
            for needed in sorted({read.rank for read in reads}):
                source = self._open(needed, images, stack, attempt, described)
                if source is not None:
                    sources[needed] = source
            shared = frozenset(item.slice.name for item in targets.items if item.slice.members)
            return _Prepared(sources, targets, reads, values, shared, tuple(new), described)

        prepared = self._together("preparing the restore", finish)
        return None if self._any(attempt.damage) else prepared

    def _describe(self, world: int, images: Images, stack: ExitStack, attempt: _Attempt) -> _Described | None:
        """Each rank looks at some images, those of its own node first, and tells the others of them. Collective."""
        said: dict[str, Any] = {}
        values: dict[int, dict[str, Any]] = {}
        sources: dict[int, SourceImage] = {}

        def look() -> None:
            for number in range(world):
                if images.nearest(number) != self._ranks.rank:
                    continue
                source = self._open(number, images, stack, attempt)
                its = None if source is None else self._values(number, source, attempt)
                if source is None or its is None:
                    continue
                values[number] = its
                text = source.layout.to_text().decode("utf-8", "surrogatepass")
                block_bytes = 0
                if isinstance(source, SourceImage):
                    sources[number], block_bytes = source, source.record.block_bytes
                said[str(number)] = [source.nbytes, text, stream_digests(its["rng"]), block_bytes]

        self._together("looking at the images", look)
        if self._any(attempt.damage):
            return None
        told: dict[int, list[Any]] = {}
        for part in self._ranks.gather(
            zlib.compress(json.dumps(said).encode(), 1), "comparing layouts", self._timeout_s
        ):
            told.update({int(number): entry for number, entry in json.loads(zlib.decompress(part)).items()})
        layouts = {n: Layout.from_text(text.encode("utf-8", "surrogatepass")) for n, (_, text, *_) in told.items()}
        streams = [digests for _, _, digests, _ in told.values()]
        alike = frozenset(part for part in streams[0] if len({digests.get(part) for digests in streams}) == 1)
        nbytes = {n: entry[0] for n, entry in told.items()}
        block_bytes = {n: entry[3] for n, entry in told.items() if entry[3]}
        return _Described(layouts, nbytes, alike, values, block_bytes, sources)

    def _own_values(
        self, number: int, images: Images, stack: ExitStack, attempt: _Attempt, described: _Described
    ) -> dict[str, Any] | None:
        """The values of that rank's image; None if they cannot be had."""
        if number in described.values:
            return described.values[number]
        source = self._open(number, images, stack, attempt, described)
        return None if source is None else self._values(number, source, attempt)

    def _merged(self, own: dict[str, Any], looked_at: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        """*own* values, with what other ranks' have of parameters and modules if any rank needs that. Collective."""
        lacking = self._together("comparing values", lambda: self._state.lacks(own))
        if not self._any(lacking):
            return dict(own)
        mine = {str(n): {section: its[section] for section in SHARED} for n, its in looked_at.items()}
        gathered = self._ranks.gather(encode(mine, "values", to_leaf).to_bytes(), "sharing values", self._timeout_s)
        others: dict[int, Mapping[str, Any]] = {}
        for part in gathered:
            found = decode(np.frombuffer(part, np.uint8), from_leaf)
            assert isinstance(found, dict)
            others.update({int(number): sections for number, sections in found.items()})
        return merged(own, (others[number] for number in sorted(others)))

    def _known_elsewhere(self, targets: Targets, modules: Iterable[str]) -> Targets:
        """*targets*, where of tensors and *modules* what no rank at all has live counts as unexpected. Collective."""
        mine = [*targets.misfits.unexpected, *filter(self._selection.wants, modules)]
        said = zlib.compress(json.dumps(mine).encode(), 1)
        gathered = self._ranks.gather(said, "comparing names", self._timeout_s)
        nowhere = set.intersection(*(set(json.loads(zlib.decompress(part))) for part in gathered))
        return replace(targets, misfits=replace(targets.misfits, unexpected=tuple(sorted(nowhere))))

    # -- images ------------------------------------------------------------------------------------------------------

    def _open(
        self, rank: int, images: Images, stack: ExitStack, attempt: _Attempt, described: _Described | None = None
    ) -> Source | None:
        """The image of *rank*; None if it cannot be had, as *attempt* then says.

        This rank's own is brought into a slot, where it will be protected; of any other, the parts that are needed.
        """
        if (here := images.copy_here(rank)) is not None:
            attempt.read[rank] = here
        try:
            if described is None and rank == self._ranks.rank < images.world == self._ranks.world:
                source: Source = images.mapped(rank)
            elif described is None:
                source = images.ranged(rank)
            else:
                source = images.ranged(rank, (described.layouts[rank], described.nbytes[rank]))
        except SnapshotLost as error:
            attempt.damage[rank] = str(error)
            attempt.nowhere.add(rank)
            return None
        except (Corrupt, OSError) as error:
            attempt.damage[rank] = str(error)
            return None
        stack.callback(source.close)
        if described is not None and source.layout != described.layouts[rank]:
            attempt.damage[rank] = "it is laid out in another way than another copy of it"
            return None
        return source

    def _values(self, rank: int, source: Source, attempt: _Attempt) -> dict[str, Any] | None:
        """The values in that rank's image; None if they are damaged, as *attempt* then says."""
        try:
            values = decode(source.values(), from_leaf)
        except SnapshotLost as error:
            attempt.damage[rank] = str(error)
            attempt.nowhere.add(rank)
            return None
        except Corrupt as error:
            attempt.damage[rank] = str(error)
            return None
        if not isinstance(values, dict):
            raise LayoutMismatch(f"the values of rank {rank} are a {type(values).__name__}, not a state")
        return values

    def _needed(self, survey: Survey) -> list[int]:
        """The ranks whose images hold something of this rank's state if all is as it was: its own, and those of its replicas."""
        if self._ranks.world == 1:
            return [0]
        members = {rank for item in survey.items for rank in item.slice.members}
        return sorted(members | {self._ranks.rank})

    # -- applying ----------------------------------------------------------------------------------------------------

    def _apply(self, prepared: _Prepared, attempt: _Attempt) -> int:
        nbytes = 0
        by_rank: dict[int, list[Read]] = {}
        for read in prepared.reads:
            by_rank.setdefault(read.rank, []).append(read)
        for rank, reads in by_rank.items():
            try:
                nbytes += apply(prepared.targets.items, reads, {rank: prepared.images[rank]})
            except (Corrupt, SnapshotLost) as error:
                attempt.damage[rank] = str(error)
                attempt.nowhere.update([rank] if isinstance(error, SnapshotLost) else [])
                break
        return nbytes

    def _finish(self, prepared: _Prepared) -> None:
        self._state.install(prepared.targets)
        if self._selection.whole:
            self._state.apply_values(prepared.values)
        else:
            self._state.apply_some(prepared.values, self._selection)

    def _prove(self, prepared: _Prepared, described: _Described) -> int:
        """How many bytes of the images are found again in the live tensors of all ranks, by the checksums taken at the seal.

        Raises ``RestoreDiverged`` if some are others. Collective.
        """
        mine: dict[str, Any] = {}
        items = prepared.targets.items
        names = identities([item.slice for item in items])
        said = self._ranks.gather(names.tobytes(), "comparing who holds what", self._timeout_s)
        lower = np.concatenate([np.frombuffer(part, np.uint64) for part in said[: self._ranks.rank]] or [names[:0]])
        counts = ~np.isin(names, lower)  # what several hold alike is counted once
        for number in sorted({read.rank for read in prepared.reads} & described.block_bytes.keys()):
            layout, parts = described.layouts[number], Parts(described.block_bytes[number])
            parts.add_live(
                part_of(items[read.target], read, layout)
                for read in prepared.reads
                if read.rank == number and not is_private(layout.placed[read.index].slice) and counts[read.target]
            )
            mine[str(number)] = parts.by_block(described.nbytes[number]).to_value()
        said = self._ranks.gather(encode(mine, "sums", to_leaf).to_bytes(), "adding up what is live", self._timeout_s)
        told: list[Any] = [decode(np.frombuffer(part, np.uint8), from_leaf) for part in said]

        def judge() -> int:
            proved = 0
            for number, source in described.sources.items():
                found, wrong = judged(source, [sums[str(number)] for sums in told if str(number) in sums])
                proved += found
                if wrong:
                    raise RestoreDiverged(
                        f"what is live now is not what rank {number} had sealed: blocks {wrong[:5]} of its image differ"
                    )
            return proved

        proved = self._together("comparing with what was sealed", judge)
        return sum(map(int, self._ranks.gather(str(proved).encode(), "adding up what is proved", self._timeout_s)))

    def _compare(self, shared: frozenset[str]) -> None:
        """Replicas must hold the same bytes now. Raises ``RestoreDiverged`` otherwise. Collective."""
        items = [i for i in self._state.survey().items if i.slice.members and i.slice.name in shared] if shared else []
        said = json.dumps(sums(items)).encode()
        gathered = [json.loads(part) for part in self._ranks.gather(said, "comparing restored state", self._timeout_s)]

        def judge() -> None:
            if split := disagreeing(gathered, {item.slice.members for item in items}):
                raise RestoreDiverged(
                    f"after the restore, ranks {list(split[0])} hold different bytes of what they share"
                )

        self._together("comparing restored state", judge)  # those of other groups must not go on alone

    # -- together ----------------------------------------------------------------------------------------------------

    def _together(self, what: str, work: Callable[[], Result]) -> Result:
        return together(self._ranks, what, self._timeout_s, work)

    def _any(self, fact: object) -> bool:
        """Whether it is so on any rank. Collective."""
        return b"1" in self._ranks.gather(b"1" if fact else b"0", "comparing outcomes", self._timeout_s)

    def _all_damage(self, mine: _Attempt) -> list[_Bad]:
        """What any rank found damaged. Collective."""
        for rank, reason in mine.damage.items():
            _log.error("the image of rank %d cannot be used: %s", rank, reason)
        said = json.dumps(mine.bad()).encode()
        gathered = self._ranks.gather(said, "comparing damage", self._timeout_s)
        return sorted({_Bad(*entry) for part in gathered for entry in json.loads(part)})


def _warn_of_private(layouts: Iterable[Layout], world: int) -> None:
    """Of tensors that several ranks had for themselves under one name, some may be lost now, and others held twice."""
    private = (p.slice for layout in layouts for p in layout.placed if is_private(p.slice) and p.slice.nbytes)
    held = Counter(piece.name for piece in private if piece.shape)  # scalars are counts of steps, which agree
    if several := sorted(name for name, count in held.items() if count > 1):
        _log.warning(
            "%d tensors were whole on each of several ranks; each rank now has those of the rank of its number modulo %d, and "
            "if they are not alike, what no rank has is lost: %s",
            len(several), world, ", ".join(several[:20]) + (", …" if len(several) > 20 else ""),
        )  # fmt: skip
