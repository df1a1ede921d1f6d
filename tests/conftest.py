"""What holds for all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# How long one example takes says nothing on a machine that has other things to do.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of the processes that share the tests begins with as many slow ones as the others, and none ends with them.

    ``--dist worksteal`` gives the first an equal part of the list from its beginning, and so on; who is through takes from
    the ends of the others' parts. Tests of one module stay together, since they share agents.
    """
    parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if parts == 1:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    size = -(-len(items) // parts)
    items.clear()
    for part in range(parts):
        mine = slow[part::parts]
        room = max(0, size - len(mine))
        items += [*mine, *fast[:room]]
        del fast[:room]
    items += fast
