"""Follows the layout of the live state: notices when it changes, agrees with the replicas, ties it to live tensors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..errors import DeadlinePassed, HoldfastError
from ..snapshot.arena import Slot
from ..snapshot.capture import Binding, bind, rebound
from ..snapshot.layout import Layout
from ..snapshot.partition import share
from ..snapshot.replicas import confirmed, sums
from ..snapshot.state import Survey
from .ranks import Pending, Ranks

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)  # of layouts; an agent knows them by their numbers, whichever binder made them
# A tensor that was mutated in the window so often is copied eagerly from then on (design: twice).
_TORN_LIMIT = 2
# A state whose tensors were exchanged so often is looked at before every copy from then on.
_CHANGE_LIMIT = 2


class Captured(Protocol):
    """What a Checkpointer captures, whatever it is made of. A ``TrainingState`` is one, and can be restored besides."""

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Those whose steps are fenced."""
        ...

    @property
    def shuffles(self) -> bool:
        """As ``TrainingState.shuffles``."""
        ...

    def survey(self) -> Survey:
        """Find every tensor. Raises ``StateRefused``."""
        ...

    def size(self) -> int:
        """Changes when tensors appear; cheap."""
        ...

    def unchanged(self, survey: Survey) -> bool:
        """Whether *survey* still finds the very same tensor objects."""
        ...

    def own_values(self, survey: Survey) -> dict[str, Any]:
        """Everything that is no tensor of *survey*, but for the global random generators; a tree for ``eager.Values``."""
        ...


class Binder:
    """This rank's current binding, and the agreement that a new one needs.

    A layout depends on what the replicas confirm, so making one takes a collective exchange (``begin``, ``finish``).
    As long as only addresses change, the binding is renewed locally.
    """

    def __init__(self, state: Captured, ranks: Ranks) -> None:
        self._state = state
        self._ranks = ranks
        self._binding: Binding | None = None
        self._exchange: tuple[Survey | None, Pending[list[list[int]]]] | None = None
        self._torn: dict[str, int] = {}
        self._stale = False
        self._suspect = state.shuffles
        self._changes = 0
        self._shared: frozenset[str] = frozenset()
        self._doubted: set[str] = set()  # frozen, and written all the same, without a count

    @property
    def pending(self) -> bool:
        """Whether an exchange is under way."""
        return self._exchange is not None

    @property
    def started(self) -> bool:
        """Whether a layout was ever asked for."""
        return self._binding is not None or self.pending or self._stale

    @property
    def text_bytes(self) -> int:
        """Length of the layout's text; 0 while there is none."""
        return 0 if self._binding is None else len(self._binding.text)

    def begin(self, when: int) -> None:
        """Survey the state and begin the exchange. Collective; reads all bytes that are shared with replicas.

        *when* counts the steps: a rank that comes to this late describes another state, and all must try again.

        Raises ``StateRefused`` after having taken part with nothing to share: the other ranks count on an answer.
        """
        try:
            survey = self._state.survey()
        except HoldfastError:
            self._exchange = (None, self._ranks.exchange(sums((), when)))
            raise
        self._exchange = (survey, self._ranks.exchange(sums(survey.items, when)))

    def finish(self, timeout_s: float) -> bool:
        """Make the layout if the exchange ends in time; True if none is pending any more."""
        if self._exchange is None:
            return True
        self._stale = False
        survey, pending = self._exchange
        gathered = pending.result(timeout_s)
        if gathered is None:
            return False
        self._exchange = None
        if survey is None or len({vector[0] for vector in gathered}) > 1:
            self._binding, self._stale = None, True
            return True
        held, split = confirmed([item.slice for item in survey.items], gathered, self._ranks.rank)
        for members in split:
            _log.warning("ranks %s should hold the same bytes and do not; each keeps its own copy", list(members))
        everyone = tuple(range(self._ranks.world))
        self._shared = frozenset(piece.name for piece in held if piece.members == everyone)
        # What may stand still comes first: then most blocks of the image hold nothing else, and need not be looked at again.
        frozen = {item.slice.name for item in survey.items if item.frozen}
        mine = sorted(share(held, self._ranks.rank), key=lambda piece: piece.name not in frozen)
        self._bind(Layout.of(next(_numbers), mine), survey)
        return True

    def adopt(self, survey: Survey) -> None:
        """Lay out *survey* as it is: nothing in it is shared with other ranks, and on its grids they have agreed already."""
        self._exchange, self._stale, self._shared = None, False, frozenset()
        pieces = [item.slice for item in survey.items]
        self._bind(Layout.of(next(_numbers), share(pieces, self._ranks.rank)), survey)

    def first(self, timeout_s: float) -> None:
        """The first layout of a run, with all ranks waiting for each other. Raises ``DeadlinePassed``."""
        if not self.started:
            self.begin(0)
        if not self.finish(timeout_s):
            raise DeadlinePassed(f"not all {self._ranks.world} ranks described their state within {timeout_s:g} s")

    @property
    def stale(self) -> bool:
        """Whether a snapshot failed because the structure had changed, and no new layout is under way yet."""
        return self._stale and not self.pending

    def current(self) -> Binding | None:
        """The binding; None if the state needs a new layout first.

        It is taken to be true to the live tensors without looking, as long as that has proved right: looking costs the
        training thread a third of a millisecond per thousand tensors, and ``still_true`` looks from the copying thread.
        """
        if not self.finish(0.0) or self._binding is None:
            return None
        if not self._suspect and self._state.size() == self._binding.survey.size:
            return self._binding
        if not self._state.unchanged(self._binding.survey) or rebound(self._binding):
            survey = self._state.survey()
            if [i.slice for i in survey.items] != [i.slice for i in self._binding.survey.items]:
                self._stale = True
                return None
            self._bind(self._binding.layout, survey)
        self._suspect = self._state.shuffles or self._changes >= _CHANGE_LIMIT
        return self._binding

    def still_true(self, binding: Binding) -> bool:
        """Whether *binding* names the tensors that train now. May be asked from another thread while they train."""
        if self._suspect:
            return True  # it was looked at before the copy, which is all there is to know
        try:
            return self._state.unchanged(binding.survey) and not rebound(binding)
        except RuntimeError:  # a dictionary changed while it was being read
            return False

    def note_changed(self) -> None:
        """``still_true`` said no: look before the next copy, and always if it happens again."""
        self._changes += 1
        self._suspect = True

    def _bind(self, layout: Layout, survey: Survey) -> None:
        self._binding = bind(layout, survey, self._eager_names(), sorted(self._shared), self._doubted)

    def note_torn(self, names: list[str]) -> None:
        """Count tensors that were mutated in the window; those that make a habit of it become eager."""
        for name in names:
            self._torn[name] = self._torn.get(name, 0) + 1
            if self._torn[name] == _TORN_LIMIT:
                _log.warning(
                    "%s was mutated %d times while being copied; from now on it is copied eagerly", name, _TORN_LIMIT
                )
        if self._binding is not None and self._eager_names() & set(self._binding.names):
            self._bind(self._binding.layout, self._binding.survey)

    def forget(self) -> None:
        """The state was replaced (restore): start over."""
        self._binding = None
        self._exchange = None
        self._stale = False

    def forget_slot(self, slot: Slot) -> None:
        """Let go of the views into a slot's memory."""
        if self._binding is not None:
            self._binding.lazy.forget(slot)
            self._binding.eager.forget(slot)

    def _eager_names(self) -> set[str]:
        return {name for name, count in self._torn.items() if count >= _TORN_LIMIT}
