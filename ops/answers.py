"""Which agents a command asks, what they answer, and how that is shown: what ``status``, ``ls`` and ``inspect`` share."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import click

from ..agent import wire_pb2 as wire
from ..agent.client import AgentClient
from ..agent.settings import NodeSettings, check_owner
from ..agent.trust import Trust
from ..errors import (
    AgentError,
    AgentMismatch,
    AgentUnreachable,
    AgentUntrusted,
    ConfigError,
    DeadlinePassed,
    HoldfastError,
)

if TYPE_CHECKING:
    from rich.console import Console

_HOST_AND_PORT: Final = re.compile(r"[^/]+:\d{1,5}")
_UNLIMITED_WIDTH: Final = 500  # columns, where no terminal limits them: a line in a log must not be cut
_AT_ONCE: Final = 32  # agents that are asked side by side
_T = TypeVar("_T")


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """The options by which one says which agents to ask, and ``--json``. *command* is given ``asked`` and ``as_json``."""

    @functools.wraps(command)
    def call(
        *,
        agents: tuple[str, ...],
        job: str | None,
        tls_ca: str | None,
        tls_cert: str | None,
        tls_key: str | None,
        **others: Any,
    ) -> None:
        asked = whom(agents, job, os.environ)
        command(asked=replace(asked, trust=Trust.read(tls_ca, tls_cert, tls_key)), **others)

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object; docs/cli.md names its keys."),
        click.option("--tls-key", type=click.Path(), envvar="HOLDFAST_TLS_KEY", help="Key of that certificate."),
        click.option("--tls-cert", type=click.Path(), envvar="HOLDFAST_TLS_CERT", help="Certificate to show them."),
        click.option(
            "--tls-ca", type=click.Path(), envvar="HOLDFAST_TLS_CA",
            help="Certificate of the CA of all agents, if they ask for certificates.",
        ),
        click.option("--job", help="Ask this job's agent on this node."),
        click.option(
            "--agent", "agents", metavar="ADDRESS", multiple=True,
            help="Ask the agent at this Unix socket or host:port; may be repeated. Default: HOLDFAST_AGENT, HOLDFAST_SHM "
            "or HOLDFAST_JOB where one is set, else every agent of yours on this node. All other agents of their jobs are "
            "asked too.",
        ),
    ):  # fmt: skip
        call = option(call)
    return call


# -- which agents -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """The agents to ask. ``named``: somebody asked for these, so silence is a failure; otherwise they were found.

    ``trust``: certificates for those that ask for them.
    """

    addresses: tuple[str, ...]
    named: bool
    trust: Trust | None = None


def whom(agents: Sequence[str], job: str | None, environment: Mapping[str, str]) -> Asked:
    """The agents that the options name, else those that *environment* names, else all of this user on this node.

    Raises:
        ConfigError: both *agents* and *job*, or something that is no address.
    """
    if agents and job:
        raise ConfigError("--agent and --job each name agents; give one of them")
    if agents:
        return Asked(tuple(dict.fromkeys(map(_address, agents))), named=True)
    if job:  # an explicit job wins over whatever the environment says
        return Asked((str(NodeSettings.read({}, job=job).socket),), named=True)
    if managed := environment.get("HOLDFAST_AGENT"):
        return Asked((_address(managed),), named=True)
    if environment.get("HOLDFAST_SHM") or environment.get("HOLDFAST_JOB"):
        return Asked((str(NodeSettings.read(environment).socket),), named=True)
    return Asked(tuple(map(str, sorted(_jobs_folder().glob("*/agent.sock")))), named=False)


def _jobs_folder() -> Path:
    """Where this user's jobs have their folders unless told otherwise."""
    return NodeSettings.read({}, job="any").shm.parent


def _address(text: str) -> str:
    """``host:port``, or the absolute path of a socket."""
    if text.startswith("agent://"):
        text = text.removeprefix("agent://").rstrip("/")
        if _HOST_AND_PORT.fullmatch(text):
            return text
    elif _HOST_AND_PORT.fullmatch(text) and not text.startswith("unix:"):
        return text
    elif path := text.removeprefix("unix:"):
        return str(Path(path).absolute())
    raise ConfigError(f"{text!r} is no agent's address: the path of its Unix socket or host:port is needed")


