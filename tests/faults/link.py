"""The wire to one agent, for tests to cut, or to flip bits on: a proxy at another address, with the same ports."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence

from holdfast.agent.bulk import HEADER_BYTES

_CHUNK_BYTES = 1 << 16


class Link:
    """Whoever connects to one of *ports* at *host* reaches that port at *behind*. Threads; ``close`` ends them.

    Attributes:
        flipped: connections on which a bit was flipped.
    """

    def __init__(self, host: str, behind: str, ports: Sequence[int], bulk: int) -> None:
        """*bulk* is the one of *ports* whose streams have bits to flip."""
        self.host, self._behind, self._bulk = host, behind, bulk
        self.flipped = 0
        self._wanted = 0
        self._lock = threading.Lock()
        self._passing = threading.Event()
        self._passing.set()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        for port in ports:
            listener = socket.create_server((host, port))
            self._sockets.append(listener)
            self._run(self._accept, listener, port)

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told why."""
        self._passing.clear()

    def heal(self) -> None:
        """All arrives that was sent since, and what is sent from now on."""
        self._passing.set()

    def flip(self) -> None:
        """On the next stream of blocks that the agent sends, flip a bit of the first block."""
        with self._lock:
            self._wanted += 1

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._closed = True
            sockets = list(self._sockets)
        self._passing.set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()

    def _run(self, work: object, *args: object) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _ended(self) -> bool:
        return self._closed

    def _accept(self, listener: socket.socket, port: int) -> None:
        while not self._ended():
            with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
                near, _ = listener.accept()  # fails once the listener is closed
                undo.enter_context(near)
                far = undo.enter_context(socket.create_connection((self._behind, port)))  # fails if the agent is dead
                with self._lock:
                    if self._closed:
                        return
                    undo.pop_all()  # ``close`` ends them now
                    self._sockets += [near, far]
                    flip = port == self._bulk and self._wanted > 0
                    self._wanted -= flip
                self._run(self._pump, near, far, False)
                self._run(self._pump, far, near, flip)

    def _pump(self, source: socket.socket, target: socket.socket, flip: bool) -> None:
        """Pass on what comes, until either side ends."""
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self._passing.wait()
                if flip and passed <= HEADER_BYTES < passed + len(data):
                    at = HEADER_BYTES - passed
                    data = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
                    self.flipped, flip = self.flipped + 1, False
                passed += len(data)
                target.sendall(data)
        with self._lock:
            self._wanted += flip  # no block came
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
