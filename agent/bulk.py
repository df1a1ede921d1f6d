"""Blocks from agent to agent: plain TCP streams from and into shared memory, each opened once, by a token.

Blocking sockets in threads: ``sendall`` and ``recv_into`` release the GIL, and nothing is copied on the way. What goes over
the wire is in docs/bulk.md. No length that came over it is ever used: both sides know what the stream carries, and headers
only confirm it. Whether the bytes are the right ones is for the caller to verify, who has their checksums.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import math
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ..crashpoints import reach
from ..erasure.kernel import crc32c
from ..errors import AgentUnreachable, AgentUntrusted, ConfigError, DeadlinePassed, SourceGone, StreamBroken
from .trust import AGENT_NAME

TOKEN_BYTES: Final = 32
CHUNK_BYTES: Final = 4 << 20  # what is sent at a time: with 1 MiB, a stream on loopback is 5 % slower
TURN_BYTES: Final = 256 << 10  # what is sent at a time under a pace: small, so that every stream has its turn in time
_MAGIC: Final = b"HFB1"
_FIELDS: Final = struct.Struct("<4sIQI")  # magic, sequence, nbytes, status; then the crc32c of these
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _FIELDS.size + _CRC.size
_SAY_AGAIN_S: Final = 60.0
_SAY_AT_MOST: Final = 256  # pairs of cause and address that are remembered as said
_ACCEPT_AGAIN_S: Final = 0.1  # after an error such as too many open files

_log = logging.getLogger(__name__)


# -- framing ----------------------------------------------------------------------------------------------------------


class Status(IntEnum):
    """What follows a header."""

    SENT = 1  # the piece
    GONE = 2  # nothing: its bytes are no longer there, and the stream ends


@dataclass(frozen=True, slots=True)
class Header:
    """What precedes each piece: its number in the stream, from 0, its length, and whether it follows."""

    sequence: int
    nbytes: int
    status: Status

    def encode(self) -> bytes:
        """The ``HEADER_BYTES`` bytes on the wire."""
        fields = _FIELDS.pack(_MAGIC, self.sequence, self.nbytes, self.status)
        return fields + _CRC.pack(crc32c(fields))

    @classmethod
    def decode(cls, raw: bytes | bytearray) -> Header:
        """The header that *raw* is.

        Raises:
            StreamBroken: it is none: another length or magic, a checksum that does not match, an unknown status.
        """
        if len(raw) != HEADER_BYTES:
            raise StreamBroken(f"a header of {len(raw)} bytes; it has {HEADER_BYTES}")
        magic, sequence, nbytes, status = _FIELDS.unpack_from(raw)
        if magic != _MAGIC:
            raise StreamBroken(f"a header begins with {magic!r} instead of {_MAGIC!r}")
        if _CRC.unpack_from(raw, _FIELDS.size) != (crc32c(raw[: _FIELDS.size]),):
            raise StreamBroken("the checksum of a header does not match")
        if status not in (Status.SENT, Status.GONE):
            raise StreamBroken(f"a header has status {status}, which means nothing")
        return cls(sequence, nbytes, Status(status))


# -- pacing -----------------------------------------------------------------------------------------------------------


class Pace:
    """A token bucket: how fast all streams together may send. Any thread may ask at any time.

    Over any t seconds, at most ``bytes_per_s * t + burst_bytes`` begin to be sent, and one request more.
    """

    def __init__(
        self, bytes_per_s: float, burst_bytes: int = 4 * TURN_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not (bytes_per_s > 0 and burst_bytes >= 0):
            raise ValueError(f"{bytes_per_s} bytes per second with bursts of {burst_bytes}")
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._paid_until_s = -math.inf  # when all that was asked for so far would have been sent at an even pace

    def delay_s(self, nbytes: int) -> float:
        """Take a turn for *nbytes*; how long to wait before sending them. Turns are given in the order of asking."""
        with self._lock:
            now_s = self._clock()
            start_s = max(self._paid_until_s, now_s - self._burst_s)
            self._paid_until_s = start_s + nbytes / self._bytes_per_s
        return max(0.0, start_s - now_s)


# -- what may be fetched ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to send.

    ``view`` is called when their turn has come, on a thread of the server. It gives exactly *nbytes* bytes, contiguous, of
    any item type, that stay mapped as long as the view lives; or None if they are no longer there. If they change while
    they are being sent, the receiver's checksums tell.
    """

    nbytes: int
    view: Callable[[], memoryview | None]


