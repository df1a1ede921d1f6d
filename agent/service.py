"""The agent's gRPC service: carries out what ``protocol`` decides, and answers questions from shared memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from ..errors import AgentError, AgentMismatch, ConfigError, HoldfastError, RankTaken
from ..snapshot.arena import Place
from ..snapshot.record import Record, SnapshotId
from ..snapshot.recovery import Held
from . import protocol
from . import wire_pb2 as wire
from .arenas import Arenas, ImageSums
from .settings import PROTOCOL, NodeSettings

_log = logging.getLogger(__name__)

# How long a new trainer of a rank waits for the agent to notice that the old one is gone.
_TAKEOVER_S: Final = 5.0
SERVICE: Final = "holdfast.v1.Agent"
MESSAGE_BYTES: Final = 64 << 20  # layouts of tens of thousands of tensors fit; nothing bulky travels here

Write = Callable[[wire.FromAgent], Awaitable[None]]
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Trainer:
    """One rank's trainer as the service sees it, alive or gone."""

    hello: wire.Hello
    session: protocol.Session = field(default_factory=protocol.Session)
    layouts: dict[int, bytes] = field(default_factory=dict)
    sums: dict[SnapshotId, ImageSums] = field(default_factory=dict)
    report: wire.Report = field(default_factory=wire.Report)
    ended: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    work: set[asyncio.Task[None]] = field(default_factory=set)


