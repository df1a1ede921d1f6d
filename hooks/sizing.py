"""What a training loop's objects make together, and how much room their snapshots need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from ..agent.client import LAYOUT_BYTES_LIMIT
from ..errors import StateRefused
from ..snapshot.codec import encode
from ..snapshot.record import table_bytes_for
from ..snapshot.state import TrainingState, to_leaf

_ROOM_BYTES: Final = 256 << 10  # in every image, for values that grow
_ENTRY_BYTES: Final = 120  # of one slice in a layout text, without its name
_VALUES_ROOM: Final = 1.5  # values may grow to so many times their first size before a slot has to grow


def too_many_tensors(text_bytes: int) -> StateRefused | None:
    """The refusal of a state whose layout text takes so many bytes, if agents could not tell each other of it."""
    if text_bytes <= LAYOUT_BYTES_LIMIT:
        return None
    return StateRefused(
        f"the state has so many tensors that to list them takes {text_bytes} bytes, and {LAYOUT_BYTES_LIMIT} are the limit"
    )


def by_name(given: Any) -> dict[str, Any]:
    """One object under the name "", several under their own."""
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) and not isinstance(given, nn.Module) else {"": given}


def look_through(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, Any], extras: Mapping[str, Any]
) -> tuple[TrainingState, int, int]:
    """The state, and how large its slots' image and tables should be. Raises ``StateRefused``."""
    state = TrainingState(models, optimizers, extras)
    values = encode(state.values(state.survey()), "state", to_leaf)
    image_bytes = state.predicted_bytes() + int(values.nbytes * _VALUES_ROOM) + _ROOM_BYTES
    names = sum(len(item.slice.name) + _ENTRY_BYTES for item in state.survey().items)
    if (refusal := too_many_tensors(names)) is not None:
        raise refusal
    # Optimizer state adds a few tensors per parameter, under longer names.
    return state, image_bytes, table_bytes_for(image_bytes, 6 * names)
