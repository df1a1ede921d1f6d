"""``holdfast run``: a training command with an agent beside it, for as long as the command runs.

The agent is the same detached process that a trainer would start by itself: it outlives this command on purpose. After
a success, trainers have said goodbye, and it gives the memory back after ``--idle-exit``; after a failure it keeps the
snapshots for ``--keep``, and the next ``holdfast run`` of the job finds them, and it, warm.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..errors import AgentUnreachable, DeadlinePassed, HoldfastError
from .quantity import BYTES, SECONDS

if TYPE_CHECKING:
    from ..agent.settings import NodeSettings

_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_START_TIMEOUT_S: Final = 20.0
_ASK_EVERY_S: Final = 1.0
_ASK_AT_LEAST_EVERY_S: Final = 30.0  # while the agent cannot be started again
_JOIN_S: Final = 1.0
_NOT_FOUND: Final = 127  # as shells have it
_NOT_EXECUTABLE: Final = 126


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--job", help="Name of the job. Default: HOLDFAST_JOB, SLURM_JOB_ID, or one made of the script's path.")
@click.option("--shm", help="Folder of shared memory. Default: HOLDFAST_SHM, or /dev/shm/holdfast-<uid>/<job>")
@click.option("--memory-limit", type=BYTES, help="Most shared memory for snapshots. See: holdfast agent --help")
@click.option(
    "--idle-exit", type=SECONDS, default=None, help="How long an agent that nobody needs stays.  [default: 5m]"
)
@click.option("--keep", type=SECONDS, default=None, help="How long snapshots of a failed job are kept.  [default: 24h]")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True, metavar="[--] COMMAND...")
@click.pass_context
def run(
    context: click.Context,
    job: str | None,
    shm: str | None,
    memory_limit: int | None,
    idle_exit: float | None,
    keep: float | None,
    command: tuple[str, ...],
) -> None:
    """Start an agent, run a training command, pass signals and exit code on.

    An agent that runs already is used as it is; one that dies is started again while COMMAND runs. COMMAND gets
    HOLDFAST_JOB, HOLDFAST_SHM and HOLDFAST_AGENT. Run it again after a failure, and it continues from its snapshots.
    """
    _check_executable(command[0])
    from ..agent.launch import ensure_agent
    from ..agent.settings import NodeSettings

    settings = NodeSettings.read(os.environ, job=job, shm=shm, script=script_of(command))
    # Both the agent and the command inherit them.
    os.environ |= {"HOLDFAST_JOB": settings.job, "HOLDFAST_SHM": str(settings.shm)}
    # torchrun would keep one store over all restarts, and gloo connect to the dead it finds there (pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if memory_limit is not None:
        os.environ["HOLDFAST_MEMORY_LIMIT"] = str(memory_limit)
    for name, value_s in (("idle_exit", idle_exit), ("keep", keep)):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            os.environ[f"HOLDFAST_{name.upper()}"] = "never" if value_s is None else f"{value_s:f}"
    ensure_agent(settings, _START_TIMEOUT_S)
    _say(f"job {settings.job}, agent at {settings.socket}")
    os.environ["HOLDFAST_AGENT"] = str(settings.socket)
    with _agent_kept(settings):
        code = _run(command)
    if code:
        _tell_what_is_held(settings, code)
    sys.exit(code)


def script_of(command: Sequence[str]) -> str:
    """What *command* trains with, to name a job after: the same script gives the same name, whatever launches it.

    The first argument that is a Python file; else the last module after ``-m``; else the first argument that is a file;
    else the program.
    """
    arguments = command[1:]
    files = [text for text in arguments if os.path.isfile(text)]  # unlike Path.is_file, takes any text
    scripts = [text for text in (command[0], *files) if text.endswith(".py")]
    modules = [after for option, after in itertools.pairwise(arguments) if option == "-m"]
    return (scripts[:1] or modules[-1:] or files[:1] or [command[0]])[0]


def _check_executable(program: str) -> None:
    """Before anything is started for it."""
    if shutil.which(program) is not None:
        return
    found = "/" in program and Path(program).exists()
    _say(f"{program}: {'cannot be executed' if found else 'command not found'}")
    sys.exit(_NOT_EXECUTABLE if found else _NOT_FOUND)


# -- the command ------------------------------------------------------------------------------------------------------


def _run(command: Sequence[str]) -> int:
    """Run *command*, passing signals on; its exit code, or 128 + n if signal n ended it. No deadline: it trains."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if process is None:
            early.append(number)
        elif not _sent_by_terminal(number):
            process.send_signal(number)

    # What is ignored (nohup, a shell's background jobs) stays so, for the command too: a handler would not be inherited.
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    former = {number: signal.signal(number, forward) for number in heard}
    try:
        try:
            process = subprocess.Popen(command)
        except OSError as error:  # a file with no interpreter, or of another architecture
            _say(f"{command[0]}: {error.strerror}")
            return _NOT_EXECUTABLE
        for number in early:  # handlers run in this thread, between two lines: none is lost, and none comes twice
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _sent_by_terminal(number: int) -> bool:
    """Whether the command has got this signal already: Ctrl-C at a terminal goes to all processes in its foreground."""
    if number != signal.SIGINT:
        return False
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