def connect(address: str, trust: Trust | None = None) -> AgentClient:
    """A client of the agent at *address*; *trust* is of no use over a Unix socket.

    Raises:
        AgentUnreachable: there is no such socket.
        AgentUntrusted: the socket belongs to somebody else.
    """
    if not address.startswith("/"):
        return AgentClient(address, trust)
    try:
        check_owner(Path(address))
    except FileNotFoundError as error:
        raise AgentUnreachable(f"no agent: {address} does not exist") from error
    except OSError as error:
        raise AgentUnreachable(f"no agent: {address}: {error.strerror}") from error
    return AgentClient(f"unix:{address}")


# -- what they answer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered(Generic[_T]):
    """What the agent at *address* said. ``directly``: it was asked for; otherwise another agent of its job knew of it."""

    address: str
    answer: _T
    directly: bool = True


@dataclass(frozen=True, slots=True)
class Silent:
    """The agent at *address* said nothing, and why."""

    address: str
    error: HoldfastError


@dataclass(frozen=True, slots=True)
class Answers(Generic[_T]):
    """Who answered and who did not, each in the order in which they were asked."""

    given: tuple[Answered[_T], ...]
    silent: tuple[Silent, ...]


def ask(asked: Asked, question: Callable[[AgentClient], _T], report: Callable[[_T], wire.StatusReport]) -> Answers[_T]:
    """Put *question* to each agent, and to all others of their jobs, which these know of.

    An agent that does not answer is an answer too, unless somebody named these agents and none of them answers: then its
    error is raised. *report* is the status report in an answer.
    """
    first = _put(asked.addresses, asked.trust, question)
    given, silent = list(first.given), list(first.silent)
    if asked.named and not given:
        raise silent[0].error
    told = {*asked.addresses, *(report(answered.answer).listen for answered in given)}
    while unknown := {peer: r for r in (report(a.answer) for a in given) for peer in r.peers if peer not in told}:
        told.update(unknown)
        found = _put([peer for peer, by in unknown.items() if asked.trust or not by.tls], asked.trust, question)
        for answered in found.given:
            if (job := report(answered.answer).job) == unknown[answered.address].job:
                given.append(replace(answered, directly=False))
            else:
                silent.append(Silent(answered.address, AgentMismatch(f"an agent of job {job!r} is there now")))
        silent += found.silent
        if not asked.trust:
            silent += [Silent(peer, AgentUntrusted(_NO_CERTIFICATE)) for peer, by in unknown.items() if by.tls]
    return Answers(tuple(given), tuple(silent))


_NO_CERTIFICATE: Final = "it asks for certificates: give --tls-ca, --tls-cert and --tls-key (HOLDFAST_TLS_*)"


def _put(addresses: Sequence[str], trust: Trust | None, question: Callable[[AgentClient], _T]) -> Answers[_T]:
    """Ask side by side; answers come in the order of *addresses*."""

    def one(address: str) -> Answered[_T] | Silent:
        try:
            with connect(address, trust) as client:
                return Answered(address, question(client))
        except (AgentError, DeadlinePassed) as error:
            return Silent(address, error)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(one, addresses))
    return Answers(
        tuple(answer for answer in answers if isinstance(answer, Answered)),
        tuple(answer for answer in answers if isinstance(answer, Silent)),
    )


# -- how it is shown --------------------------------------------------------------------------------------------------


def console() -> Console:
    """For tables on standard output. What is printed comes from others, so none of it is read as markup."""
    from rich.console import Console

    out = Console(markup=False, emoji=False, highlight=False)
    if not out.is_terminal:
        out.width = _UNLIMITED_WIDTH
    return out


def printable(text: str) -> str:
    """*text* without anything that could steer a terminal or cannot be encoded; it may come from anywhere."""
    return "".join(c if c.isprintable() else "?" for c in text)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON object, on one line."""
    click.echo(json.dumps(document))


def silent_json(silent: Iterable[Silent]) -> list[dict[str, str]]:
    """The agents that did not answer, for ``--json``."""
    return [{"address": s.address, "error": type(s.error).__name__, "reason": str(s.error)} for s in silent]


def tell_silent(silent: Iterable[Silent]) -> None:
    """Say on standard error who did not answer."""
    for one in silent:
        click.echo(f"not answering: {printable(one.address)} ({printable(str(one.error))})", err=True)
