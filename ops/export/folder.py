"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigError, TierFull


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new, empty folder, to be filled; it is called *target* once that has succeeded and everything in it is durable.

    Killed before that, it leaves a folder ``.<name>.<uuid>.partial`` beside *target*, and nothing of that name.

    Raises:
        ConfigError: *target* is there already, and is no empty folder; or cannot be made.
        TierFull: the disk is full.
    """
    target = target.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ConfigError(f"{target} is there already; --to needs a folder that is new or empty")
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        folder.mkdir(parents=True)
        try:
            yield folder
            _sync(folder)
            folder.rename(target)  # over an empty folder too
            _sync_one(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        kind = TierFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"cannot write {target}: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync_one(Path(path, name))
        _sync_one(Path(path))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
