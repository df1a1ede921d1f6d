"""What is said for one snapshot does not depend on how many nodes there are."""

from __future__ import annotations

import pytest
from holdfast.tests.simulation.scale import GROUP_NODES, control_load


@pytest.mark.parametrize("agents", [64, 256])
def test_messages_per_node_and_snapshot_are_constant(agents: int) -> None:
    """Groups are of eight: each node offers its image to seven others, and asks each of them for theirs."""
    few, many = control_load(16), control_load(agents)
    assert few.messages == {"offer": 7, "grant": 7, "copied": 1, "prepared": 1, "guarded": 1}
    assert many.messages == few.messages
    assert few.calls == 2 * (GROUP_NODES - 1)
    assert many.call_bytes <= 1.02 * few.call_bytes  # names grow with their numbers


def test_the_load_is_the_same_each_time() -> None:
    """And does not depend on how long things happen to take."""
    assert control_load(16) == control_load(16) == control_load(16, seed=2)
