"""How trainers and tools talk to an agent. Synchronous; no method here blocks without a deadline."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

# A trainer forks data loader workers. They never talk to the agent, and gRPC's own fork handlers only get in the way.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

import grpc
import numpy as np
from google.protobuf.message import Message

from ..errors import AgentError, AgentUnreachable, DeadlinePassed, HoldfastError, every_error
from ..snapshot.arena import Place
from ..snapshot.record import SnapshotId
from ..snapshot.unchanged import Unchanged
from . import wire_pb2 as wire
from .settings import PROTOCOL, NodeSettings, check_owner, pid_namespace
from .trust import Trust

_log = logging.getLogger(__name__)
SERVICE: Final = "holdfast.v1.Agent"
MESSAGE_BYTES: Final = 64 << 20  # layouts of tens of thousands of tensors fit; nothing bulky travels here
LAYOUT_BYTES_LIMIT: Final = 48 << 20  # it travels in one message, with the checksums of an image of up to 16 TiB
WINDOW_BYTES: Final = 64 << 20  # most that one ``Read`` lays out
WINDOW_RANGES: Final = 1 << 16  # and the most ranges that it may ask for
WINDOWS: Final = 2  # of each reader: one is read while the other is filled
CHANNEL_OPTIONS: Final = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel inherits the back-off of an old one to the same socket
]
Reply = TypeVar("Reply", bound=Message)


def packed(ranges: Sequence[tuple[int, int]]) -> bytes:
    """(offset, length) pairs as ``ReadRequest.ranges`` takes them."""
    return np.array(ranges, "<u8").tobytes()


class AgentClient:
    """Questions to one agent, over its Unix socket or its TCP address. A context manager."""

    def __init__(self, target: str, trust: Trust | None = None) -> None:
        """*trust*: certificates for an agent that asks for them; not over a Unix socket."""
        self.target = target
        if trust is None or target.startswith("unix:"):
            self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            options = [*CHANNEL_OPTIONS, *trust.channel_options()]
            self._channel = grpc.secure_channel(target, trust.channel_credentials(), options=options)

    @classmethod
    def at(cls, settings: NodeSettings) -> AgentClient:
        """The agent of this node and job. Raises ``AgentUntrusted`` if the socket is somebody else's."""
        return cls(_own_socket(settings))

    def status(self, timeout_s: float = 5.0) -> wire.StatusReport:
        """All there is to know about the agent."""
        return self._ask("Status", wire.Nothing(), wire.StatusReport, timeout_s)

    def inventory(self, timeout_s: float = 30.0) -> wire.ImageList:
        """Every sealed image the agent holds."""
        return self._ask("Inventory", wire.Nothing(), wire.ImageList, timeout_s)

    def elsewhere(self, addresses: Sequence[str], timeout_s: float) -> wire.ImageLists:
        """What the agents at these addresses hold, as far as they answer; for nodes on which the job has no ranks now."""
        return self._ask("Elsewhere", wire.AddressList(addresses=addresses), wire.ImageLists, timeout_s)

    def inspect(self, run: str, step: int, timeout_s: float = 600.0) -> wire.Inspection:
        """One snapshot, read in full by the agent. Raises ``SnapshotUnknown``."""
        return self._ask("Inspect", wire.InspectRequest(run=run, step=step), wire.Inspection, timeout_s)

    def materialise(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.MaterialiseReply:
        """Have an image in this node's memory. Raises ``SnapshotLost``."""
        return self._ask("Materialise", request, wire.MaterialiseReply, timeout_s)

    def describe_image(self, request: wire.MaterialiseRequest, timeout_s: float) -> wire.Description:
        """The layout of an image, wherever it lies. Raises ``SnapshotLost``."""
        return self._ask("Describe", request, wire.Description, timeout_s)

    def read_ranges(self, request: wire.ReadRequest, timeout_s: float) -> wire.ReadReply:
        """Have ranges of an image in a window. Raises ``SnapshotLost``, ``BudgetExceeded``, ``ConfigError``."""
        return self._ask("Read", request, wire.ReadReply, timeout_s)

    def stored(self, timeout_s: float) -> wire.TierList:
        """What lies in the tiers that the agent knows."""
        return self._ask("Stored", wire.Nothing(), wire.TierList, timeout_s)

    def spill_now(self, tiers: int = 0, timeout_s: float = 5.0) -> wire.SpillReply:
        """Ask for the next snapshot to be spilled to the first *tiers* tiers, 0 for all."""
        return self._ask("SpillNow", wire.SpillRequest(tiers=tiers), wire.SpillReply, timeout_s)

    def _ask(self, method: str, request: Message, reply: type[Reply], timeout_s: float) -> Reply:
        call: grpc.UnaryUnaryMultiCallable[Any, Any] = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        try:
            answer: Reply = call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise translated(error, f"{method} of the agent at {self.target}", timeout_s) from error
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Attachment:
    """One rank's stream to its agent.

    ``send`` never blocks. What the agent says is handed to *hear*, on a thread of this class; when the stream ends,
    *lost* is called there, once, with the reason. *hello* then says ``again``, for whoever attaches with it once more.
    """

    def __init__(
        self,
        settings: NodeSettings,
        hello: wire.Hello,
        *,
        hear: Callable[[wire.FromAgent], None],
        lost: Callable[[Attachment, HoldfastError], None],
        timeout_s: float,
    ) -> None:
        self._hear = hear
        self._lost = lost
        self._outbox: queue.SimpleQueue[wire.FromTrainer | None] = queue.SimpleQueue()
        self._closing = False
        self.ended = False  # the stream is no more
        self._what = f"Attach of rank {hello.rank} to the agent at {settings.socket}"
        self._channel = grpc.insecure_channel(_own_socket(settings), options=CHANNEL_OPTIONS)
        call: grpc.StreamStreamMultiCallable[Any, Any] = self._channel.stream_stream(
            f"/{SERVICE}/Attach",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=wire.FromAgent.FromString,
        )
        self.send(wire.FromTrainer(hello=hello))
        self._stream: Any = call(self._outgoing())
        self.welcome = self._first(timeout_s)
        hello.again = True
        self._thread = threading.Thread(target=self._listen, name="holdfast-listen", daemon=True)
        self._thread.start()

    def send(self, message: wire.FromTrainer) -> None:
        """Queue *message*; after the stream has ended, this does nothing."""
        self._outbox.put(message)

    def close(self, *, goodbye: bool, timeout_s: float = 2.0) -> None:
        """End the stream, once what was sent is delivered. *goodbye*: nobody will come back for the snapshots."""
        self._closing = True
        if goodbye:
            self.send(wire.FromTrainer(goodbye=wire.Goodbye()))
        self._outbox.put(None)
        self._thread.join(timeout_s)
        self._stream.cancel()
        self._thread.join(timeout_s)

    def _outgoing(self) -> Iterator[wire.FromTrainer]:
        while (message := self._outbox.get()) is not None:
            yield message

    def _first(self, timeout_s: float) -> wire.Welcome:
        """The answer to Hello. The stream as a whole has no deadline, so a timer gives one to this wait."""
        timer = threading.Timer(timeout_s, self._stream.cancel)
        timer.daemon = True
        timer.start()
        answer: wire.FromAgent | None = None
        try:
            answer = next(self._stream)
        except StopIteration:
            raise AgentUnreachable(f"{self._what}: the agent ended the stream") from None
        except grpc.RpcError as error:
            raise translated(error, self._what, timeout_s) from error
        finally:
            timer.cancel()
            if answer is None:
                self._outbox.put(None)
                self._channel.close()
        return answer.welcome

    def _listen(self) -> None:
        reason: HoldfastError = AgentUnreachable(f"{self._what}: the agent ended the stream")
        try:
            for message in self._stream:
                self._hear(message)
        except grpc.RpcError as error:
            reason = translated(error, self._what, 0.0)
        except Exception as error:  # noqa: BLE001 - a thread ends here; a stream that nobody hears is a lost one
            _log.exception("%s: what the agent said could not be handled", self._what)
            reason = AgentError(f"{self._what}: {error!r}")
        self._outbox.put(None)
        self._channel.close()
        self.ended = True  # before it is told: who takes this on later must see it
        if not self._closing:
            self._lost(self, reason)


def hello(
    settings: NodeSettings,
    version: str,
    *,
    rank: int,
    world: int,
    slots: int,
    image_bytes: int,
    table_bytes: int,
    tiers: Iterable[str] = (),
    grace_s: float = 0.0,
) -> wire.Hello:
    """The first message of a trainer."""
    return wire.Hello(
        protocol=PROTOCOL,
        version=version,
        job=settings.job,
        rank=rank,
        world=world,
        pid=os.getpid(),
        life=uuid.uuid4().hex,
        pid_namespace=pid_namespace(),
        slots=slots,
        image_bytes=image_bytes,
        table_bytes=table_bytes,
        tiers=tiers,
        grace_s=grace_s,
    )


def id_of(id: wire.Id) -> SnapshotId:
    """A snapshot's identity as it came over the wire."""
    return SnapshotId(id.generation, id.step, id.run)


def wire_id(id: SnapshotId) -> wire.Id:
    """A snapshot's identity for the wire."""
    return wire.Id(run=id.run, generation=id.generation, step=id.step)


def unchanged_of(since: int, ranges: Iterable[wire.Range]) -> Unchanged | None:
    """Which bytes of an image are as an earlier filling of its slot has left them, as it came over the wire."""
    found = tuple((r.offset, r.offset + r.nbytes) for r in ranges)
    return Unchanged(since, found) if since and found else None


def place_of(slot: wire.SlotPlace, rank: int) -> Place:
    """A slot's place as the agent told it."""
    return Place(slot.path, rank, slot.index, slot.table_bytes, slot.image_bytes)


def _own_socket(settings: NodeSettings) -> str:
    try:
        check_owner(settings.socket)
    except FileNotFoundError as error:
        raise AgentUnreachable(f"no agent: {settings.socket} does not exist (job {settings.job!r})") from error
    return f"unix:{settings.socket}"


def error_text(error: HoldfastError) -> str:
    """An error as it travels in a gRPC status or a message; ``told`` gives back the same class."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})


def told(text: str, what: str = "the agent") -> HoldfastError:
    """The error that an agent told of."""
    try:
        document = json.loads(text)
        kind = next(k for k in every_error() if k.__name__ == document["error"])
        return kind(document["message"])
    except (ValueError, KeyError, TypeError, StopIteration):
        return AgentError(f"{what}: {text}")


def translated(error: grpc.RpcError, what: str, timeout_s: float) -> HoldfastError:
    """Our error for gRPC's: the one the agent raised, if it raised one."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return told(details, what)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or (code is grpc.StatusCode.CANCELLED and timeout_s):
        return DeadlinePassed(f"{what}: no answer within {timeout_s:g} s")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # a message is too long: it would be the next time, too
        return AgentError(f"{what}: {details}")
    return AgentUnreachable(f"{what}: {details or code.name.lower()}")
