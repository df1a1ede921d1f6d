"""What is no tensor of the state: taken on the training thread, encoded and written by another one.

Taking is a walk over what the live objects hand out; to make it JSON, sum it up and lay it out costs the training thread
as much again, and needs nothing that could change.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from .codec import ALIGNMENT, Draft, Encoded
from .state import Survey, to_leaf
from .streams import RandomState

# Live arrays of more than this together are written from where they lie, at once; fewer bytes are copied, and written later.
_COPIED_BYTES: Final = 256 << 10


class Valued(Protocol):
    """What has values besides its tensors, such as a ``TrainingState``."""

    def own_values(self, survey: Survey) -> dict[str, Any]:
        """All of them but the global random generators; parts may be live objects."""
        ...


class Values:
    """One snapshot's values, as they were when this was made.

    Attributes:
        nbytes: how long they are once they are encoded; until then, how long they are expected to be.
        text_bytes: what of that is text.
    """

    def __init__(self, state: Valued, survey: Survey, text_bytes: int) -> None:
        """*text_bytes*: of the snapshot before; 0 has all of it encoded now.

        Raises ``StateRefused`` if something cannot be encoded.
        """
        self._draft = Draft("state", to_leaf)
        for key, value in state.own_values(survey).items():
            self._draft.take(key, value)
        self._streams = RandomState()
        self._encoded: Encoded | None = None
        self._written = False
        if not text_bytes or self._draft.end > _COPIED_BYTES:
            self._encode()
        else:
            self.text_bytes = text_bytes
            self.nbytes = self._draft.end + self._streams.nbytes + text_bytes + ALIGNMENT

    def release(self, tail: npt.NDArray[np.uint8]) -> None:
        """After this, the live objects may change. *tail*: the image, from where the values go; of ``nbytes`` or more."""
        if self._encoded is not None:
            self._encoded.write_into(tail)
            self._written = True
        else:
            self._draft.own()

    def encode(self) -> int:
        """Encode them, on any thread, once; returns ``nbytes``, which is exact from here on."""
        if self._encoded is None:
            self._encode()
        return self.nbytes

    def write(self, tail: npt.NDArray[np.uint8]) -> None:
        """Have them in *tail*, which must be of ``nbytes`` or more. They are encoded already."""
        assert self._encoded is not None
        if not self._written:
            self._encoded.write_into(tail)

    def _encode(self) -> None:
        self._draft.take("rng", self._streams.tree())
        self._encoded = self._draft.encoded()
        self.text_bytes, self.nbytes = self._encoded.text_bytes, self._encoded.nbytes
