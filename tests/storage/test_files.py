"""Stores of files: the contract, and what files have of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.tests.storage.contract import StoreContract


class TestOnDisk(StoreContract):
    """A folder of a file system with a device."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/made/by/it"


class TestInMemory(StoreContract):
    """A folder of a file system without one."""

    @pytest.fixture
    def url(self) -> Iterator[str]:
        folder = tempfile.mkdtemp(dir="/dev/shm")
        yield folder
        shutil.rmtree(folder)