@dataclass(frozen=True, slots=True)
class Grant:
    """What one token is good for. *purpose* and *peer* are for logs."""

    pieces: tuple[Piece, ...]
    purpose: str
    peer: str
    expires_s: float


class Grants:
    """The grants that are open, by token. Pure but for the tokens, which are random; not for several threads."""

    def __init__(self, life_s: float, most: int) -> None:
        self._life_s, self._most = life_s, most
        self._open: dict[bytes, Grant] = {}  # in order of expiry

    def __len__(self) -> int:
        return len(self._open)

    def add(self, pieces: Sequence[Piece], purpose: str, peer: str, now_s: float) -> bytes:
        """A new token for *pieces*. If too many are open, the oldest is forgotten: its holder will ask again."""
        self._forget_expired(now_s)
        if len(self._open) >= self._most:
            del self._open[next(iter(self._open))]
        token = secrets.token_bytes(TOKEN_BYTES)
        self._open[token] = Grant(tuple(pieces), purpose, peer, now_s + self._life_s)
        return token

    def redeem(self, token: bytes, now_s: float) -> Grant | None:
        """The grant of *token*, which is then used up; None if there is none. The time taken tells nothing of any token."""
        self._forget_expired(now_s)
        found: bytes | None = None
        for known in self._open:
            if hmac.compare_digest(known, token):
                found = known
        return None if found is None else self._open.pop(found)

    def _forget_expired(self, now_s: float) -> None:
        while self._open and self._open[first := next(iter(self._open))].expires_s <= now_s:
            del self._open[first]


