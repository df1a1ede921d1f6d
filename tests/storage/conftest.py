"""A real S3 server for the tests that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from holdfast.tests.storage.weed import Weed


@pytest.fixture(scope="session")
def weed() -> Iterator[Weed]:
    """The server, running, for all tests of this process. Who stops it has to start it again."""
    with Weed() as server:
        yield server


@pytest.fixture
def s3(weed: Weed, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place there; the environment says how to get to it."""
    for name, value in weed.environment.items():
        monkeypatch.setenv(name, value)
    return weed.folder()
