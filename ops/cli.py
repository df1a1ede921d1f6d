"""The command ``holdfast``. Each command lives in a module of its own, loaded only when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import click

from .._version import __version__
from ..errors import HoldfastError

_COMMANDS: Final = {
    "agent": (".agent", "agent", "Run this node's agent in the foreground."),
    "certs": (".certs", "certs", "Make a private CA and certificates for agents."),
    "copy": (".copy", "copy", "Copy snapshots into a tier."),
    "demo": (".demo.command", "demo", "Train, kill, restart, and prove that nothing was lost."),
    "diff": (".diff", "diff", "Compare two snapshots: which tensors differ, and by how much."),
    "inspect": (".inspect", "inspect", "Show the tensors of one snapshot."),
    "ls": (".ls", "ls", "List the snapshots that are held, in memory or in tiers."),
    "prune": (".prune", "prune", "Remove from tiers what need not be kept."),
    "restore": (".restore", "restore", "Write a snapshot as zarr, safetensors, torch or DCP files."),
    "run": (".run", "run", "Start an agent, run a training command, pass signals and exit code on."),
    "spill": (".spill", "spill", "Have the next snapshot written to the tiers now."),
    "status": (".status", "status", "Show agents, trainers, slots, and what was skipped and why."),
    "verify": (".verify", "verify", "Read everything and compare it with its checksums; repair it."),
}


class _Lazy(click.Group):
    """Knows every command's name and summary, imports only the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module, __package__), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in sorted(_COMMANDS.items())])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="holdfast")
def group() -> None:
    """Keeps a distributed training job's state alive.

    Exit codes: 0 success, 1 failure, 2 wrong usage; one code for each kind of failure that a script might act on is
    listed in docs/cli.md.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors of ours become one line and their exit code."""
    try:
        group.main(arguments, prog_name="holdfast")
    except HoldfastError as error:
        click.echo(f"holdfast: {error}", err=True)
        click.echo(f"holdfast: {type(error).__name__}; remedy: {error.remedy.value}", err=True)
        sys.exit(error.exit_code)