# -- sending ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server puts up with.

    Attributes:
        token_s: from accepting a connection to having its token, TLS included.
        grant_s: how long a token that is not used is good.
        stall_s: most time for ``CHUNK_BYTES`` to leave.
        connections: most at a time; further ones are closed at once.
        grants: most that are open at a time.
    """

    token_s: float = 5.0
    grant_s: float = 30.0
    stall_s: float = 30.0
    connections: int = 64
    grants: int = 1024


@dataclass(frozen=True, slots=True)
class Sent:
    """What a server has done so far: streams sent in full, bytes of pieces sent, and everything else by its cause."""

    streams: int
    nbytes: int
    refused: dict[str, int]


class _Refused(Exception):
    """A connection is not what was agreed on. ``args``: the cause, and what is to be said about it."""


class BulkServer:
    """Sends what was granted to whoever brings the token, once. Threads: one accepts, one per connection sends."""

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        pace: Pace | None = None,
        *,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen on *host* (an IP address) and *port* (0 picks one).

        Args:
            tls: as ``Trust.server_context`` gives it; None for plain connections, on loopback only.
            pace: shared with whatever else it should limit; None for as fast as it goes.
            clock: for the life of grants.

        Raises:
            ConfigError: not loopback and no TLS, or an address that cannot be used.
        """
        self._tls, self._pace, self._limits, self._clock = tls, pace, limits, clock
        self._grants = Grants(limits.grant_s, limits.grants)
        self._lock = threading.Lock()  # over everything below
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []  # a connection is closed a moment before its thread has ended
        self._streams = self._sent_bytes = 0
        self._refused: Counter[str] = Counter()
        self._said: dict[tuple[str, str], float] = {}
        self._closing = threading.Event()
        self._listener = _listen(host, port, secured=tls is not None)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="bulk-accept", daemon=True)
        self._acceptor.start()

    def grant(self, pieces: Sequence[Piece], *, purpose: str, peer: str) -> bytes:
        """A token of ``TOKEN_BYTES`` random bytes, for *peer* to fetch *pieces* with, once and soon."""
        with self._lock:
            return self._grants.add(pieces, purpose, peer, self._clock())

    def report(self) -> Sent:
        """What was sent and refused so far."""
        with self._lock:
            return Sent(self._streams, self._sent_bytes, dict(self._refused))

    def close(self, timeout_s: float = 5.0) -> None:
        """Cut all streams, and wait that long for the threads to end. Idempotent."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._closing.set()
            threads = [self._acceptor, *self._threads]
            for sock in (self._listener, *self._open):
                _cut(sock)
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self._listener.close()
        if alive := [thread.name for thread in threads if thread.is_alive()]:
            _log.warning("still sending after %.1f s: %s", timeout_s, ", ".join(alive))

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, (address, *_) = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    self._refuse("accept", "", f"a connection cannot be accepted: {error.strerror}")
                    self._closing.wait(_ACCEPT_AGAIN_S)
                continue
            self._begin(sock, address)

    def _begin(self, sock: socket.socket, address: str) -> None:
        """Give the connection a thread, or close it."""
        reason = f"{self._limits.connections} connections are open"
        try:
            sock.settimeout(self._limits.token_s)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=self._serve, args=(sock, address), name=f"bulk-{address}", daemon=True)
            with self._lock:
                if len(self._open) < self._limits.connections and not self._closing.is_set():
                    thread.start()
                    self._open.add(sock)
                    self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]
                    return
        except (OSError, RuntimeError) as error:  # it is gone already; or there can be no further thread
            reason = str(error)
        if not self._closing.is_set():
            self._refuse("busy", address, f"a connection cannot be served: {reason}")
        sock.close()

    def _serve(self, sock: socket.socket, address: str) -> None:
        """One connection, from its token to its end."""
        what = "a connection"
        try:
            grant = self._admit(sock)
            what = f"a stream to {grant.peer} for {grant.purpose}"
            self._send(sock, grant)
        except _Refused as refused:
            self._refuse(refused.args[0], address, f"{what} was refused: {refused.args[1]}")
        except TimeoutError:
            self._refuse("stalled", address, f"{what} stood still for {self._limits.stall_s:g} s")
        except OSError as error:
            if not self._closing.is_set():
                self._refuse("cut", address, f"{what} was cut: {error}")
        except Exception:  # noqa: BLE001 - whatever a view raised ends this stream, and only this one
            _log.exception("%s failed", what)
            self._refuse("failed", address, f"{what} failed here")
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def _admit(self, sock: socket.socket) -> Grant:
        """What the token grants that the other side sends first. Raises ``_Refused`` for anything else."""
        deadline_s = time.monotonic() + self._limits.token_s
        token = b""
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            while len(token) < TOKEN_BYTES:
                sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                # One byte more is asked for than may come: nothing is sent before the stream is.
                if not (got := sock.recv(TOKEN_BYTES + 1 - len(token))):
                    raise _Refused("short", f"{len(token)} bytes came, a token has {TOKEN_BYTES}")
                token += got
        except TimeoutError:
            raise _Refused("slow", f"no token came within {self._limits.token_s:g} s") from None
        except ssl.SSLError as error:
            raise _Refused("tls", f"{error.reason or error}") from error
        if len(token) > TOKEN_BYTES:
            raise _Refused("long", "more bytes than a token came")
        with self._lock:
            grant = self._grants.redeem(token, self._clock())
        if grant is None:
            raise _Refused("unknown", "its token was used, has expired, or never was one")
        return grant

    def _send(self, sock: socket.socket, grant: Grant) -> None:
        sock.settimeout(self._limits.stall_s)
        reach("bulk.first-block")
        for sequence, piece in enumerate(grant.pieces):
            view = piece.view()
            if view is None or view.nbytes != piece.nbytes:
                sock.sendall(Header(sequence, piece.nbytes, Status.GONE).encode())
                raise _Refused("gone", f"piece {sequence} of {len(grant.pieces)} is no longer here")
            sock.sendall(Header(sequence, piece.nbytes, Status.SENT).encode())
            if view.nbytes:
                self._send_all(sock, view.cast("B"))
            if sequence == 0:
                reach("bulk.mid-stream")
        with self._lock:
            self._streams += 1

    def _send_all(self, sock: socket.socket, view: memoryview) -> None:
        step = CHUNK_BYTES if self._pace is None else TURN_BYTES
        for start in range(0, view.nbytes, step):
            chunk = view[start : start + step]
            if self._pace is not None and self._closing.wait(self._pace.delay_s(chunk.nbytes)):
                raise _Refused("closing", "the agent ends")
            sock.sendall(chunk)  # its timeout is for the whole chunk, not for any progress
            with self._lock:
                self._sent_bytes += chunk.nbytes

    def _refuse(self, cause: str, address: str, message: str) -> None:
        """Count; and say it, unless the same was said of the same address just now."""
        now_s = self._clock()
        with self._lock:
            self._refused[cause] += 1
            self._said = {key: said_s for key, said_s in self._said.items() if now_s - said_s < _SAY_AGAIN_S}
            silent = (cause, address) in self._said or len(self._said) >= _SAY_AT_MOST
            if not silent:
                self._said[cause, address] = now_s
        if not silent:
            _log.warning("bulk port, %s: %s", address or "own socket", message)


def _listen(host: str, port: int, *, secured: bool) -> socket.socket:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError as error:
        raise ConfigError(f"{host!r} is no IP address to listen on") from error
    if not (secured or address.is_loopback):
        raise ConfigError(f"{host}: without TLS only loopback addresses are served")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((str(address), port), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _cut(sock: socket.socket) -> None:
    """End whatever another thread is doing with *sock*. Its descriptor stays that thread's to close."""
    with contextlib.suppress(OSError):
        # Not ssl's own shutdown: it would have the other thread go on without TLS.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


