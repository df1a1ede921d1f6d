"""Does what ``guard`` decides: offers images, pulls and accumulates parity, rebuilds what is lost, and answers its peers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Final

from ..erasure.placement import Mode, Node, Protection, groups, shared
from ..erasure.stripes import Geometry, Kind, Term, parity_terms
from ..errors import AgentMismatch, ConfigError, Corrupt, HoldfastError, SnapshotUnknown, SourceGone
from ..snapshot.arena import KnownChecks, Slot
from ..snapshot.beat import NONE
from ..snapshot.record import Record, SnapshotId, block_bytes_for, table_bytes_for
from ..snapshot.unchanged import Unchanged, due, runs
from . import wire_pb2 as wire
from .arenas import Arenas, recorded, release
from .bulk import BulkServer, Piece, Stream
from .client import id_of, unchanged_of, wire_id
from .combine import Combiner, Outcome, Source, SourceFailed, Where
from .guard import (
    Abandon,
    Accumulate,
    Action,
    AskOffers,
    Drop,
    Guard,
    Offer,
    SendOffer,
    Table,
    TellGuarded,
    TellUnguarded,
)
from .manifest import CellTable, Manifest
from .origins import Origins
from .peers import Peers
from .rebuild import Load, Rebuilder
from .settings import job_hash
from .tasks import ended, to_the_end
from .trust import Trust
from .windows import OpenTiers, Windows

_log = logging.getLogger(__name__)
_TICK_S: Final = 0.1
_REPEAT_FROM_S: Final = 0.05
_REPEAT_UP_TO_S: Final = 1.0
_STREAM_S: Final = 600.0  # for one member's bytes; streams that stand still are given up much sooner
_STREAMS: Final = 32  # threads that receive, at most
_REMEMBERED: Final = 4  # recorded images of each rank
_ASKED_AT_ONCE: Final = 64  # agents of nodes that have no ranks now
_PAGE_BYTES: Final = 16 << 20  # of layouts and tables in one message: far from what a message may have, soon sent
_MEMBER_ROOM: Final = 1024  # of a cell's table, for each member, besides its checksums and layout


class Protector:
    """One agent's part in its group. All methods run on the event loop; heavy work goes to threads."""

    def __init__(
        self,
        name: str,
        job: str,
        arenas: Arenas,
        bulk: BulkServer,
        peers: Peers,
        trust: Trust | None,
        tell: Callable[[wire.FromAgent], None],
        load: Load,
        open_tiers: OpenTiers,
    ) -> None:
        """*tell* says something to all trainers of this node that are there; *load* reads an image from a tier, *open_tiers*
        opens one there to be read in parts."""
        self._name = name
        self._job = job
        self._arenas = arenas
        self._bulk = bulk
        self._peers = peers
        self._tls = trust.client_context() if trust is not None else None
        self._tell = tell
        self._load = load
        self._origins = Origins(name, arenas, peers, self._open, self._combine)
        self.windows = Windows(name, arenas, peers, self._origins, open_tiers)
        self._guard = Guard()
        self._roster: tuple[bytes, wire.Rostered] | None = None
        self._addresses: tuple[str, ...] = ()
        self._manifests: dict[Offer, Manifest] = {}
        self._layouts: dict[tuple[str, int], dict[int, bytes]] = {}  # by agent and rank: texts by their checksum
        self._known: dict[tuple[str, int], int] = {}  # by address and rank: checksum of the layout that the peer knows
        self._filling: dict[int, asyncio.Task[None]] = {}
        self._talking: set[asyncio.Task[None]] = set()
        self._reachable: dict[str, bool] = {}
        self._pool = ThreadPoolExecutor(_STREAMS, "combine")
        self._streams = asyncio.Semaphore(_STREAMS)
        self._places: dict[tuple[int, int], asyncio.Task[None]] = {}  # who fills, or last filled, each cell
        self._turns: dict[tuple[int, int], int] = {}  # how often each cell was filled over what it held
        self._recorded: dict[
            tuple[int, SnapshotId], SnapshotId | None
        ] = {}  # what each rank recorded last, and its keep
        self._assembling = asyncio.Lock()
        self._status = wire.GroupStatus()
        self._measured: tuple[SnapshotId, float] | None = None  # what the figures in it are of, and since when
        self._materialising: dict[tuple[SnapshotId, int], asyncio.Lock] = {}
        self._bringing: dict[tuple[SnapshotId, int], asyncio.Lock] = {}
        self._materialised: dict[
            tuple[SnapshotId, int], tuple[bytes, wire.MaterialiseReply]
        ] = {}  # what was asked last, and the answer
        self._ranks: tuple[int, ...] = ()
        self.peers: tuple[str, ...] = ()  # addresses of all agents of the job

    async def close(self) -> None:
        """End all work."""
        work = [*self._talking, *self._filling.values()]
        for task in work:
            task.cancel()
        await ended(work)
        await self.windows.forget()
        await asyncio.to_thread(self._pool.shutdown, wait=True)

    async def keep_time(self) -> None:
        """Runs as long as the agent does."""
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._perform(self._guard.tick(time.monotonic()))
            except Exception:  # noqa: BLE001 - without its clock, nothing would be tried again, nor given up
                _log.exception("keeping time")

    # -- who is there ------------------------------------------------------------------------------------------------

    async def assemble(self, roster: wire.Roster) -> wire.Rostered:
        """Take the job's word for who is there; reserve memory for parity. Every trainer says the same, the first counts.

        Raises:
            BudgetExceeded: parity does not fit.
            ConfigError: this agent is not among them, or not once.
        """
        said = roster.SerializeToString(deterministic=True)
        async with self._assembling:
            if self._roster is not None and self._roster[0] == said:
                # Whoever says it late, or again because its stream broke, may have missed what was told meanwhile.
                self._perform(TellGuarded(id) for id in self._guard.guarded())
                return self._roster[1]
            self._roster = None
            answer = await self._assemble(roster)
            self._roster = said, answer
            return answer

    async def _assemble(self, roster: wire.Roster) -> wire.Rostered:
        table, peers = self._table(roster)
        self._materialising.clear()
        self._bringing.clear()
        self._materialised.clear()
        await self.windows.forget()
        self._measured = None
        ranks = next(tuple(peer.ranks) for peer in roster.peers if peer.agent == self._name)
        self._ranks = ()  # until the guard is of this run: a late word on the last one says nothing of what may go
        self.peers = tuple(peer.address for peer in roster.peers)
        floor = id_of(roster.floor) if roster.HasField("floor") else None
        if table is None:
            self._perform(self._guard.assemble(None, roster.run, floor, [], roster.timeout_s))
            self._arenas.reserve_cells(0, 0, image_bytes=0, table_bytes=0)  # of former groups, some may go
            self._addresses, self._ranks = (), ranks
            return wire.Rostered(alone=True)
        n, m = len(peers), table.tolerance
        capacity = max(peer.image_bytes for peer in peers)
        geometry = Geometry.of([capacity] * n, m, block_bytes_for(capacity))
        text_bytes = sum(peer.table_bytes + _MEMBER_ROOM for peer in peers)
        count = max(peer.slots for peer in peers)
        reserve = partial(
            self._arenas.reserve_cells,
            table.lanes,
            count,
            image_bytes=geometry.parity_bytes,
            table_bytes=table_bytes_for(geometry.parity_bytes, text_bytes),
        )
        filling = list(self._filling.values())
        for task in filling:
            task.cancel()
        await ended(filling)
        await asyncio.to_thread(reserve)
        await asyncio.to_thread(self._arenas.prefault_cells)
        if floor is not None:  # it is said to be protected again soon, so what is held of it must be good
            self._status.damaged += await asyncio.to_thread(self._arenas.verify_cells, floor)
        self._addresses = tuple(peer.address for peer in peers)
        self._known.clear()
        self._manifests.clear()
        kept = {
            (p.parity.lane, id_of(p.parity.id), p.parity.key, p.parity.index)
            for p in roster.kept
            if p.agent == self._name
        }
        # Before anybody of this group may fill a cell, for which it takes an offer of each: who knew of it may be lost then.
        self._arenas.mark_complete({id_of(p.parity.id) for p in roster.kept})
        cells = [lane[:count] for lane in self._arenas.cells(table.me, kept)[: table.lanes]]
        actions = self._guard.assemble(table, roster.run, floor, cells, roster.timeout_s, kept=bool(roster.kept))
        self._ranks = ranks
        self._perform(actions)
        for held in self._arenas.inventory():
            if held.id.run == roster.run or held.id == floor:
                keep = SnapshotId(held.id.generation, held.watermark, held.id.run) if held.watermark != NONE else floor
                self.recorded(held.rank, held.id, keep if held.id.run == roster.run else floor)
        for (rank, id), before in list(self._recorded.items()):  # not sealed yet, and recorded before there was a group
            if id.run == roster.run:
                self.recorded(rank, id, before)
        return wire.Rostered(alone=False)

    def _table(self, roster: wire.Roster) -> tuple[Table | None, list[wire.Peer]]:
        """This agent's group, in the order of the members' first ranks: who replaces a lost node takes its place."""
        by_node = {f"{min(peer.ranks):09d}": peer for peer in roster.peers}
        protection = Protection.parse(roster.protect)
        if protection.mode is Mode.OFF:
            return None, []
        if sum(peer.agent == self._name for peer in roster.peers) != 1:
            names = ", ".join(sorted(peer.agent for peer in roster.peers))
            raise ConfigError(f"agent {self._name} is not there, or more than once: {names}; give each a --name")
        nodes = [Node(name, tuple((d.level, d.name) for d in peer.domains)) for name, peer in by_node.items()]
        for group in groups(nodes, protection):
            peers = [by_node[name] for name in sorted(group.members)]
            agents = tuple(peer.agent for peer in peers)
            if self._name in agents:
                for line in shared(group, nodes):
                    _log.warning("%s", line)
                ranks = tuple(tuple(sorted(peer.ranks)) for peer in peers)
                return Table(agents, ranks, agents.index(self._name), group.m), peers
        return None, []

    # -- images of this node -----------------------------------------------------------------------------------------

    def recorded(self, rank: int, id: SnapshotId, keep: SnapshotId | None, unchanged: Unchanged | None = None) -> None:
        """An image of this node is recorded, and may be pulled.

        *keep*: what must not be lost before it is protected. *unchanged*: what of the image its slot held before.
        """
        self._recorded = {k: v for k, v in self._recorded.items() if k[0] != rank or k[1].run == id.run}
        mine = sorted(key for key in self._recorded if key[0] == rank)
        for old in mine[:-_REMEMBERED]:
            del self._recorded[old]
        self._recorded[rank, id] = keep
        table = self._guard.table
        place = table.find(rank) if table is not None else None
        if table is None or place is None or place[0] != table.me:
            return
        manifest = self._arenas.manifest(rank, id)
        if manifest is None:
            _log.warning("the image of %s of rank %d cannot be read, and will not be protected", id, rank)
            return
        offer = manifest.offer(*place)
        self._manifests[offer] = replace(manifest, unchanged=unchanged)
        self._perform(self._guard.recorded(offer, keep, time.monotonic()))

    def complete(self, id: SnapshotId, attached: Collection[int] = ()) -> None:
        """All ranks have sealed *id*, and if it is of this run, what former lives left here is of no use any more: that of
        ranks which are elsewhere now, or nowhere.

        *attached*: ranks whose trainers are here, or may be. What those have stays, even of a rank that the job does not know:
        until it has left, and something newer is complete.
        """
        if id.run == self._guard.run and self._ranks:
            stay = frozenset(self._ranks).union(attached)
            gone = self._arenas.let_go(stay)
            if len(stay) == len(self._ranks):
                self._ranks = ()
            if gone:
                self._talk(asyncio.to_thread(release, gone))

    def floor_stands(self) -> None:
        """What the run started from is protected everywhere."""
        self._guard.floor_stands()

    def withdrawn(self, id: SnapshotId) -> None:
        """A rank of this node gave the snapshot up."""
        self._recorded = {key: keep for key, keep in self._recorded.items() if key[1] != id}
        self._perform(self._guard.withdrawn(id))

    # -- carrying out ------------------------------------------------------------------------------------------------

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case SendOffer(member, offer):
                    self._talk(self._send_offer(member, offer))
                case AskOffers(member):
                    self._talk(self._ask_offers(member))
                case Accumulate():
                    self._start(action)
                case Abandon(attempt) if attempt in self._filling:
                    self._filling[attempt].cancel()
                case Drop(lane, cell):
                    self._arenas.drop_cell(lane, cell)
                case TellGuarded(id):
                    self._tell(wire.FromAgent(guarded=wire.Guarded(id=wire_id(id))))
                case TellUnguarded(id, reason):
                    _log.warning("%s: %s", id, reason)
                    self._tell(wire.FromAgent(unguarded=wire.Unguarded(id=wire_id(id), reason=reason)))
        known = self._guard.offers()
        if len(self._manifests) > len(known):
            self._manifests = {offer: self._manifests[offer] for offer in known if offer in self._manifests}

    def _start(self, action: Accumulate) -> None:
        place = action.lane, action.cell
        task = self._places[place] = asyncio.create_task(self._accumulate(action, self._places.get(place)))
        self._filling[action.attempt] = task
        task.add_done_callback(partial(self._filled, action.attempt))

    def _talk(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._talking.add(task)
        task.add_done_callback(self._talked)

    def _talked(self, task: asyncio.Task[None]) -> None:
        self._talking.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("talking to a peer: %s", error, exc_info=error)

    def _filled(self, attempt: int, task: asyncio.Task[None]) -> None:
        self._filling.pop(attempt, None)
        if not task.cancelled() and (error := task.exception()):
            _log.error("filling a cell: %s", error, exc_info=error)

    async def _send_offer(self, member: int, offer: Offer) -> None:
        """Repeat until the peer has heard it, or it is out of date."""
        address, pause_s = self._addresses[member], _REPEAT_FROM_S
        while (manifest := self._manifests.get(offer)) is not None and offer in self._guard.mine():
            crc, known = manifest.record.layout_crc, self._known.get((address, offer.rank))
            message = _wire_offer(manifest, with_layout=known != crc)
            try:
                reply = await self._peers.offer(address, message)
            except HoldfastError as error:
                self._note(address, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _REPEAT_UP_TO_S)
                continue
            self._note(address, None)
            if not reply.need_layout:
                self._known[address, offer.rank] = crc
                return
            self._known.pop((address, offer.rank), None)
            await asyncio.sleep(_REPEAT_FROM_S)  # a peer that never has enough must not keep this one busy

    async def _ask_offers(self, member: int) -> None:
        """Repeat until the peer has answered, or the group is another."""
        table, address, pause_s = self._guard.table, self._addresses[member], _REPEAT_FROM_S
        while table is self._guard.table:
            try:
                reply = await self._peers.offers(address)
            except HoldfastError as error:
                self._note(address, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _REPEAT_UP_TO_S)
                continue
            self._note(address, None)
            for offer in reply.offers:
                self._hear_offer(offer)
            return

    def _note(self, address: str, error: HoldfastError | None) -> None:
        """Whether a peer can be reached is logged when it changes."""
        before = self._reachable.get(address, True)
        self._reachable[address] = error is None
        if error is not None and before:
            _log.warning("peer %s: %s; snapshots are not protected until it is back", address, error)
        elif error is None and not before:
            _log.warning("peer %s is back", address)

    # -- parity ------------------------------------------------------------------------------------------------------

    async def _accumulate(self, action: Accumulate, before: asyncio.Task[None] | None) -> None:
        """Fill a cell, and report what came of it. *before*: who filled it last, and may not have let go of it yet."""
        await ended([before] if before is not None else [])
        began_s, gone = time.monotonic(), None
        try:
            outcome = await self._fill(action)
        except SourceFailed as error:
            gone = error.where[0] if isinstance(error.error, SourceGone) else None
            reason = f"pulling from {self._member_name(error.where[0])}: {error}"
        except (HoldfastError, OSError) as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - the guard counts on hearing of its end
            _log.exception("filling a cell")
            reason = repr(error)
        else:
            self._measure(action.id, began_s, outcome.pulled_bytes)
            self._perform(self._guard.filled(action.lane, action.attempt, time.monotonic()))
            return
        _log.warning("%s: parity of lane %d: %s", action.id, action.lane, reason)
        self._perform(self._guard.failed(action.lane, action.attempt, reason, time.monotonic(), gone))

    def _measure(self, id: SnapshotId, began_s: float, pulled_bytes: int) -> None:
        """A lane of *id* is done. Figures add up over its lanes, which may run side by side."""
        if self._measured is None or self._measured[0] != id:
            self._measured, self._status.pulled_bytes = (id, began_s), 0
        self._status.pulled_bytes += pulled_bytes
        self._status.protect_s = time.monotonic() - self._measured[1]

    async def _fill(self, action: Accumulate) -> Outcome:
        table = self._guard.table
        assert table is not None
        manifests = tuple(None if offer is None else self._manifests[offer] for offer in action.offers)
        said = CellTable(manifests, table.me, table.tolerance, action.key)
        text, geometry, where = said.to_text(), said.geometry, (action.lane, action.cell)
        slot, known = await to_the_end(asyncio.to_thread(self._opened, where, said, geometry, len(text)))
        blocks = [(0, geometry.parity_bytes // said.unit)] if known is None else runs(~known[0])
        ranges = [(first * said.unit, last * said.unit) for first, last in blocks]
        terms = [term for part in ranges for term in parity_terms(geometry, said.lengths, table.me, *part)]
        sources = {
            (index, Kind.IMAGE): self._peer_image(self._addresses[index], manifest, "protect")
            for index, manifest in enumerate(manifests)
            if manifest is not None and index != table.me
        }
        outcome = await self._combine(slot.image[: geometry.parity_bytes], said.unit, terms, sources, ranges)
        if outcome.damaged:
            raise Corrupt(f"damaged at their owners: {self._damage(outcome, manifests)}")
        await to_the_end(
            asyncio.to_thread(self._arenas.seal_cell, *where, action.id, said, text, geometry.parity_bytes, known)
        )
        return outcome

    def _opened(
        self, where: tuple[int, int], said: CellTable, geometry: Geometry, text_bytes: int
    ) -> tuple[Slot, KnownChecks | None]:
        """The cell to fill, and which of its blocks need not be: they are made of bytes that no member has changed since.

        Called in a worker thread.
        """
        sizes = {
            "image_bytes": geometry.parity_bytes,
            "table_bytes": table_bytes_for(geometry.parity_bytes, text_bytes),
        }
        if not any(manifest.unchanged for manifest in said.manifests if manifest is not None):
            return self._arenas.open_cell(*where, **sizes), None
        slot, before = self._arenas.reopen_cell(*where, **sizes)
        if before is None:
            return slot, None
        same = said.same_parity(before[0])
        turn = self._turns[where] = self._turns.get(where, -1) + 1
        same[due(len(same), turn)] = False
        return slot, (same, before[1])

    async def _combine(
        self,
        target: Any,
        unit: int,
        terms: Sequence[Term],
        sources: dict[Where, Source],
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> Outcome:
        outcome = await Combiner(target, unit, self._pool, self._streams).run(terms, sources, ranges)
        self._status.damaged += outcome.refused
        return outcome

    def _damage(self, outcome: Outcome, manifests: Sequence[Manifest | None]) -> str:
        """Like "rank 3: 2 pieces"."""
        said = [(manifests[member], len(pieces)) for (member, _), pieces in outcome.damaged.items()]
        return ", ".join(f"rank {m.record.rank}: {count} pieces" for m, count in said if m is not None)

    def _member_name(self, member: int) -> str:
        table = self._guard.table
        return table.agents[member] if table is not None and member < len(table.agents) else f"member {member}"

    # -- sources -----------------------------------------------------------------------------------------------------

    def _peer_image(self, address: str, manifest: Manifest, purpose: str) -> Source:
        record = manifest.record
        request = wire.GrantRequest(
            id=wire_id(record.id),
            purpose=purpose,
            image=wire.ImageSource(rank=record.rank, checks_crc=record.checks_crc),
        )
        opened = partial(self._open, address, request)
        return Source(record.image_bytes, record.block_bytes, manifest.checks, open=opened)

    async def _open(self, address: str, like: wire.GrantRequest, ranges: Sequence[tuple[int, int]]) -> Stream:
        """Ask a peer for these ranges."""
        request = wire.GrantRequest()
        request.CopyFrom(like)
        request.ranges.extend(wire.Range(offset=offset, nbytes=nbytes) for offset, nbytes in ranges)
        reply = await self._peers.grant(address, request)
        host = address.rpartition(":")[0].strip("[]")
        return Stream(host, reply.port, reply.token, peer=address, tls=self._tls, deadline_s=_STREAM_S)

    # -- what peers ask ----------------------------------------------------------------------------------------------

    def offer(self, message: wire.Offer) -> wire.OfferReply:
        """A peer has an image. Raises ``AgentMismatch``, ``Corrupt``."""
        self._check_peer(message.job, message.agent)
        return wire.OfferReply(need_layout=not self._hear_offer(message))

    def offers(self, request: wire.OffersRequest) -> wire.OfferList:
        """What this agent offers now, in full; what is more than a page is sent afterwards. Raises ``AgentMismatch``."""
        self._check_peer(request.job, request.agent)
        table, said, room = self._guard.table, wire.OfferList(), _PAGE_BYTES
        for offer in self._guard.mine():
            manifest = self._manifests.get(offer)
            if manifest is None:
                continue
            room -= len(manifest.layout) + manifest.checks.nbytes
            if room >= 0 or not said.offers:
                full = _wire_offer(manifest, with_layout=True)
                full.job, full.agent = self._job, self._name
                said.offers.append(full)
            elif table is not None and request.agent in table.agents:
                member = table.agents.index(request.agent)
                self._known.pop((self._addresses[member], offer.rank), None)  # it asks because it knows nothing
                self._talk(self._send_offer(member, offer))
        return said

    def grant(self, request: wire.GrantRequest) -> wire.GrantReply:
        """Let a peer pull bytes. Raises ``AgentMismatch``, ``SnapshotUnknown``."""
        self._check_peer(request.job, request.agent)
        id = id_of(request.id)
        if request.WhichOneof("source") == "parity":
            slot, record = self._cell(id, request.parity)
            still = partial(_holds, slot.sealed_record, record)
        else:
            found = self._arenas.image(request.image.rank, id, request.image.checks_crc)
            record_now = recorded(found) if found is not None else None
            if found is None or record_now is None:
                raise SnapshotUnknown(f"agent {self._name} has no image of {id} of rank {request.image.rank}")
            slot, record = found, record_now
            still = partial(_holds, partial(recorded, slot), record)
        if any(r.offset + r.nbytes > record.image_bytes for r in request.ranges):
            raise Corrupt(f"{request.agent} asks for bytes beyond the {record.image_bytes} of {id}")
        pieces = [Piece(r.nbytes, partial(_view, slot, still, r.offset, r.nbytes)) for r in request.ranges]
        token = self._bulk.grant(pieces, purpose=f"{request.purpose} {id}", peer=request.agent)
        return wire.GrantReply(token=token, port=self._bulk.port)

    def manifest(self, request: wire.ManifestRequest) -> wire.Manifest:
        """What is needed to verify an image, or a cell: a page of its text, and with the first one all else.

        Raises ``AgentMismatch``, ``SnapshotUnknown``.
        """
        self._check_peer(request.job, request.agent)
        id, at = id_of(request.id), request.text_offset
        if request.WhichOneof("source") == "parity":
            slot, record = self._cell(id, request.parity)
            checks, text = slot.read_tables(record)
        else:
            manifest = self._arenas.manifest(request.image.rank, id, request.image.checks_crc)
            if manifest is None:
                raise SnapshotUnknown(f"agent {self._name} has no image of {id} of rank {request.image.rank}")
            record, checks, text = manifest.record, manifest.checks, manifest.layout
        return wire.Manifest(
            record=record.to_bytes(),
            checks=checks.tobytes() if at == 0 else b"",
            text=text[at : at + _PAGE_BYTES],
            text_bytes=len(text),
        )

    def _cell(self, id: SnapshotId, cell: wire.ParityCell) -> tuple[Slot, Record]:
        found = self._arenas.cell(cell.lane, id, cell.key, cell.index)
        if found is None:
            raise SnapshotUnknown(f"agent {self._name} has no parity of {id} of lane {cell.lane}")
        return found

    def _check_peer(self, job: str, agent: str) -> None:
        if job != self._job:
            _log.warning("refused: agent %r of job %r asks, and this one serves %r", agent, job, self._job)
            raise AgentMismatch(f"agent {self._name} serves job {self._job!r}, not {job!r}")

    def _hear_offer(self, message: wire.Offer) -> bool:
        """Note a peer's image; False if its layout is not known here."""
        table = self._guard.table
        place = table.find(message.rank) if table is not None else None
        if table is None or place is None or table.agents[place[0]] != message.agent:
            return True  # of a group that we know nothing of (yet): whoever joins asks for offers
        record, _ = Record.from_bytes(message.record)
        if record.rank != message.rank or record.job != job_hash(self._job):
            raise Corrupt(f"agent {message.agent} offers an image of rank {record.rank} as one of rank {message.rank}")
        layouts = self._layouts.setdefault((message.agent, message.rank), {})
        if message.layout:
            layouts[record.layout_crc] = message.layout
            for old in list(layouts)[:-2]:
                del layouts[old]
        layout = layouts.get(record.layout_crc)
        if layout is None:
            return False
        found = Manifest.of(message.record, message.checks, layout)
        manifest = replace(found, unchanged=unchanged_of(message.since, message.unchanged))
        offer = manifest.offer(*place)
        self._manifests.setdefault(offer, manifest)
        self._perform(self._guard.offered(offer, time.monotonic()))
        return True

    async def elsewhere(self, addresses: Sequence[str]) -> wire.ImageLists:
        """What the agents at these addresses hold. One that does not answer, or is of another job now, counts as lost."""
        room = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def ask(address: str) -> wire.ImageList | None:
            async with room:
                try:
                    return await self._peers.inventory(address)
                except HoldfastError as error:
                    _log.info("what the agent at %s holds counts as lost: %s", address, error)
                    return None

        answers = await asyncio.gather(*map(ask, addresses))
        return wire.ImageLists(lists=[answer for answer in answers if answer is not None])

    # -- bringing back -----------------------------------------------------------------------------------------------

    async def materialise(self, request: wire.MaterialiseRequest) -> wire.MaterialiseReply:
        """Have an image here, verified, wherever it comes from.

        Raises ``SnapshotLost`` if nobody has it and it cannot be rebuilt; ``BudgetExceeded``.
        """
        what = (id_of(request.id), request.rank)
        async with self._materialising.setdefault(what, asyncio.Lock()):  # several ranks may need the same image
            said = request.SerializeToString(deterministic=True)
            if (before := self._materialised.get(what)) is not None and before[0] == said:
                return before[1]
            rebuilder = Rebuilder(self._name, self._arenas, self._peers, self._origins, self._load)
            done = await rebuilder.run(request)
            here = self._arenas.image(request.rank, what[0])
            record = here.sealed_record() if here is not None else None
            done.checks_crc = record.checks_crc if record is not None else 0
            self._materialised[what] = said, done  # whoever asks otherwise next has found that something is damaged
            self._status.damaged += rebuilder.repaired
            _log.info("%s of rank %d: %s", what[0], request.rank, done.how)
            return done

    async def bring(self, request: wire.MaterialiseRequest, *, apart: bool) -> wire.MaterialiseReply:
        """A peer cannot read the tier where an image is, and this agent can: have it here, to be pulled.

        *apart*: not in the slots of a trainer that is training.

        Raises ``AgentMismatch``, and what ``Tiers.load`` does.
        """
        self._check_peer(request.job, request.agent)
        id = id_of(request.id)
        # Not the lock of ``materialise``, which is held while peers are asked: two agents would wait for each other.
        async with self._bringing.setdefault((id, request.rank), asyncio.Lock()):
            here = self._arenas.image(request.rank, id)
            record = here.sealed_record() if here is not None else None
            if here is not None and record is not None:
                return wire.MaterialiseReply(path=here.place.path, how="held here", checks_crc=record.checks_crc)
            return await self._load(id, request.rank, request.world, [t.tier for t in request.tiers], apart=apart)

    @property
    def tls(self) -> bool:
        """Whether agents show each other certificates."""
        return self._tls is not None

    def status(self) -> wire.GroupStatus | None:
        """For ``holdfast status``; None without a group."""
        table = self._guard.table
        if table is None:
            return None
        status = wire.GroupStatus()
        status.CopyFrom(self._status)
        if guarded := self._guard.guarded():
            status.protected.CopyFrom(wire_id(guarded[-1]))
        status.tolerance = table.tolerance
        status.parity_bytes = self._arenas.parity_bytes
        status.trouble = self._guard.trouble()
        status.calls, status.call_bytes = self._peers.calls, self._peers.call_bytes
        for index, (agent, ranks) in enumerate(zip(table.agents, table.ranks, strict=True)):
            address = self._addresses[index]
            there = index == table.me or self._reachable.get(address, True)
            status.members.append(wire.MemberStatus(agent=agent, address=address, ranks=ranks, reachable=there))
        return status


def _holds(look: Callable[[], Record | None], record: Record) -> bool:
    found = look()
    return found is not None and (found.id, found.nonce) == (record.id, record.nonce)


def _view(slot: Slot, still: Callable[[], bool], offset: int, nbytes: int) -> memoryview | None:
    """The bytes, if the slot still holds them."""
    return slot.image[offset : offset + nbytes].data if still() else None


def _wire_offer(manifest: Manifest, *, with_layout: bool) -> wire.Offer:
    """An image as peers are told of it; who says it is for the sender to add."""
    unchanged = manifest.unchanged or Unchanged(0, ())
    return wire.Offer(
        rank=manifest.record.rank,
        record=manifest.record.to_bytes(),
        checks=manifest.checks.tobytes(),
        layout=manifest.layout if with_layout else b"",
        since=unchanged.since,
        unchanged=[wire.Range(offset=start, nbytes=end - start) for start, end in unchanged.ranges],
    )
