"""How far a long command is, on standard error, where that is a terminal; and what it went around, wherever it is."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

from .answers import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """A bar of bytes. A context manager; without a terminal it shows nothing, and its methods still work."""

    def __init__(self, what: str, total_bytes: int | None = None) -> None:
        self._what, self._total = what, total_bytes
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as Speed

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(True),
                Speed(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=Console(stderr=True, markup=False), transient=True)
            self._task = self._progress.add_task(printable(self._what), total=self._total)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, nbytes: int) -> None:
        """So many more bytes are done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, nbytes)

    def expect(self, nbytes: int) -> None:
        """So many more bytes are to be done than was known."""
        self._total = (self._total or 0) + nbytes
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=self._total)


class Notes:
    """Says on standard error what did not work and was gone around; the same only once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        """Say it."""
        if text not in self._said:
            self._said.add(text)
            click.echo(printable(text), err=True)
