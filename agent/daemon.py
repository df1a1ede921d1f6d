"""The agent's process: one per job and node, found by its socket, alone by its lock, ending cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import grpc

from ..crashpoints import reach
from ..errors import AgentError, ConfigError
from .arenas import Arenas
from .budget import measure
from .bulk import BulkServer, Limits, Pace
from .client import MESSAGE_BYTES
from .peers import Peers
from .protector import Protector
from .service import AgentService
from .settings import NodeSettings, prepare_folder, remember, remembered
from .trust import Trust

_log = logging.getLogger(__name__)
_IDLE_CHECK_S: Final = 1.0
_ENDING_CHECK_S: Final = 0.05
_STREAMS_OUT: Final = 256  # every other member of a group may pull for each of its ranks at once
_GRACE_S: Final = 5.0  # for calls under way when the agent is asked to end


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """How one agent runs.

    Attributes:
        name: what it calls itself in reports.
        listen: ``host:port`` for peers and tools; port 0 picks one. Loopback only, unless there is *trust*.
        domains: failure domains of this node, from wide to narrow, like ("rack", "r1"); the host is added.
        trust: certificates for mutual TLS with peers.
        net_limit_bytes_s: how fast it sends to peers at most, None for as fast as it can.
        flags: the options of ``holdfast agent`` that say the same, for whoever starts this agent's successor.
        memory_limit_bytes: most shared memory for all ranks of this node, None for what the node has.
        idle_exit_s: with nobody attached and no snapshot that matters, end after this time; None never.
        keep_s: how long snapshots matter whose trainers died and did not come back; None forever.
    """

    name: str
    listen: str = "127.0.0.1:0"
    domains: tuple[tuple[str, str], ...] = ()
    trust: Trust | None = None
    net_limit_bytes_s: float | None = None
    flags: tuple[str, ...] = ()
    memory_limit_bytes: int | None = None
    idle_exit_s: float | None = 300.0
    keep_s: float | None = 24 * 3600.0


def run(settings: NodeSettings, options: DaemonOptions, version: str, *, detached: bool = False) -> None:
    """Serve until SIGTERM, SIGINT or idleness. Prints the ready line once trainers can attach.

    *detached*: standard output is the pipe to whoever waits for the ready line, and is let go after it.

    Raises:
        AgentError: another agent holds the folder.
        ConfigError: an address or folder that cannot be used.
    """
    host, port = _address(options.listen, trusted=options.trust is not None)
    os.umask(0o077)
    prepare_folder(settings.shm)
    with contextlib.suppress(OSError):
        os.nice(5)  # training comes first
    with _sole_agent(settings):
        asyncio.run(_serve(settings, options, version, f"{host}:{port}", detached))


async def _serve(settings: NodeSettings, options: DaemonOptions, version: str, listen: str, detached: bool) -> None:
    arenas = Arenas(settings, options.name, options.memory_limit_bytes, measure)
    for record in arenas.adopt():
        _log.info("adopted %s of rank %d", record.id, record.rank)
    reach("adopt.scanned")
    service = AgentService(options.name, version, settings, arenas, _domains(options))
    settings.socket.unlink(missing_ok=True)  # the lock is ours, so whoever bound it is gone
    # Without sharing of ports: a port that somebody else has taken meanwhile must be noticed.
    limits = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
    ]
    near, far = grpc.aio.server(options=limits), grpc.aio.server(options=limits)
    near.add_generic_rpc_handlers((service.handlers(trainers=True),))
    far.add_generic_rpc_handlers((service.handlers(trainers=False),))
    near.add_insecure_port(f"unix:{settings.socket}")
    host = listen.rpartition(":")[0]
    service.listen = f"{host}:{_bind(far, listen, settings, options.trust)}"
    pace = Pace(options.net_limit_bytes_s) if options.net_limit_bytes_s else None
    tls = options.trust.server_context() if options.trust else None
    bulk = BulkServer(host.strip("[]"), 0, tls, pace, limits=Limits(connections=_STREAMS_OUT))
    peers = Peers(settings.job, options.name, options.trust)
    tiers = service.spiller.tiers
    protector = Protector(
        options.name, settings.job, arenas, bulk, peers, options.trust, service.tell, tiers.load, tiers.origin
    )
    service.protector = protector
    clock = asyncio.create_task(protector.keep_time())
    await near.start()
    await far.start()
    _say_ready(settings, options, service)
    if detached:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())
    removing = await _until_done(service, options)
    if not removing:
        await _let_trainers_end(service)
    # Trainers see the stream end and keep training; what they had fenced is sealed before we go.
    await asyncio.gather(near.stop(_GRACE_S if removing else 0), far.stop(0))
    await service.quiesce()
    clock.cancel()
    await protector.close()  # first: whoever reads from a tier has a lease there
    await service.spiller.close()
    await peers.close()
    await asyncio.to_thread(bulk.close)
    if removing:
        arenas.remove()
        _leave(settings)
    arenas.close()
    _log.info("agent %s ends", options.name)


def _bind(server: grpc.aio.Server, listen: str, settings: NodeSettings, trust: Trust | None) -> int:
    """Listen for peers; returns the port. Where any will do, the one of the agent before: its peers know no other."""

    def bind(address: str) -> int:
        if trust is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, trust.server_credentials())

    host, _, port = listen.rpartition(":")
    before = remembered(settings).get("listen", "")
    if port == "0" and isinstance(before, str) and before.rpartition(":")[0] == host:
        with contextlib.suppress(RuntimeError):
            return bind(before)
    try:
        return bind(listen)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}") from error


async def _until_done(service: AgentService, options: DaemonOptions) -> bool:
    """Wait for a signal (False) or for idleness (True: nobody wants the snapshots any more)."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    loop.add_signal_handler(signal.SIGUSR1, service.preempt, "the agent got SIGUSR1")
    while not asked.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), _IDLE_CHECK_S)
            return False
        patience_s = options.keep_s if service.snapshots_matter else options.idle_exit_s
        if patience_s is not None and service.idle_s > patience_s:
            _log.info("nobody has been attached for %.0f s; giving the memory back", service.idle_s)
            return True
    return False


