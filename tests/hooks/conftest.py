"""Nodes that clean up after themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from holdfast.tests.hooks.nodes import Node


@pytest.fixture
def node() -> Iterator[Node]:
    """A node of its own, without an agent yet."""
    node = Node()
    yield node
    node.remove()


@pytest.fixture(scope="module")
def _shared() -> Iterator[Node]:
    node = Node()
    node.start("--idle-exit", "never")
    yield node
    node.remove()


@pytest.fixture
def shared(_shared: Node) -> Iterator[Node]:
    """A node whose agent runs already, holding nothing. One agent serves all tests of a module."""
    yield _shared
    _shared.wipe()