# -- receiving --------------------------------------------------------------------------------------------------------


class Stream:
    """Pieces from another agent's bulk port, received one after the other into memory of the caller.

    A context manager: entering connects. One thread receives; any may ``cancel``.
    """

    def __init__(
        self,
        address: str,
        port: int,
        token: bytes,
        *,
        peer: str,
        tls: ssl.SSLContext | None,
        deadline_s: float,
        progress_s: float = 30.0,
    ) -> None:
        """Nothing is done yet.

        Args:
            address: IP address or host name.
            port: its bulk port.
            token: what it granted; good for one stream, and not for long.
            peer: what errors call the other side.
            tls: as ``Trust.client_context`` gives it; None for a plain connection.
            deadline_s: most seconds for the whole stream, from now.
            progress_s: most seconds without a byte.
        """
        self._address, self._port, self._token, self._tls = address, port, token, tls
        self._who = f"{peer} ({address}:{port})"
        self._began_s = time.monotonic()
        self._deadline_s, self._progress_s = deadline_s, progress_s
        self._sequence = 0
        self._lock = threading.Lock()  # over the next two
        self._sock: socket.socket | None = None
        self._cancelled = False

    def __enter__(self) -> Stream:
        try:
            with self._translating("a connection"):
                self._hold(socket.create_connection((self._address, self._port), self._patience_s()))
                if self._tls is not None:
                    self._secure(self._tls)
                # If the other side closed already, why it did is there to be received.
                with contextlib.suppress(ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                    self._held().sendall(self._token)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self, into: memoryview) -> None:
        """Receive the next piece, which must be as long as *into*, into it.

        *into* is contiguous and writable, of any item type. If this raises, what it holds is undefined, and the stream over.

        Raises:
            StreamBroken: the stream ended, or the piece is not the one expected; or ``cancel`` was called.
            SourceGone: the other side no longer has it.
            DeadlinePassed: no byte came for ``progress_s``, or the whole takes longer than ``deadline_s``.
            AgentUntrusted: the other side does not accept our certificate.
        """
        raw = bytearray(HEADER_BYTES)
        piece = f"piece {self._sequence}"
        with self._translating(f"the header of {piece}"):
            self._fill(memoryview(raw))
            header = Header.decode(raw)
        if (header.sequence, header.nbytes) != (self._sequence, into.nbytes):
            raise StreamBroken(
                f"{self._who} sends piece {header.sequence} of {header.nbytes} bytes; {piece} of {into.nbytes} was expected"
            )
        if header.status is Status.GONE:
            raise SourceGone(f"{self._who} no longer holds {piece}")
        if into.nbytes:
            with self._translating(f"the {into.nbytes} bytes of {piece}"):
                self._fill(into.cast("B"))
        self._sequence += 1

    def cancel(self) -> None:
        """Have whatever is waited for fail soon, on the thread that waits; connecting first runs into its own end."""
        with self._lock:
            self._cancelled = True
            if self._sock is not None:
                _cut(self._sock)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        with self._lock:
            sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _secure(self, context: ssl.SSLContext) -> None:
        plain = self._held()
        with self._lock:  # wrapping takes the descriptor over: ``cancel`` must see the one or the other
            self._sock = context.wrap_socket(plain, server_hostname=AGENT_NAME, do_handshake_on_connect=False)
            sock = self._sock
        sock.settimeout(self._patience_s())
        sock.do_handshake()

    def _fill(self, into: memoryview) -> None:
        sock, done = self._held(), 0
        while done < len(into):
            sock.settimeout(self._patience_s())
            count = sock.recv_into(into[done:])
            if count == 0:
                raise StreamBroken(f"ended after {done} of {len(into)} bytes")
            done += count

    def _hold(self, sock: socket.socket) -> None:
        with self._lock:
            self._sock = sock
            if self._cancelled:
                _cut(sock)

    def _held(self) -> socket.socket:
        if self._sock is None:
            raise StreamBroken("not connected")
        return self._sock

    def _patience_s(self) -> float:
        left_s = self._began_s + self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return min(left_s, self._progress_s)

    @contextlib.contextmanager
    def _translating(self, awaited: str) -> Iterator[None]:
        """Errors of sockets, and what the pure functions say, become ours, with the peer's name."""
        try:
            yield
        except StreamBroken as error:
            raise self._broken(awaited, str(error)) from error
        except TimeoutError as error:
            passed_s = time.monotonic() - self._began_s
            which = f"all of {self._deadline_s:g} s" if passed_s >= self._deadline_s else f"{self._progress_s:g} s"
            raise DeadlinePassed(f"waited {which} for {awaited} from {self._who}") from error
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise self._broken(awaited, "closed") from error
        except ssl.SSLError as error:
            if fault := _mistrust(error):
                raise AgentUntrusted(f"{self._who} {fault}") from error
            raise self._broken(awaited, error.reason or str(error)) from error
        except OSError as error:
            if self._sock is None:
                raise AgentUnreachable(f"{self._who} cannot be reached: {error.strerror or error}") from error
            raise self._broken(awaited, error.strerror or str(error)) from error

    def _broken(self, awaited: str, reason: str) -> StreamBroken:
        if self._cancelled:
            return StreamBroken(f"the stream from {self._who} was cancelled here, waiting for {awaited}")
        return StreamBroken(f"the stream from {self._who} broke, waiting for {awaited}: {reason}")


def _mistrust(error: ssl.SSLError) -> str:
    """Which side does not accept the other's certificate, and why; empty if it is about something else."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"shows a certificate that is not accepted here: {error.verify_message}"
    reason = error.reason or ""
    if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
        return f"does not accept our certificate: {reason.lower().replace('_', ' ')}"
    return ""
