"""Where a job's agent lives on this node. Read from the environment once, at the edge, and passed down."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import AgentUntrusted, ConfigError

PROTOCOL: Final = 2
_JOB: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SOCKET_PATH_LIMIT: Final = 107  # sun_path of a Unix socket, less the final zero


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The job and its place on this node.

    Attributes:
        job: name of the job, the same over all its restarts and on all its nodes.
        shm: the job's folder of shared memory on this node.
        socket: the agent's Unix socket.
        autostart: whether a trainer that finds no agent starts one.
    """

    job: str
    shm: Path
    socket: Path
    autostart: bool

    @classmethod
    def read(
        cls,
        environment: Mapping[str, str],
        *,
        job: str | None = None,
        shm: str | None = None,
        socket: str | None = None,
        script: str | None = None,
    ) -> NodeSettings:
        """From explicit values first, then the environment, then defaults.

        ``HOLDFAST_JOB`` names the job; without it, ``SLURM_JOB_ID``; without that, a name derived from *script* (default:
        the running program's path) and the working directory, so that a restarted script finds its snapshots and another
        script does not. ``HOLDFAST_SHM`` is the folder, by default ``/dev/shm/holdfast-<uid>/<job>``. ``HOLDFAST_AGENT``
        is the socket of an agent that is managed elsewhere: then none is started here.

        Raises:
            ConfigError: a name or path that cannot be used.
        """
        name = job or environment.get("HOLDFAST_JOB") or environment.get("SLURM_JOB_ID") or default_job(script)
        if not _JOB.fullmatch(name):
            raise ConfigError(f"job name {name!r}: 1 to 64 letters, digits, '.', '_' or '-' are needed (HOLDFAST_JOB)")
        folder = Path(shm or environment.get("HOLDFAST_SHM") or f"/dev/shm/holdfast-{os.getuid()}/{name}").absolute()
        given = socket or environment.get("HOLDFAST_AGENT")
        path = Path(given.removeprefix("unix:")).absolute() if given else folder / "agent.sock"
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
            raise ConfigError(
                f"socket path {path} has {len(os.fsencode(path))} bytes, at most {_SOCKET_PATH_LIMIT} can be bound; "
                f"choose a shorter HOLDFAST_SHM or --socket"
            )
        return cls(name, folder, path, autostart=given is None)


def default_job(script: str | None = None) -> str:
    """A name for the program that runs: the same whenever it is started the same way from the same folder."""
    program = Path(script or sys.argv[0] or "python").absolute()
    digest = hashlib.sha256(os.fsencode(f"{program}\0{Path.cwd()}")).hexdigest()[:8]
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", program.stem).strip("-_")[:48] or "job"
    return f"{stem}-{digest}"


def job_hash(job: str) -> int:
    """What records carry of a job's name."""
    return int.from_bytes(hashlib.sha256(job.encode()).digest()[:8], "little")


def remember(settings: NodeSettings, listen: str, flags: Sequence[str]) -> None:
    """Note where this agent listens and how it was started, for its successor, whoever starts that."""
    path = settings.shm / "agent.json"
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps({"listen": listen, "flags": list(flags)}))
    fresh.replace(path)


def remembered(settings: NodeSettings) -> dict[str, Any]:
    """What the agent before noted; nothing if there was none, or it cannot be read."""
    try:
        noted = json.loads((settings.shm / "agent.json").read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def machine() -> str:
    """Which machine this is, as long as it runs: on another one, this one's loopback addresses mean something else."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def pid_namespace() -> str:
    """In which namespace this process's pids have their meaning; an agent may run in another container."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def prepare_folder(folder: Path) -> None:
    """Make the shared-memory folder, for this user alone.

    Raises:
        AgentUntrusted: it belongs to somebody else, or is a link, or others may enter it.
        ConfigError: it cannot be made.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the shared-memory folder {folder}: {error.strerror} (HOLDFAST_SHM)") from error
    if (above := folder.parent.stat().st_uid) not in (0, os.getuid()):
        raise AgentUntrusted(
            f"{folder.parent} belongs to uid {above}, who could put another folder in the place of {folder}"
        )
    check_owner(folder)
    if (mode := folder.stat().st_mode & 0o777) & 0o077:
        raise AgentUntrusted(f"{folder} has mode {mode:o}: others may enter it; 700 is needed")


def check_owner(path: Path) -> None:
    """Raise ``AgentUntrusted`` unless *path* itself (not what it links to) belongs to this user."""
    stat = path.lstat()
    if stat.st_uid != os.getuid():
        raise AgentUntrusted(f"{path} belongs to uid {stat.st_uid}, not to uid {os.getuid()} who runs this")
    if path.is_symlink():
        raise AgentUntrusted(f"{path} is a symbolic link; a folder or socket of our own is needed")
