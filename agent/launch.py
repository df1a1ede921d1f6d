"""The embedded default: the first trainer of a job on a node that finds no agent starts one, detached, under a lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

from ..errors import AgentUnreachable, DeadlinePassed, HoldfastError
from .client import AgentClient
from .settings import NodeSettings, prepare_folder, remembered

_POLL_S: Final = 0.02
_OTHER_S: Final = 5.0  # for an agent that somebody else started to answer


def ensure_agent(settings: NodeSettings, timeout_s: float = 20.0) -> None:
    """Return once an agent answers at the settings' socket; start one if there is none and that is ours to do.

    Raises:
        AgentUnreachable: none answers, and ``autostart`` is off; or it cannot be started.
        DeadlinePassed: it did not answer in time.
    """
    if _answers(settings):
        return
    deadline_s = time.monotonic() + timeout_s
    if not settings.autostart:
        _await_managed(settings, deadline_s)
        return
    with _launch_lock(settings, deadline_s):
        if _answers(settings):  # whoever held the lock before us has started it
            return
        try:
            _start(settings, deadline_s)
        except AgentUnreachable:
            # Or was killed while doing so: then the agent that it started is there in a moment, and ours could not be.
            if not _answers_within(settings, _OTHER_S):
                raise


def _answers_within(settings: NodeSettings, seconds: float) -> bool:
    deadline_s = time.monotonic() + seconds
    while not (answers := _answers(settings)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    return answers


def _await_managed(settings: NodeSettings, deadline_s: float) -> None:
    """Wait for whoever manages the agent to start it (again)."""
    while not _answers(settings):
        if time.monotonic() > deadline_s:
            raise AgentUnreachable(f"no agent answers at {settings.socket} (HOLDFAST_AGENT); start it: holdfast agent")
        time.sleep(_POLL_S)


def _answers(settings: NodeSettings) -> bool:
    try:
        with AgentClient.at(settings) as client:
            client.status(timeout_s=2.0)
    except (AgentUnreachable, DeadlinePassed):
        return False
    return True


def _start(settings: NodeSettings, deadline_s: float) -> None:
    """Start a detached agent, with the options of the one before; its parent exits once it is ready, so nothing is left
    for us to reap."""
    command = [
        sys.executable, "-P", "-m", __package__.partition(".")[0], "agent", "--detach", "--job", settings.job,
        "--shm", str(settings.shm), "--socket", str(settings.socket), *map(str, remembered(settings).get("flags", [])),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline_s - time.monotonic()
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlinePassed(
            f"the agent of job {settings.job!r} was started and did not become ready in time"
        ) from error
    if done.returncode != 0:
        raise AgentUnreachable(f"the agent of job {settings.job!r} could not be started: {done.stderr.strip()}")


@contextlib.contextmanager
def _launch_lock(settings: NodeSettings, deadline_s: float) -> Iterator[None]:
    prepare_folder(settings.shm)
    with (settings.shm / "launch.lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise DeadlinePassed(f"another process has held {lock.name} while starting an agent") from None
                time.sleep(_POLL_S)
        yield


def detach(log_path: str) -> int | None:
    """Go on as a daemon. Returns None in the daemon; in the parent, the exit code once the daemon is ready or dead.

    The daemon has its own session (so that torchrun's tear-down does not reach it), its output in *log_path*, and hands
    its ready line to the parent through a pipe. Call before any thread is started.
    """
    read_end, write_end = os.pipe()
    if os.fork() > 0:
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            line = pipe.read()
        if line:
            sys.stdout.write(line)
            return 0
        sys.stderr.write(f"the agent ended before it was ready; its log is {log_path}\n")
        with contextlib.suppress(OSError), open(log_path, errors="replace") as log:
            sys.stderr.write("".join(log.readlines()[-5:]))
        return HoldfastError.exit_code
    os.close(read_end)
    os.setsid()
    with open(os.devnull) as null, open(log_path, "a") as log:
        os.dup2(null.fileno(), 0)
        os.dup2(log.fileno(), 2)
    os.dup2(write_end, 1)  # the ready line goes to the parent; daemon.run closes it after that
    os.close(write_end)
    return None
