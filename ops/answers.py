"""Which agents a command asks, what they answer, and how that is shown: what ``status``, ``ls`` and ``inspect`` share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import click

from ..agent import wire_pb2 as wire
from ..agent.client import AgentClient
from ..agent.settings import NodeSettings, check_owner
from ..errors import AgentError, AgentUnreachable, ConfigError, DeadlinePassed, HoldfastError
from ..snapshot.record import SnapshotId

if TYPE_CHECKING:
    from rich.console import Console

_HOST_AND_PORT: Final = re.compile(r"[^/]+:\d{1,5}")
_UNLIMITED_WIDTH: Final = 500  # columns, where no terminal limits them: a line in a log must not be cut
_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def asking(command: _Command) -> _Command:
    """The options by which one says which agents to ask, and ``--json``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object; docs/cli.md names its keys."),
        click.option("--job", help="Ask this job's agent on this node."),
        click.option(
            "--agent", "agents", metavar="ADDRESS", multiple=True,
            help="Ask the agent at this Unix socket or host:port; may be repeated. Default: HOLDFAST_AGENT, HOLDFAST_SHM "
            "or HOLDFAST_JOB where one is set, else every agent of yours on this node.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


# -- which agents -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """The agents to ask. ``named``: somebody asked for these, so silence is a failure; otherwise they were found."""

    addresses: tuple[str, ...]
    named: bool


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


def connect(address: str) -> AgentClient:
    """A client of the agent at *address*.

    Raises:
        AgentUnreachable: there is no such socket.
        AgentUntrusted: the socket belongs to somebody else.
    """
    if not address.startswith("/"):
        return AgentClient(address)
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
    """What the agent at *address* said."""

    address: str
    answer: _T


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


def ask(asked: Asked, question: Callable[[AgentClient], _T]) -> Answers[_T]:
    """Put *question* to each agent.

    An agent that does not answer is an answer too, unless somebody named these agents and none of them answers: then its
    error is raised.
    """
    given: list[Answered[_T]] = []
    silent: list[Silent] = []
    for address in asked.addresses:
        try:
            with connect(address) as client:
                given.append(Answered(address, question(client)))
        except (AgentError, DeadlinePassed) as error:
            silent.append(Silent(address, error))
    if asked.named and not given:
        raise silent[0].error
    return Answers(tuple(given), tuple(silent))


@dataclass(frozen=True, slots=True)
class Copy:
    """One image, and the address of the agent that holds it."""

    address: str
    agent: str
    image: wire.Image


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All images of one snapshot that were found, by rank. Never empty."""

    job: str
    id: SnapshotId
    copies: tuple[Copy, ...]

    @property
    def world(self) -> int:
        """How many ranks the snapshot was taken of."""
        return self.copies[0].image.world

    @property
    def ranks(self) -> list[int]:
        """The ranks whose image is held, in order."""
        return sorted({copy.image.rank for copy in self.copies})

    @property
    def complete(self) -> bool:
        """Whether an image of every rank is held."""
        return self.ranks == list(range(self.world))


Holdings = tuple[wire.StatusReport, wire.ImageList]


def holdings(client: AgentClient) -> Holdings:
    """The question for which snapshots an agent holds, and for which job."""
    return client.status(), client.inventory()


def snapshots(given: Iterable[Answered[Holdings]]) -> list[Snapshot]:
    """The snapshots held, by job, then newest first."""
    found: dict[tuple[str, SnapshotId], list[Copy]] = {}
    for answered in given:
        report, images = answered.answer
        for image in images.images:
            id = SnapshotId(image.generation, image.step, image.run)
            found.setdefault((report.job, id), []).append(Copy(answered.address, report.agent, image))
    newest_first = sorted(found.items(), key=lambda entry: entry[0][1], reverse=True)
    return [
        Snapshot(job, id, tuple(sorted(copies, key=lambda copy: copy.image.rank)))
        for (job, id), copies in sorted(newest_first, key=lambda entry: entry[0][0])
    ]


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