class AgentService:
    """What one agent does for its trainers. All methods run on the event loop; heavy work goes to threads."""

    def __init__(self, name: str, version: str, settings: NodeSettings, arenas: Arenas) -> None:
        self._name = name
        self._version = version
        self._settings = settings
        self._arenas = arenas
        self._trainers: dict[int, _Trainer] = {}
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
        try:
            trainer, welcome = await self._admit(first.hello)
        except HoldfastError as error:
            _log.warning("rank %d refused: %s", first.hello.rank, error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error_text(error))
        _log.info("rank %d attached, pid %d", trainer.hello.rank, trainer.hello.pid)
        try:
            await context.write(wire.FromAgent(welcome=welcome))
            async for message in requests:
                await self._hear(trainer, message, context.write)
        finally:
            self._lose(trainer)

    async def _admit(self, hello: wire.Hello) -> tuple[_Trainer, wire.Welcome]:
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
            places = await asyncio.to_thread(
                self._arenas.reserve,
                hello.rank,
                hello.slots,
                image_bytes=hello.image_bytes,
                table_bytes=hello.table_bytes,
            )
            trainer = self._trainers[hello.rank] = _Trainer(hello)
        # Outside the lock: the ranks of a node have their memory mapped at the same time.
        await asyncio.to_thread(self._arenas.prefault, places)
        return trainer, wire.Welcome(agent=self._name, slots=[_slot_place(p) for p in places], alone=True)

    async def _take_over(self, hello: wire.Hello) -> None:
        """Wait until the rank's former trainer is gone and what it left in flight is sealed or dropped."""
        former = self._trainers.get(hello.rank)
        if former is None:
            return
        try:
            async with asyncio.timeout(_TAKEOVER_S):
                if former.hello.life != hello.life:
                    await former.gone.wait()
                else:  # the same trainer reconnects: its old stream is dead, whether we have noticed or not
                    self._lose(former)
                await former.settled.wait()
        except TimeoutError:
            raise RankTaken(
                f"rank {hello.rank} of job {hello.job!r} is held by pid {former.hello.pid}, which is still attached; "
                f"end it first, or run this one as another job (HOLDFAST_JOB)"
            ) from None

    async def _hear(self, trainer: _Trainer, message: wire.FromTrainer, write: Write) -> None:
        kind = message.WhichOneof("kind")
        match kind:
            case "layout":
                trainer.layouts[message.layout.number] = message.layout.text
            case "report":
                trainer.report = message.report
            case "grow":
                self._spawn(trainer, self._grow(trainer, message.grow, write))
            case "goodbye":
                trainer.ended = True
            case _:
                if (event := _event(message)) is not None:
                    await self._advance(trainer, event, write)

    async def _advance(self, trainer: _Trainer, event: protocol.Event, write: Write) -> None:
        trainer.session, actions = protocol.advance(trainer.session, event)
        for action in actions:
            await self._perform(trainer, action, write)
        if trainer.session.settled:
            trainer.settled.set()

    async def _perform(self, trainer: _Trainer, action: protocol.Action, write: Write) -> None:
        rank = trainer.hello.rank
        match action:
            case protocol.Checksum():
                self._spawn(trainer, self._checksum(trainer, action, write))
            case protocol.WriteRecord(slot, id, layout, watermark, _):
                self._arenas.write_record(
                    slot,
                    id,
                    trainer.sums.pop(id),
                    rank=rank,
                    world=trainer.hello.world,
                    watermark=watermark,
                    layout=trainer.layouts[layout],
                )
            case protocol.TellPrepared(slot, step, nonce):
                await write(wire.FromAgent(prepared=wire.Prepared(slot=slot, step=step, nonce=nonce)))
            case protocol.Commit(slot, step, nonce):
                if self._arenas.slot(rank, slot).commit_if_open_for(step, nonce):
                    _log.info("rank %d: sealed step %d for a trainer that is gone", rank, step)

    async def _checksum(self, trainer: _Trainer, action: protocol.Checksum, write: Write) -> None:
        rank, slot, id = trainer.hello.rank, action.slot, action.id
        try:
            sums = await asyncio.to_thread(self._arenas.checksum, rank, slot, action.image_bytes)
            trainer.sums[id] = sums
            await self._advance(trainer, protocol.Checksummed(slot, id, sums.nonce), write)
        except HoldfastError as error:
            _log.warning("rank %d: step %d cannot be sealed: %s", rank, id.step, error)
            await self._advance(trainer, protocol.Discarded(slot, id.step), write)
            await write(wire.FromAgent(failed=wire.Failed(slot=slot, step=id.step, reason=str(error))))
        finally:
            trainer.sums.pop(id, None)

    async def _grow(self, trainer: _Trainer, grow: wire.Grow, write: Write) -> None:
        rank = trainer.hello.rank
        try:
            async with self._reserving:
                place = await asyncio.to_thread(
                    self._arenas.grow,
                    rank,
                    grow.slot,
                    image_bytes=grow.image_bytes,
                    table_bytes=grow.table_bytes,
                )
            await asyncio.to_thread(self._arenas.prefault, [place])
        except HoldfastError as error:
            _log.warning("rank %d: slot %d stays as small as it is: %s", rank, grow.slot, error)
            await write(wire.FromAgent(failed=wire.Failed(slot=grow.slot, step=-1, reason=str(error))))
            return
        await write(wire.FromAgent(grown=wire.Grown(slot=_slot_place(place))))

    def _spawn(self, trainer: _Trainer, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        trainer.work.add(task)
        task.add_done_callback(lambda done: self._finished(trainer, done))

    def _finished(self, trainer: _Trainer, task: asyncio.Task[None]) -> None:
        trainer.work.discard(task)
        # A write to a trainer that died meanwhile fails; its death is noticed by the broken stream itself.
        if not task.cancelled() and (error := task.exception()) and trainer.session.alive:
            _log.error("rank %d: %s", trainer.hello.rank, error, exc_info=error)

    def _lose(self, trainer: _Trainer) -> None:
        """The trainer is gone: seal what it had fenced, drop the rest."""
        if not trainer.session.alive:
            return
        _log.info("rank %d %s, pid %d", trainer.hello.rank, "left" if trainer.ended else "is gone", trainer.hello.pid)
        trainer.session, actions = protocol.advance(trainer.session, protocol.TrainerLost())
        for action in actions:
            assert isinstance(action, protocol.Commit)
            if self._arenas.slot(trainer.hello.rank, action.slot).commit_if_open_for(action.step, action.nonce):
                _log.info("rank %d: sealed step %d for a trainer that is gone", trainer.hello.rank, action.step)
        if trainer.session.settled:
            trainer.settled.set()
        trainer.gone.set()
        self._idle_since_s = time.monotonic()

    # -- questions ---------------------------------------------------------------------------------------------------

    async def inventory(self, request: wire.Nothing, context: Context) -> wire.ImageList:
        """Every sealed image held here."""
        return wire.ImageList(agent=self._name, images=[self._image(held) for held in self._arenas.inventory()])

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
            alone=True,
            reserved_bytes=self._arenas.reserved_bytes,
            limit_bytes=self._arenas.limit_bytes or 0,
            trainers=[
                wire.TrainerStatus(
                    rank=rank,
                    world=t.hello.world,
                    pid=t.hello.pid,
                    alive=t.session.alive,
                    ended=t.ended,
                    report=t.report,
                )
                for rank, t in sorted(self._trainers.items())
            ],
            slots=[self._slot_status(*entry) for entry in self._arenas.places()],
            foreign=[os.fsencode(name).decode("utf-8", "replace") for name in self._arenas.foreign],
            idle_s=self.idle_s,
        )

    @property
    def idle_s(self) -> float:
        """Seconds since the last trainer left; 0 while one is attached."""
        if any(t.session.alive for t in self._trainers.values()):
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
            trainer_alive=trainer is not None and trainer.session.alive,
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
        """The gRPC methods; ``Attach`` only where trainers may come (the Unix socket)."""
        methods = {
            "Inventory": _unary(self.inventory, wire.Nothing),
            "Inspect": _unary(self.inspect, wire.InspectRequest),
            "Status": _unary(self.status, wire.Nothing),
        }
        if trainers:
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
        case "opened":
            m = message.opened
            return protocol.Opened(m.slot, SnapshotId(m.generation, m.step, m.run), m.watermark)
        case "copied":
            c = message.copied
            return protocol.Copied(c.slot, c.step, c.layout, c.image_bytes)
        case "fenced":
            return protocol.Fenced(message.fenced.slot, message.fenced.step)
        case "discarded":
            return protocol.Discarded(message.discarded.slot, message.discarded.step)
    return None


def error_text(error: HoldfastError) -> str:
    """An error as it travels in a gRPC status; the client raises the same class again."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})
