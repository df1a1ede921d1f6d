"""Processes that start warm: forked from a server that has imported everything once and done nothing else.

A trainer so costs a fraction of a second where an interpreter with torch takes two or three, and an agent hundredths where it
takes a third of one. They are processes like any other: to be signalled, stopped and killed.

Imported as ``holdfast.tests.warm``. There is one server for all tests of a pytest process, so what it has imported is said here,
for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from holdfast import crashpoints

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch._dynamo",  # torch would import it at the first collective of each process, which takes it half a second
        "torch.distributed.checkpoint",
        "holdfast.hooks.checkpointer",
        "holdfast.ops.agent",
        "faults.job",
        "holdfast.tests.hooks.worlds",
    ]
)


class Agent:
    """``holdfast agent`` in the foreground. Like ``subprocess.Popen`` as far as tests need it.

    Attributes:
        pid: of its process.
        stdout: where its ready line comes from; at its end if it refused to start. The caller closes it.
    """

    def __init__(self, arguments: Sequence[str], log: Path | None = None, environment: Mapping[str, str] = os.environ):
        """*arguments*: those of ``holdfast agent``. *log*: a file to which its standard error is appended; None: nowhere."""
        near, far = server.Pipe(duplex=False)
        self._process = server.Process(
            target=_be_agent, args=(list(arguments), dict(environment), far, str(log or os.devnull)), daemon=True
        )
        self._process.start()
        far.close()
        with near:
            self.stdout = os.fdopen(os.dup(near.fileno()))
        pid = self._process.pid
        assert pid is not None
        self.pid: int = pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int | None:
        """As ``poll``, once it has ended or the time is over."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _be_agent(arguments: list[str], environment: dict[str, str], out: Connection, log: str) -> None:
    """The whole life of an agent's process."""
    from holdfast.ops.cli import main

    os.environ.clear()
    os.environ.update(environment)
    crashpoints.arm(environment.get("HOLDFAST_CRASH", ""))  # it had read the server's
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out.fileno(), 1)
    os.dup2(errors, 2)
    os.close(errors)
    out.close()
    main(["agent", *arguments])
