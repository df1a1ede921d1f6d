"""The agent's gRPC service: carries out what ``protocol`` decides, and answers questions from shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from ..errors import AgentError, AgentMismatch, AgentUnreachable, ConfigError, DeadlinePassed, HoldfastError, RankTaken
from ..snapshot.arena import Place
from ..snapshot.record import Record, SnapshotId
from ..snapshot.recovery import Held
from . import protocol
from . import wire_pb2 as wire
from .arenas import Arenas, ImageSums
from .client import error_text, id_of, unchanged_of, wire_id
from .protector import Protector
from .settings import PROTOCOL, NodeSettings, machine, pid_namespace
from .spiller import Spiller
from .tasks import to_the_end

_log = logging.getLogger(__name__)

# How long a new trainer of a rank waits for the agent to notice that the old one is gone.
_TAKEOVER_S: Final = 5.0
# How long a dead trainer's stream is listened to, for what it said last.
_DRAIN_S: Final = 1.0
# How long the new trainer then waits for the old one's last image to be checksummed.
_SETTLE_S: Final = 60.0
SERVICE: Final = "holdfast.v1.Agent"

Write = Callable[[wire.FromAgent], Awaitable[None]]
Result = TypeVar("Result")
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Trainer:
    """One rank's trainer as the service sees it, alive or gone."""

    hello: wire.Hello
    session: protocol.Session = field(default_factory=protocol.Session)
    layouts: dict[int, bytes] = field(default_factory=dict)
    sums: dict[int, ImageSums] = field(default_factory=dict)
    report: wire.Report = field(default_factory=wire.Report)
    ended: bool = False
    trains: bool = False  # or may: its slots are its own, and no restore needs them
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    work: set[asyncio.Task[None]] = field(default_factory=set)
    write: Write | None = None