# -- the agent --------------------------------------------------------------------------------------------------------


@contextmanager
def _agent_kept(settings: NodeSettings) -> Iterator[None]:
    """In this block, an agent that has ended is started again, if starting one is ours to do."""
    over = threading.Event()
    keeper = threading.Thread(target=_keep_agent, args=(settings, over), name="holdfast-keep-agent", daemon=True)
    if settings.autostart:
        keeper.start()
    try:
        yield
    finally:
        over.set()
        if settings.autostart:  # should it be starting an agent just now, that agent serves the next run
            keeper.join(_JOIN_S)


def _keep_agent(settings: NodeSettings, over: threading.Event) -> None:
    pause_s, last, attached = _ASK_EVERY_S, "", False
    while not over.wait(pause_s):
        try:
            found = _revive(settings)
        except (HoldfastError, OSError) as error:
            if str(error) != last:
                _say(f"the agent has ended and cannot be started again; snapshots are skipped: {error}")
            pause_s, last = min(2 * pause_s, _ASK_AT_LEAST_EVERY_S), str(error)
            continue
        if found is None and attached:  # one that nobody was attached to ended by itself, unneeded
            _say("the agent had ended; another one has taken over what it held")
        pause_s, last, attached = _ASK_EVERY_S, "", found is True


def _revive(settings: NodeSettings) -> bool | None:
    """Have an agent that answers: whether trainers are attached to it, None if it had to be started just now."""
    from ..agent.client import AgentClient
    from ..agent.launch import ensure_agent

    try:
        with AgentClient.at(settings) as client:
            return any(trainer.alive for trainer in client.status().trainers)
    except DeadlinePassed:
        return True  # it hangs, or the node is busy; it has its lock, so no other could serve in its place
    except AgentUnreachable:
        ensure_agent(settings, _START_TIMEOUT_S)
        return None


# -- what the user is told --------------------------------------------------------------------------------------------


def _tell_what_is_held(settings: NodeSettings, code: int) -> None:
    """After a failure: what the next life of the job will find."""
    from ..agent.trust import Trust
    from .answers import Asked
    from .held import ask_holdings, by_job

    try:
        trust = Trust.read(*(os.environ.get(f"HOLDFAST_TLS_{name}") for name in ("CA", "CERT", "KEY")))
        job = by_job(ask_holdings(Asked((str(settings.socket),), named=True, trust=trust)).given)[settings.job]
    except HoldfastError as error:
        _say(f"the command ended with code {code}; what is held is not known: {error}")
        return
    newest = next((p for p in job.prospects.values() if p.reason is None), None)
    if newest is None:
        _say(f"the command ended with code {code}; no complete snapshot of it is held")
    else:
        _say(
            f"the command ended with code {code}; snapshot {newest.id} is held, and the same command continues from it"
        )


def _say(text: str) -> None:
    click.echo(f"holdfast run: {text}", err=True)
