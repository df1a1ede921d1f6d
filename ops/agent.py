"""``holdfast agent``: the daemon of one job on one node."""

from __future__ import annotations

import os
import platform
import sys

import click
from click.core import ParameterSource

from .._version import __version__
from ..agent.daemon import DaemonOptions, configure_logging, run
from ..agent.launch import detach
from ..agent.settings import NodeSettings, prepare_folder
from ..agent.trust import Trust
from ..errors import ConfigError
from .quantity import BYTES, SECONDS


@click.command
@click.option("--job", envvar="HOLDFAST_JOB", help="Name of the job, the same over all its restarts.")
@click.option("--shm", envvar="HOLDFAST_SHM", help="Folder of shared memory. Default: /dev/shm/holdfast-<uid>/<job>")
@click.option("--socket", help="Unix socket for trainers. Default: agent.sock in the shared-memory folder")
@click.option("--listen", default="127.0.0.1:0", show_default=True, help="Address for questions; port 0 picks one.")
@click.option("--name", default=platform.node, show_default="host name", help="What this agent calls itself.")
@click.option(
    "--domain",
    "domains",
    multiple=True,
    metavar="LEVEL=NAME",
    help="A failure domain of this node, from wide to narrow, like rack=r1; may be repeated. The host is implied.",
)
@click.option("--tls-ca", type=click.Path(), envvar="HOLDFAST_TLS_CA", help="Certificate of the CA of all agents.")
@click.option("--tls-cert", type=click.Path(), envvar="HOLDFAST_TLS_CERT", help="Certificate of this agent.")
@click.option("--tls-key", type=click.Path(), envvar="HOLDFAST_TLS_KEY", help="Key of that certificate.")
@click.option(
    "--net-limit", type=BYTES, envvar="HOLDFAST_NET_LIMIT", help="Most bytes per second to send to peers, like 2GiB."
)
@click.option(
    "--memory-limit", type=BYTES, envvar="HOLDFAST_MEMORY_LIMIT", help="Most shared memory for snapshots, like 64GiB."
)
@click.option(
    "--idle-exit", type=SECONDS, default="5m", show_default=True, envvar="HOLDFAST_IDLE_EXIT",
    help="End after this time with no trainer and no snapshot that matters; 'never' to stay.",
)  # fmt: skip
@click.option(
    "--keep", type=SECONDS, default="24h", show_default=True, envvar="HOLDFAST_KEEP",
    help="How long snapshots matter whose trainers died and did not come back; 'never' to drop no snapshot.",
)  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--detach", "detached", is_flag=True, help="Go on in the background once ready; log to agent.log.")
def agent(
    job: str | None,
    shm: str | None,
    socket: str | None,
    listen: str,
    name: str,
    domains: tuple[str, ...],
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    net_limit: int | None,
    memory_limit: int | None,
    idle_exit: float | None,
    keep: float | None,
    log_format: str,
    detached: bool,
) -> None:
    """Run this node's agent in the foreground.

    It prints one ready line to standard output, logs to standard error, and ends on SIGTERM; snapshots stay in shared
    memory for the next agent.
    """
    settings = NodeSettings.read(os.environ, job=job, shm=shm, socket=socket)
    if detached:
        prepare_folder(settings.shm)
        code = detach(str(settings.shm / "agent.log"))
        if code is not None:
            sys.exit(code)
    configure_logging(log_format)
    options = DaemonOptions(
        name,
        listen,
        domains=tuple(_domain(text) for text in domains),
        trust=Trust.read(tls_ca, tls_cert, tls_key),
        net_limit_bytes_s=net_limit,
        memory_limit_bytes=memory_limit,
        idle_exit_s=idle_exit,
        keep_s=keep,
        flags=_flags(click.get_current_context()),
    )
    run(settings, options, __version__, detached=detached)


def _flags(context: click.Context) -> tuple[str, ...]:
    """The options that were given, as they would be given again; not those that say where, or how this process runs."""
    where = {"job", "shm", "socket", "detached", "log_format"}
    flags: list[str] = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in where or source is ParameterSource.DEFAULT:
            continue
        value = context.params[parameter.name or ""]
        said = value if isinstance(value, tuple) else (value,)
        flags += [word for one in said for word in (parameter.opts[0], _as_given(one))]
    return tuple(flags)


def _as_given(value: object) -> str:
    """An option's value in the words of its type: durations and sizes are read as plain seconds and bytes."""
    return "never" if value is None else str(value)


def _domain(text: str) -> tuple[str, str]:
    level, equals, name = text.partition("=")
    if not (level and equals and name):
        raise ConfigError(f"--domain {text!r}: LEVEL=NAME is needed, like rack=r1")
    return level, name