class AgentService:
    """What one agent does for its trainers. All methods run on the event loop; heavy work goes to threads."""

    def __init__(
        self,
        name: str,
        version: str,
        settings: NodeSettings,
        arenas: Arenas,
        domains: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._name = name
        self._domains = tuple(domains)
        self.protector: Protector | None = None
        self.spiller = Spiller(name, settings.job, arenas)
        self._version = version
        self._settings = settings
        self._arenas = arenas
        self._trainers: dict[int, _Trainer] = {}
        self._admitting: Counter[int] = Counter()  # ranks whose trainers are about to be given slots
        self._reserving = asyncio.Lock()
        self._started_s = time.monotonic()
        self._idle_since_s = time.monotonic()
        self.listen = ""

    # -- trainers ----------------------------------------------------------------------------------------------------

    async def attach(self, requests: AsyncIterator[wire.FromTrainer], context: Context) -> None:
        """Serve one trainer until its stream ends."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("kind") != "hello":
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, error_text(AgentError("the first message must be Hello"))
            )
        self._admitting[first.hello.rank] += 1
        try:
            trainer, places = await self._admit(first.hello)
        except HoldfastError as error:
            _log.warning("rank %d refused: %s", first.hello.rank, error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error_text(error))
        finally:
            self._admitting[first.hello.rank] -= 1
        one_at_a_time = asyncio.Lock()

        async def write(message: wire.FromAgent) -> None:
            async with one_at_a_time:  # gRPC refuses a write while another is under way
                await context.write(message)

        # From here on the rank is taken, so whatever happens, it must be given free again.
        try:
            with self._watching(trainer):
                trainer.write = write
                await asyncio.to_thread(self._arenas.prefault, places)
                await write(wire.FromAgent(welcome=self._welcome(places)))
                _log.info("rank %d attached, pid %d", trainer.hello.rank, trainer.hello.pid)
                async for message in requests:
                    if trainer.gone.is_set():  # given up, or replaced by its own new stream
                        break
                    await self._hear(trainer, message, write)
        finally:
            self._lose(trainer)

    async def _admit(self, hello: wire.Hello) -> tuple[_Trainer, list[Place]]:
        if hello.protocol != PROTOCOL:
            raise AgentMismatch(
                f"trainer speaks protocol {hello.protocol} (holdfast {hello.version}), agent {self._name} speaks "
                f"{PROTOCOL} (holdfast {self._version}); restart the agent with the trainer's version"
            )
        if hello.job != self._settings.job:
            raise AgentMismatch(
                f"agent {self._name} serves job {self._settings.job!r}, this trainer is of {hello.job!r}"
            )
        if not 0 < hello.slots <= 16 or not 0 <= hello.rank < hello.world:
            raise ConfigError(f"cannot attach rank {hello.rank} of {hello.world} with {hello.slots} slots")
        async with self._reserving:
            await self._take_over(hello)
            reserve = asyncio.to_thread(
                self._arenas.reserve,
                hello.rank,
                hello.slots,
                image_bytes=hello.image_bytes,
                table_bytes=hello.table_bytes,
            )
            places = await to_the_end(reserve)
            self.spiller.tiers.use(hello.tiers)
            former = self._trainers.get(hello.rank)
            again = hello.again or (former is not None and former.hello.life == hello.life)
            trainer = self._trainers[hello.rank] = _Trainer(hello, trains=again)
        if not again:
            # Whoever was admitted trains already: a tier that has become full is no reason to do without an agent.
            try:
                await self._check_tiers(hello)
            except BaseException:
                self._lose(trainer)
                raise
        return trainer, places

    async def _check_tiers(self, hello: wire.Hello) -> None:
        """Raises ``BudgetExceeded``."""
        there = [trainer.hello.image_bytes for trainer in self._trainers.values() if not trainer.gone.is_set()]
        await self.spiller.tiers.check_budget(sum(there), hello.image_bytes * hello.world)

    def _welcome(self, places: list[Place]) -> wire.Welcome:
        return wire.Welcome(
            agent=self._name,
            slots=[_slot_place(place) for place in places],
            listen=self.listen,
            domains=[wire.Domain(level=level, name=name) for level, name in self._domains],
            machine=machine(),
        )

    def tell(self, message: wire.FromAgent) -> None:
        """Say something to all trainers that are there."""
        for trainer in self._trainers.values():
            if trainer.write is not None and not trainer.gone.is_set():
                self._spawn(trainer, _write(trainer.write, message))

    def _attached(self) -> set[int]:
        """The ranks whose trainers are here, or come just now."""
        there = {rank for rank, trainer in self._trainers.items() if not trainer.gone.is_set()}
        return there | {rank for rank, count in self._admitting.items() if count}

    def preempt(self, reason: str) -> float:
        """This node will be gone soon. Trainers that declared a grace are told; returns the longest of theirs, 0 without any."""
        there = [t for t in self._trainers.values() if not t.gone.is_set() and t.hello.grace_s > 0]
        if there:
            self.tell(wire.FromAgent(stop=wire.Stop(reason=reason)))
        return max((t.hello.grace_s for t in there), default=0.0)

    async def _take_over(self, hello: wire.Hello) -> None:
        """Wait until the rank's former trainer is gone and what it left in flight is sealed or dropped."""
        former = self._trainers.get(hello.rank)
        if former is None:
            return
        if former.hello.life == hello.life:
            self._lose(former)  # the same trainer reconnects: its old stream is dead, whether we have noticed or not
        try:
            await asyncio.wait_for(former.gone.wait(), _TAKEOVER_S)
        except TimeoutError:
            raise RankTaken(
                f"rank {hello.rank} of job {hello.job!r} is held by pid {former.hello.pid}, which is still attached; "
                f"end it first, or run this one as another job (HOLDFAST_JOB)"
            ) from None
        if former.work:  # it reads and may still seal the slots that the new trainer is about to get
            _, unfinished = await asyncio.wait(former.work, timeout=_SETTLE_S)
            if unfinished:
                raise DeadlinePassed(
                    f"what the former rank {hello.rank} left was not checksummed within {_SETTLE_S:g} s"
                )

    @contextlib.contextmanager
    def _watching(self, trainer: _Trainer) -> Iterator[None]:
        """Notice the trainer's death by its process too: its forked workers may hold the stream open for a while.

        What it said last is still to be heard: only after that time without the stream's end is it given up.
        """
        descriptor = _process(trainer.hello)
        if descriptor is None:
            yield
            return
        loop = asyncio.get_running_loop()
        giving_up: list[asyncio.TimerHandle] = []

        def ended() -> None:
            loop.remove_reader(descriptor)
            giving_up.append(loop.call_later(_DRAIN_S, self._lose, trainer))

        loop.add_reader(descriptor, ended)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            for timer in giving_up:
                timer.cancel()

    async def _hear(self, trainer: _Trainer, message: wire.FromTrainer, write: Write) -> None:
        kind = message.WhichOneof("kind")
        match kind:
            case "layout":
                newest = message.layout.number
                trainer.layouts = {n: text for n, text in trainer.layouts.items() if n + 2 > newest}
                trainer.layouts[newest] = message.layout.text
            case "report":
                trainer.report = message.report
            case "grow":
                self._spawn(trainer, self._grow(trainer, message.grow, write))
            case "roster":
                self._spawn(trainer, self._assemble(message.roster, write))
            case "spill":
                spill = message.spill
                self.spiller.spill(trainer.hello.rank, trainer.hello.world, id_of(spill.id), spill.tiers, write)
            case "goodbye":
                trainer.ended = True
            case _:
                if (event := _event(message)) is not None:
                    trainer.trains = trainer.trains or isinstance(event, protocol.Copied)
                    self._note(event, message)
                    await self._advance(trainer, event, write)

    async def _advance(self, trainer: _Trainer, event: protocol.Event, write: Write) -> None:
        trainer.session, actions = protocol.advance(trainer.session, event)
        for action in actions:
            match action:
                case protocol.Checksum():
                    self._spawn(trainer, self._checksum(trainer, action, write))
                case protocol.WriteRecord(slot, flight):
                    rank, world = trainer.hello.rank, trainer.hello.world
                    sums, layout = trainer.sums[flight.nonce], trainer.layouts[flight.layout]
                    self._arenas.write_record(slot, flight, sums, rank=rank, world=world, layout=layout)
                    if self.protector is not None:
                        self.protector.recorded(rank, flight.id, flight.keep, flight.unchanged)
                case protocol.TellPrepared(slot, nonce) if not trainer.gone.is_set():
                    await write(wire.FromAgent(prepared=wire.Prepared(slot=slot, nonce=nonce)))

    def _note(self, event: protocol.Event, message: wire.FromTrainer) -> None:
        """What a trainer's message means for the group."""
        if isinstance(event, protocol.Copied) and message.copied.persisted:
            self.spiller.persisted(SnapshotId(event.id.generation, message.copied.persisted - 1, event.id.run))
        if self.protector is None:
            return
        if isinstance(event, protocol.Copied):
            if event.keep is not None:
                self.protector.complete(event.keep, self._attached())
            if message.copied.floor_stands:
                self.protector.floor_stands()
        elif isinstance(event, protocol.Discarded) and message.discarded.HasField("id"):
            self.protector.withdrawn(id_of(message.discarded.id))

    async def _assemble(self, roster: wire.Roster, write: Write) -> None:
        """The trainers say who is there."""
        answer = wire.Rostered(alone=True)
        if self.protector is not None:
            try:
                async with self._reserving:
                    answer = await self.protector.assemble(roster)
            except HoldfastError as error:
                _log.warning("no protection: %s", error)
                answer = wire.Rostered(alone=True, error=error_text(error))
        answer.run, answer.floor = roster.run, roster.floor.step
        await write(wire.FromAgent(rostered=answer))

    async def _checksum(self, trainer: _Trainer, action: protocol.Checksum, write: Write) -> None:
        rank, slot, nonce = trainer.hello.rank, action.slot, action.nonce
        try:
            checksum = partial(self._arenas.checksum, rank, slot, action.image_bytes, action.unchanged)
            trainer.sums[nonce] = await asyncio.to_thread(checksum)
            await self._advance(trainer, protocol.Checksummed(slot, nonce), write)
        except Exception as error:  # noqa: BLE001 - the trainer must hear of it, or it waits for this slot forever
            _log.warning("rank %d: slot %d cannot be sealed: %s", rank, slot, error)
            await self._advance(trainer, protocol.Discarded(slot, nonce), write)
            await write(wire.FromAgent(failed=wire.Failed(slot=slot, nonce=nonce, reason=str(error))))
        finally:
            trainer.sums.pop(nonce, None)

    async def _grow(self, trainer: _Trainer, grow: wire.Grow, write: Write) -> None:
        rank = trainer.hello.rank
        sizes = {"image_bytes": grow.image_bytes, "table_bytes": grow.table_bytes}
        try:
            async with self._reserving:
                place = await to_the_end(asyncio.to_thread(self._arenas.grow, rank, grow.slot, **sizes))
            await asyncio.to_thread(self._arenas.prefault, [place])
        except Exception as error:  # noqa: BLE001 - as above
            _log.warning("rank %d: slot %d stays as small as it is: %s", rank, grow.slot, error)
            left = self._arenas.place(rank, grow.slot)
            failed = wire.Failed(slot=grow.slot, reason=str(error), left=_slot_place(left) if left else None)
            await write(wire.FromAgent(failed=failed))
            return
        await write(wire.FromAgent(grown=wire.Grown(slot=_slot_place(place))))

    def _spawn(self, trainer: _Trainer, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        trainer.work.add(task)
        task.add_done_callback(lambda done: self._finished(trainer, done))

    def _finished(self, trainer: _Trainer, task: asyncio.Task[None]) -> None:
        trainer.work.discard(task)
        # A write to a trainer that died meanwhile fails; its death is noticed by the broken stream itself.
        if not task.cancelled() and (error := task.exception()) and not trainer.gone.is_set():
            _log.error("rank %d: %s", trainer.hello.rank, error, exc_info=error)

    def _lose(self, trainer: _Trainer) -> None:
        """The trainer is gone. What it had copied is still recorded; what it had fenced is thereby sealed."""
        if trainer.gone.is_set():
            return
        _log.info("rank %d %s, pid %d", trainer.hello.rank, "left" if trainer.ended else "is gone", trainer.hello.pid)
        trainer.gone.set()
        self._idle_since_s = time.monotonic()
        if self.protector is not None:
            self._spawn(trainer, self.protector.windows.give_back(trainer.hello.rank))

    # -- questions ---------------------------------------------------------------------------------------------------

    async def inventory(self, request: wire.Nothing, context: Context) -> wire.ImageList:
        """Every sealed image held here."""
        images = [self._image(held) for held in self._arenas.inventory()]
        parities = [
            wire.Parity(
                id=wire_id(id), lane=lane, index=table.me, tolerance=table.tolerance, ranks=table.ranks, key=table.key
            )
            for (lane, _), id, table in self._arenas.tables()
        ]
        return wire.ImageList(
            agent=self._name,
            images=images,
            spoiled=self._arenas.spoiled(),
            parities=parities,
            address=self.listen,
            job=self._settings.job,
            peers=self.protector.peers if self.protector is not None else (),
        )

    async def elsewhere(self, request: wire.AddressList, context: Context) -> wire.ImageLists:
        """What agents hold on whose nodes this job has no ranks any more."""
        return await _answer(context, self._protecting().elsewhere(request.addresses))

    async def inspect(self, request: wire.InspectRequest, context: Context) -> wire.Inspection:
        """Read one snapshot in full: its layout, its checksums, its damage."""
        try:
            readings = await asyncio.to_thread(self._arenas.read, request.run, request.step)
        except HoldfastError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error_text(error))
        return wire.Inspection(
            images=[
                wire.ImageDetail(
                    image=self._image(reading.held),
                    layout=reading.layout.to_text(),
                    slice_crc=reading.slice_crcs,
                    values_crc=reading.values_crc,
                    bad_blocks=reading.bad_blocks,
                    block_bytes=reading.block_bytes,
                )
                for reading in readings
            ]
        )

    async def materialise(self, request: wire.MaterialiseRequest, context: Context) -> wire.MaterialiseReply:
        """Have an image here. See ``Protector.materialise``."""
        return await _answer(context, self._protecting().materialise(request))

    async def describe(self, request: wire.MaterialiseRequest, context: Context) -> wire.Description:
        """What an image looks like, wherever it is. See ``Windows.describe``."""
        return await _answer(context, self._protecting().windows.describe(request))

    async def read(self, request: wire.ReadRequest, context: Context) -> wire.ReadReply:
        """Have parts of an image in a window. See ``Windows.read``."""
        return await _answer(context, self._read(request))

    async def _read(self, request: wire.ReadRequest) -> wire.ReadReply:
        reader = self._trainers.get(request.reader)
        if reader is None or reader.gone.is_set():  # nobody would give its windows back
            raise AgentUnreachable(f"rank {request.reader} is not attached to agent {self._name}, and has no windows")
        return await self._protecting().windows.read(request)

    async def bring(self, request: wire.MaterialiseRequest, context: Context) -> wire.MaterialiseReply:
        """A peer asks to have an image here, from a tier that only this agent can read, to fetch it then."""
        trainer = self._trainers.get(request.rank)
        apart = trainer is not None and trainer.trains and not trainer.gone.is_set()
        return await _answer(context, self._protecting().bring(request, apart=apart))

    async def stored(self, request: wire.Nothing, context: Context) -> wire.TierList:
        """What lies in the tiers."""
        listed = await _answer(context, self.spiller.tiers.stored())
        listed.address = self.listen
        return listed

    async def spill_now(self, request: wire.SpillRequest, context: Context) -> wire.SpillReply:
        """Somebody asks for the next snapshot to be spilled, whenever that would be due."""
        count = len(self.spiller.settings)
        there = any(t.write is not None and not t.gone.is_set() for t in self._trainers.values())
        if not count or not there:
            return wire.SpillReply(reason="the job has no tiers" if there else "no trainer is attached")
        self.tell(wire.FromAgent(due=wire.Due(tiers=min(request.tiers, count) or count)))
        return wire.SpillReply(accepted=True)

    async def offer(self, request: wire.Offer, context: Context) -> wire.OfferReply:
        """A peer has an image."""
        return await _answer(context, _now(lambda: self._protecting().offer(request)))

    async def offers(self, request: wire.OffersRequest, context: Context) -> wire.OfferList:
        """A peer asks what is offered here."""
        return await _answer(context, _now(lambda: self._protecting().offers(request)))

    async def grant(self, request: wire.GrantRequest, context: Context) -> wire.GrantReply:
        """A peer asks for bytes."""
        return await _answer(context, _now(lambda: self._protecting().grant(request)))

    async def manifest(self, request: wire.ManifestRequest, context: Context) -> wire.Manifest:
        """A peer asks how to verify bytes."""
        return await _answer(context, _now(lambda: self._protecting().manifest(request)))

    def _protecting(self) -> Protector:
        if self.protector is None:
            raise AgentError(f"agent {self._name} serves no peers")
        return self.protector

    async def status(self, request: wire.Nothing, context: Context) -> wire.StatusReport:
        """All there is to know about this agent."""
        return wire.StatusReport(
            agent=self._name,
            version=self._version,
            job=self._settings.job,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_s,
            shm=str(self._settings.shm),
            listen=self.listen,
            alone=self.protector is None or self.protector.status() is None,
            group=self.protector.status() if self.protector is not None else None,
            peers=self.protector.peers if self.protector is not None else (),
            tls=self.protector is not None and self.protector.tls,
            reserved_bytes=self._arenas.reserved_bytes,
            limit_bytes=self._arenas.limit_bytes or 0,
            trainers=[
                wire.TrainerStatus(
                    rank=rank,
                    world=t.hello.world,
                    pid=t.hello.pid,
                    alive=not t.gone.is_set(),
                    ended=t.ended,
                    report=t.report,
                )
                for rank, t in sorted(self._trainers.items())
            ],
            slots=[self._slot_status(*entry) for entry in self._arenas.places()],
            tiers=self.spiller.status(),
            foreign=[os.fsencode(name).decode("utf-8", "replace") for name in self._arenas.foreign],
            idle_s=self.idle_s,
        )

    @property
    def idle_s(self) -> float:
        """Seconds since the last trainer left; 0 while one is attached, or about to be."""
        if self._reserving.locked() or self.spiller.busy or any(not t.gone.is_set() for t in self._trainers.values()):
            return 0.0
        return time.monotonic() - self._idle_since_s

    @property
    def snapshots_matter(self) -> bool:
        """Whether a snapshot is held whose trainer did not end on purpose, so that somebody may come back for it."""
        ended = {rank for rank, t in self._trainers.items() if t.ended}
        return any(held.rank not in ended for held in self._arenas.inventory())

    async def quiesce(self) -> None:
        """Let the checksums under way finish, so that what was fenced is sealed before the process ends."""
        work = [task for t in self._trainers.values() for task in t.work]
        if work:
            await asyncio.wait(work)

    def _image(self, held: Held) -> wire.Image:
        trainer = self._trainers.get(held.rank)
        return wire.Image(
            run=held.id.run,
            generation=held.id.generation,
            step=held.id.step,
            rank=held.rank,
            world=held.world,
            watermark=held.watermark,
            path=held.path,
            image_bytes=held.image_bytes,
            trainer_alive=trainer is not None and not trainer.gone.is_set(),
            complete=held.complete,
            checks_crc=held.checks_crc,
        )

    def _slot_status(self, place: Place, record: Record | None, staging: bool) -> wire.SlotStatus:
        status = wire.SlotStatus(
            rank=place.rank,
            index=place.index,
            state="sealed" if record else "staging" if staging else "free",
            capacity_bytes=place.image_bytes,
        )
        if record is not None:
            status.run, status.generation, status.step = record.id.run, record.id.generation, record.id.step
            status.image_bytes = record.image_bytes
        return status

    # -- wiring ------------------------------------------------------------------------------------------------------

    def handlers(self, *, trainers: bool) -> grpc.GenericRpcHandler:
        """The gRPC methods; those for trainers only where these may come (the Unix socket), those for peers elsewhere."""
        methods = {
            "Inventory": _unary(self.inventory, wire.Nothing),
            "Inspect": _unary(self.inspect, wire.InspectRequest),
            "Status": _unary(self.status, wire.Nothing),
            "Stored": _unary(self.stored, wire.Nothing),
            "SpillNow": _unary(self.spill_now, wire.SpillRequest),
        }
        if not trainers:
            methods["Bring"] = _unary(self.bring, wire.MaterialiseRequest)
            methods["Offer"] = _unary(self.offer, wire.Offer)
            methods["Offers"] = _unary(self.offers, wire.OffersRequest)
            methods["Grant"] = _unary(self.grant, wire.GrantRequest)
            methods["GetManifest"] = _unary(self.manifest, wire.ManifestRequest)
        else:
            methods["Materialise"] = _unary(self.materialise, wire.MaterialiseRequest)
            methods["Elsewhere"] = _unary(self.elsewhere, wire.AddressList)
            methods["Describe"] = _unary(self.describe, wire.MaterialiseRequest)
            methods["Read"] = _unary(self.read, wire.ReadRequest)
            methods["Attach"] = grpc.stream_stream_rpc_method_handler(
                self.attach, wire.FromTrainer.FromString, wire.FromAgent.SerializeToString
            )
        return grpc.method_handlers_generic_handler(SERVICE, methods)


def _unary(method: Any, request: type[Message]) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(method, request.FromString, lambda reply: reply.SerializeToString())


def _slot_place(place: Place) -> wire.SlotPlace:
    return wire.SlotPlace(
        index=place.index, path=place.path, table_bytes=place.table_bytes, image_bytes=place.image_bytes
    )


def _event(message: wire.FromTrainer) -> protocol.Event | None:
    """The protocol's event for a trainer's message; None for one of a kind this version does not know."""
    match message.WhichOneof("kind"):
        case "copied":
            m = message.copied
            id = SnapshotId(m.generation, m.step, m.run)
            keep = id_of(m.keep) if m.HasField("keep") else None
            unchanged = unchanged_of(m.since, m.unchanged)
            return protocol.Copied(m.slot, m.nonce, id, m.watermark, m.layout, m.image_bytes, keep, unchanged)
        case "discarded":
            return protocol.Discarded(message.discarded.slot, message.discarded.nonce)
    return None


async def _answer(context: Context, work: Awaitable[Result]) -> Result:
    """The result of *work*; its error as gRPC says it."""
    try:
        return await work
    except HoldfastError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error_text(error))
        raise


async def _now(work: Callable[[], Result]) -> Result:
    return work()


async def _write(write: Write, message: wire.FromAgent) -> None:
    await write(message)


def _process(hello: wire.Hello) -> int | None:
    """A descriptor that becomes readable when the trainer's process ends; None if its pid means nothing here."""
    if hello.pid_namespace != pid_namespace():
        return None
    try:
        return os.pidfd_open(hello.pid)
    except OSError:  # gone already, as the stream will tell; or a kernel before 5.3
        return None
