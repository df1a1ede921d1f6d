"""Values are those of the moment at which they were taken, whenever and wherever they are encoded and written."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from holdfast.errors import StateRefused
from holdfast.snapshot.codec import decode
from holdfast.snapshot.eager import Values
from holdfast.snapshot.state import TrainingState, from_leaf
from torch import nn


def _state(extra: dict[str, Any]) -> TrainingState:
    model = nn.Linear(2, 2)
    return TrainingState({"": model}, {"": torch.optim.SGD(model.parameters(), lr=0.5)}, {"extra": extra})


def _written(values: Values, tail: npt.NDArray[np.uint8]) -> Any:
    assert values.encode() <= len(tail)
    values.write(tail)
    return decode(tail, from_leaf)


@pytest.mark.parametrize("numbers", [10, 1_000_000], ids=["copied", "written at once"])
def test_what_changes_after_the_release_is_not_seen(numbers: int) -> None:
    live = {"log": [1, 2], "array": np.arange(numbers), "tensor": torch.arange(numbers)}
    state = _state(live)
    values = Values(state, state.survey(), text_bytes=100)
    tail = np.full(values.nbytes + 1000, 0xAA, np.uint8)
    drawn = random.getstate()[1], np.random.get_state(legacy=False)["state"]["pos"], torch.get_rng_state()
    values.release(tail)
    live["log"].append(3)  # type: ignore[attr-defined]
    live["array"][:] = 0  # type: ignore[index]
    live["tensor"].zero_()  # type: ignore[attr-defined]
    random.random(), np.random.random(), torch.rand(1)
    found = _written(values, tail)
    extra, rng = found["extras"]["extra"], found["rng"]
    assert extra["log"] == [1, 2]
    assert np.array_equal(extra["array"], np.arange(numbers))
    assert torch.equal(extra["tensor"], torch.arange(numbers))
    assert (tuple(rng["python"][1].tolist()), rng["numpy"]["state"]["pos"]) == drawn[:2]
    assert np.array_equal(rng["torch"], drawn[2].numpy())


def test_how_long_they_are_is_known_before_they_are_encoded() -> None:
    state = _state({"a": b"x" * 1000, "b": list(range(500))})
    survey = state.survey()
    exact = Values(state, survey, 0)
    later = Values(state, survey, exact.text_bytes)
    assert later.nbytes >= exact.nbytes == later.encode() == later.nbytes


def test_what_cannot_be_encoded_is_refused_when_it_is_taken() -> None:
    state = _state({"deep": [1, {"sock": object()}]})
    with pytest.raises(StateRefused, match=r"state\['extras'\]\['extra'\]\['deep'\]\[1\]\['sock'\]: <object"):
        Values(state, state.survey(), text_bytes=100)