async def _let_trainers_end(service: AgentService) -> None:
    """This node is to be given up: trainers that want notice of it get it, and the time that they declared to end."""
    grace_s = service.preempt("the agent is to end")
    if grace_s > 0:
        deadline_s = time.monotonic() + grace_s
        while service.idle_s == 0.0 and time.monotonic() < deadline_s:
            await asyncio.sleep(_ENDING_CHECK_S)


def _leave(settings: NodeSettings) -> None:
    """Remove what is ours from the folder, and the folder if nothing else is in it."""
    for name in ("agent.pid", "agent.sock", "agent.log", "agent.lock", "agent.json", "agent.json.new", "launch.lock"):
        (settings.shm / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        settings.shm.rmdir()


def _say_ready(settings: NodeSettings, options: DaemonOptions, service: AgentService) -> None:
    (settings.shm / "agent.pid").write_text(f"{os.getpid()}\n")
    remember(settings, service.listen, options.flags)
    line = f"holdfast agent {options.name} ready job={settings.job} socket={settings.socket} listen={service.listen} "
    sys.stdout.write(f"{line}shm={settings.shm} pid={os.getpid()}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _sole_agent(settings: NodeSettings) -> Iterator[None]:
    """Hold the folder's lock. The kernel drops it with the process, however that ends."""
    with (settings.shm / "agent.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AgentError(f"another agent already serves {settings.shm} (it holds {lock.name})") from None
        yield


def _domains(options: DaemonOptions) -> list[tuple[str, str]]:
    """The failure domains of this node; the host is one, unless another name was given for it."""
    named = any(level == "host" for level, _ in options.domains)
    return [*options.domains] if named else [*options.domains, ("host", platform.node())]


def _address(listen: str, *, trusted: bool) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]") if host != "localhost" else "127.0.0.1")
        number = int(port)
    except ValueError as error:
        raise ConfigError(f"--listen {listen!r}: an address and a port are needed, like 127.0.0.1:0") from error
    if address.is_unspecified:
        raise ConfigError(f"--listen {listen}: an address that peers can call is needed, not the one that means all")
    if not trusted and not address.is_loopback:
        raise ConfigError(f"--listen {listen}: without TLS only loopback addresses are served")
    return (f"[{address}]" if address.version == 6 else str(address)), number


class JsonLines(logging.Formatter):
    """One JSON object per log record: time (s since the epoch), level, logger, message, and the exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time_s": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(style: str, level: int = logging.INFO) -> None:
    """Log to standard error, as ``text`` or ``json``."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    text.converter = time.gmtime
    handler.setFormatter(JsonLines() if style == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
