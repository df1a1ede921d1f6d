"""The training loop's side of Holdfast: one object, one call per step.

ckpt = holdfast.Checkpointer(model=model, optimizer=optimizer, extras={"scheduler": scheduler, "loader": loader})
start = ckpt.restore() or 0
for step in range(start, steps):
    ...                          # forward, backward
    optimizer.step()             # fenced by a hook
    ckpt.step(step + 1)          # returns at once
ckpt.close()
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from .._version import __version__
from ..agent import wire_pb2 as wire
from ..agent.settings import NodeSettings
from ..errors import HoldfastError, SnapshotSkipped, StateUnreachable
from ..snapshot.arena import Slot
from ..snapshot.beat import NONE, Agreed
from ..snapshot.capture import Capture, Copier, copier_for
from ..snapshot.eager import Values
from ..snapshot.record import SnapshotId, table_bytes_for
from ..snapshot.recovery import HeldParity, Relied, plan, prospects, relied_on
from ..snapshot.selection import Selection
from ..snapshot.state import TrainingState
from ..storage.tiers import Tier
from .arrivals import Arrivals, taken
from .binder import Binder, Captured
from .books import Books, report_restored
from .contract import Deadlines, State, Stats, Ticket
from .fencing import fence_before_step
from .found import Found, gather_inventories, together
from .holding import Holding
from .options import Options, natural
from .preemption import Ending, Notice
from .pulse import Pulse, Standing
from .ranks import Ranks, join
from .restore import Restorer
from .roster import gather_roster
from .sizing import by_name, look_through, too_many_tensors
from .spilling import Spilling

_log = logging.getLogger(__name__)
_REPORT_EVERY_S: Final = 0.5


@dataclass(slots=True)
class _Flight:
    """The snapshot whose window is open: begun, and not yet fenced."""

    id: SnapshotId
    capture: Capture


class Checkpointer:
    """Takes snapshots of a training job's state, and gives it back.

    With ``torch.distributed`` initialised, the constructor, ``restore``, ``step`` and ``snapshot`` are collective: every
    rank calls them in the same order. All methods belong to the training thread.

    After construction, trouble in taking snapshots never raises (unless *strict*): it is logged, counted in ``stats``,
    and the snapshot is skipped.
    """

    # What is captured, and how large its slots' image and tables should be; adapters capture something else.
    _look_through: ClassVar[Callable[..., tuple[Captured, int, int]]] = staticmethod(look_through)

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Any | Mapping[str, Any] | None = None,
        extras: Mapping[str, Any] | None = None,
        *,
        every: int | None = None,
        slots: int | None = None,
        protect: str | None = None,
        tiers: Sequence[Tier] | None = None,
        grace: str | float | None = None,
        config: str | Path | None = None,
        job: str | None = None,
        shm: str | None = None,
        agent: str | None = None,
        strict: bool = False,
        deadlines: Deadlines | None = None,
    ) -> None:
        """Attach this rank to its node's agent, and reserve memory for its snapshots.

        Args:
            model: the model, or several by name.
            optimizer: the optimizer, or several by name, such as one for each parameter that is stepped during backward. torch
                optimizers are fenced by a hook; for any other kind call ``fence`` before each of its steps.
            extras: whatever else makes up the state, by name: objects with ``state_dict`` and ``load_state_dict``,
                dicts and lists (restored in place), random generators.
            every: take a snapshot at each step that this divides; 1 by default.
            slots: images held per rank; 2, the default, suffice. With a third one, snapshots go on while one is spilled.
            protect: how many nodes may be lost with their memory: ``"4+2"`` any 2 of each group of about 6; ``"auto"``, the
                default, one of up to 5 nodes, else two of each group; ``"off"``.
            tiers: where snapshots are spilled to, nearest first; each says how often.
            grace: the time between a preemption notice (SIGTERM, SIGUSR1) and the kill, like ``"30s"``. With it, such a signal
                at any rank has all ranks take a last snapshot, persist it, and find ``should_stop`` true at the same step.
            config: a TOML file (``HOLDFAST_CONFIG``) that says the same; what is passed here comes first.
            job: name of the job, the same over all restarts (``HOLDFAST_JOB``).
            shm: folder of shared memory (``HOLDFAST_SHM``).
            agent: socket of an agent that runs already (``HOLDFAST_AGENT``); without it, one is started if needed.
            strict: raise on trouble instead of skipping the snapshot.
            deadlines: how long waits may take.

        Raises:
            StateRefused: something in the state cannot be captured; says what, by its path.
            BudgetExceeded: memory does not suffice; says how much is needed and available.
            AgentError: the agent cannot be reached, trusted, or is of another version or job.
            ConfigError, PeerFailed: a bad argument; another rank's failure.
        """
        options = Options.read(
            os.environ, config, job=job, every=every, slots=slots, protect=protect, tiers=tiers, grace=grace
        )
        self._every, self._protect, self._slot_count = options.every, options.protect, options.slots
        self._deadlines = deadlines or Deadlines()
        self._settings = NodeSettings.read(os.environ, job=options.job, shm=shm, socket=agent)
        self._ranks: Ranks = join()
        self._spilling = Spilling(options.tiers, asks=self._ranks.rank == 0)
        self._books = Books(strict=strict)
        self._stats = self._books.stats
        self._flight: _Flight | None = None
        self._restored: SnapshotId | None = None
        self._floor: SnapshotId | None = None
        self._torch_hooks: list[RemovableHandle] = []
        self._closed, self._reported_s = False, -_REPORT_EVERY_S
        self._objection, self._text_bytes = "", 0
        self._digest: tuple[int, int] | None = None
        with ExitStack() as undo:
            undo.callback(self._ranks.close)
            self._notice = Notice(options.grace_s)
            self._ending = Ending(self._notice, self._deadlines.last)
            undo.callback(self._notice.close)
            self._set_up(undo, by_name(model), by_name(optimizer), extras or {})
            undo.pop_all()

    def _set_up(
        self,
        undo: ExitStack,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Any],
        extras: Mapping[str, Any],
    ) -> None:
        """All that can fail, in stages that every rank goes through together; *undo* collects what a failure takes back."""
        wait_s = self._deadlines.attach
        self._spilling.compare(self._ranks, wait_s)
        self._state, image_bytes, table_bytes = together(
            self._ranks, "looking through the state", wait_s, lambda: self._look_through(models, optimizers, extras)
        )
        self._copier: Copier = together(
            self._ranks, "preparing the copies", wait_s, lambda: copier_for(self._state.survey())
        )
        undo.callback(lambda: self._copier.close())
        self._binder = Binder(self._state, self._ranks)

        def attach() -> Holding:
            holding = Holding(
                self._settings,
                __version__,
                rank=self._ranks.rank,
                world=self._ranks.world,
                slots=self._slot_count,
                image_bytes=image_bytes,
                table_bytes=table_bytes,
                timeout_s=wait_s,
                tiers=[tier.to_json() for tier in self._spilling.tiers],
                grace_s=self._notice.grace_s or 0.0,
                unmapping=self._unmapping,
                gave_up=self._books.skip,
                heard=self._heard,
            )
            undo.callback(holding.close, ended=False)
            for slot in holding.slots:
                self._copier.prepare(slot)
            return holding

        self._holding = together(self._ranks, "attaching to the agents", wait_s, attach)
        self._spilling.holding = self._holding
        self._found: Found | None = self._begin_run()
        self._torch_hooks = [fence_before_step(one, self.fence) for one in self._state.optimizers.values()]
        for hook in self._torch_hooks:
            undo.callback(hook.remove)

    # -- the training loop -------------------------------------------------------------------------------------------

    def step(self, step: int) -> Ticket | None:
        """End training step *step*: take a snapshot of the state now, if one is due. Returns at once.

        Args:
            step: number of the step that just ended; the same on every rank, growing within a run.

        Returns:
            The ticket of the snapshot, or None if none was due.
        """
        if natural(step) % self._every == 0:
            return self.snapshot(step)
        self._end_step(natural(step), wanted=False)
        return None

    def snapshot(self, step: int) -> Ticket:
        """Take a snapshot of the state after *step* now, whether due or not. Returns at once; see ``wait``.

        Raises ``ConfigError`` if *step* is no natural number.
        """
        return self._end_step(natural(step), wanted=True)

    def fence(self) -> None:
        """Call before anything changes parameters or optimizer state; done by a hook for torch's optimizers.

        Waits for the copy under way, which in most steps has long ended. Calling it more often than needed does no harm.
        """
        with self._books.guard("fence"):
            if self._flight is not None:
                self._close_window()
            self._copier.fence(self._deadlines.fence)  # again: another stream may be about to mutate
            if not self._pulse.fenced():
                return
        with self._books.guard("beat"):
            if self._binder.started:
                self._pulse.start(self._standing)

    def wait(self, ticket: Ticket, state: State = "sealed", timeout_s: float = 60.0) -> None:
        """Return once this rank's part of the snapshot is sealed, or the whole snapshot protected, or persisted.

        A snapshot is sealed only after the next fence, which this therefore implies. To wait for "protected" or "persisted" is
        collective: every rank must. A snapshot that is waited for is spilled to the nearest tier, whether due or not.

        Raises:
            SnapshotSkipped: it was not taken or not kept; says why.
            StateUnreachable: *state* cannot be reached in this set-up.
            DeadlinePassed: it was not reached in time.
            TierError, PeerFailed: a tier does not take it, here or at another rank.
        """
        if state == "persisted" and not self._spilling.tiers:
            raise StateUnreachable(f"step {ticket.step} cannot become persisted: there is no tier to persist in")
        if state == "protected" and self._holding.alone:
            raise StateUnreachable(
                f"step {ticket.step} cannot become protected: this node has no peers to protect with"
            )
        with self._books.guard("fence"):
            self._close_window()
        if state == "sealed":
            self._holding.wait_sealed(taken(ticket), timeout_s)
        elif state == "protected":
            self._wait_protected(ticket, timeout_s)
        else:
            self._arrivals.persisted(ticket, timeout_s, self._digest)

    def restore(
        self,
        *,
        strict: bool = True,
        only: str | Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
    ) -> int | None:
        """Bring the newest snapshot of this job back into the live objects. Collective.

        Model, optimizer, extras and random generators continue exactly where that step ended; on every rank the same
        step of the same run. Called in the middle of a run, this goes back to its newest complete snapshot.

        Ranks, meshes and parallel layouts may be others than those that took it: tensors are put together from the parts that
        any image holds; a rank takes the extras and random streams of the rank of its number (modulo how many there were), and
        those that there were not draw from streams of their own (``stats().restored``).

        With arguments, only tensors come back (and what modules and optimizers keep beside theirs), say for fine-tuning: random
        generators, extras and hyperparameters stay as they are, and the run begins anew.

        Args:
            strict: raise if something does not fit; otherwise it is left as it is, and listed in ``stats().restored``.
            only: names to restore, or patterns of names like ``"model.*"``.
            rename: a name in the snapshot, or with a dot at its end the beginning of some, and what it is called here.

        Returns:
            The restored step, or None if this job has no snapshot that was ever complete.

        Raises:
            LayoutMismatch: the snapshot is of another model or optimizer; nothing is changed.
            SnapshotLost: there was one, and it cannot be had any more; says what is missing. If that only turned out while
                it was read, the state is partly overwritten, as after all of these:
            Corrupt, PeerFailed, DeadlinePassed, RestoreDiverged, AgentError, BudgetExceeded: do not train on that state.
        """
        began_s = time.perf_counter()
        selection = Selection(strict, (only,) if isinstance(only, str) else tuple(only), dict(rename or {}))
        if self._found is None:
            self._found = self._interrupt_run()
        assert isinstance(self._state, TrainingState)
        restorer = Restorer(
            self._state, self._ranks, self._deadlines.restore, self._holding.slots, self._holding.welcome.agent,
            self._holding, selection,
        )  # fmt: skip
        try:
            done = restorer.newest(self._found)
        finally:
            self._holding.refresh()  # the agent may have put images there, and even if nothing came of it
        found, self._found = self._found, None
        self._binder.forget()
        if done is not None:
            chosen, self._stats.restored = done
            report_restored(self._stats.restored, self._ranks.world)
            self._continue(chosen, found, whole=selection.whole)
        self._stats.restore_s = time.perf_counter() - began_s
        return done[0].step if done is not None else None

    def _continue(self, chosen: SnapshotId, found: Found, *, whole: bool) -> None:
        """This run goes on from *chosen*, one of what was *found*, or begins anew with some of its tensors. Collective."""
        self._discard_newer(chosen)
        self._go_on_from(chosen if whole else None, chosen)
        if not self._holding.alone:
            restored_s = time.perf_counter()
            relied = relied_on(found.images, found.parities, chosen)
            if whole and self._stats.restored is not None and self._stats.restored.world == self._ranks.world:
                self._protect_again(chosen, relied)
            else:  # other groups guard other images now; what there is stays until there is a snapshot of this run
                self._assemble(None, relied.parities)
                if any(p.id == relied.id and p.sources for p in prospects(found.images, parities=found.parities)):
                    self._fall_back_on(relied.id, chosen)
            self._stats.reprotect_s = time.perf_counter() - restored_s

    def _discard_newer(self, than: SnapshotId | None) -> None:
        """What this rank holds of snapshots that never were complete would stand in the way of those to come."""
        for id in self._holding.discard_newer(than) if than is not None else ():
            _log.info("discarded %s: the job went back to %s", id, than)

    @property
    def watermark(self) -> int | None:
        """The newest step that all ranks know to be complete on every rank (or restored from), None before the first.

        Complete is protected, where there are nodes to protect with, else sealed.
        """
        watermark = self._pulse.known
        return None if watermark == NONE else watermark

    @property
    def persisted(self) -> int | None:
        """The newest step of this run that all ranks know to lie in the nearest tier, whole; None before the first."""
        step = self._pulse.agreed.persisted
        return None if step == NONE else step

    @property
    def should_stop(self) -> bool:
        """Whether this was the last step: a preemption notice has come, and what could be done for the state is done.

        Turns true at the same step on every rank. Leave the loop then, and ``close``.
        """
        return self._ending.over

    def stats(self) -> Stats:
        """What happened so far; the live object, not a copy."""
        return self._stats

    def close(self, *, ended: bool = True) -> None:
        """Let the last snapshot be sealed, and detach. Further calls do nothing.

        Args:
            ended: the job is done, so the agent may give the memory back after its idle time. Otherwise it keeps the
                snapshots for the job's next life.
        """
        if self._closed:
            return
        self._closed = True
        with self._books.guard("close"):
            self._settle_flight()
        for handle in self._torch_hooks:
            handle.remove()
        # Each by itself: whatever one meets, the others let go too.
        ended = ended and not self._ending.over  # who is preempted comes back
        parts = (self._notice.close, self._copier.close, lambda: self._holding.close(ended=ended), self._ranks.close)
        for part in parts:
            with self._books.guard("close"):
                part()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(ended=kind is None)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _end_step(self, step: int, *, wanted: bool) -> Ticket:
        ticket = Ticket(step, "trouble")
        if self._flight is not None:
            with self._books.guard("fence"):
                self._close_window()
        if not self._binder.started:
            with self._books.guard("layout"):
                self._start_fresh_or_not(step)
                self._binder.first(self._deadlines.attach)
        with self._books.guard("step"):
            # What may be the last step is waited for as long as the slowest rank's copy may take.
            patience_s = max(self._notice.left_s, self._deadlines.last) + self._deadlines.fence
            verdict = self._pulse.harvest(step, wanted, self._standing, self._deadlines.beat, patience_s)
            self._spilling.step_ended(step)
            self._holding.persisted = self._pulse.agreed.persisted
            self._holding.ending = self._pulse.agreed.stopping
            try:
                if verdict.take:
                    ticket = self._take(step, verdict.due or int(verdict.stop and bool(self._spilling.tiers)))
                elif wanted:
                    reason = (self._objection or "another-rank") if verdict.reason == "not-able" else verdict.reason
                    self._books.skip(reason)
                    ticket = Ticket(step, reason)
            finally:
                if verdict.stop:  # whatever happened here: the other ranks wait for this one
                    self._last_step(ticket if verdict.take else None)
        if ticket.id is None:
            with self._books.guard("report"):
                self._report(step)
        self._books.end_step()
        return ticket

    def _start_fresh_or_not(self, step: int) -> None:
        """The first step of a run: from here on, what was held before may be overwritten."""
        if self._found and self._found.images and self._restored is None:
            newest = max(held.id for held in self._found.images)
            _log.warning("step %d begins without restore(), although %s is held; it will be overwritten", step, newest)
            self._discard_newer(self._floor)
        self._found = None

    def _take(self, step: int, tiers: int) -> Ticket:
        """Begin the snapshot that all ranks agreed on, and will spill to *tiers* tiers. If this rank cannot, it holds nothing
        for it, which the next beat tells the others."""
        id = self._id(step)
        if tiers:
            self._spilling.begin(id, tiers)
        try:
            reason = self._begin(id)
            if tiers and reason is None:
                self._holding.pin(id, self._deadlines.spill)
        except Exception as error:
            self._flight = None
            self._holding.discard(id, str(error))
            raise
        if reason is not None:
            self._books.skip(reason)
            return Ticket(step, reason)
        self._stats.taken += 1
        return Ticket(step, None, id)

    def _begin(self, id: SnapshotId) -> str | None:
        """Open a slot and start the copy; returns why not, or None."""
        binding = self._binder.current()
        if binding is None:
            return "new-layout"
        values, offset = Values(self._state, binding.survey, self._text_bytes), binding.layout.values_offset
        image_bytes = offset + values.nbytes
        slot = self._holding.open(
            id, keep=self._keep(), image_bytes=image_bytes, table_bytes=table_bytes_for(image_bytes, len(binding.text))
        )
        if slot is None:
            return (
                "over-budget" if self._holding.over_budget(image_bytes) else self._holding.objection() or "slots-busy"
            )
        self._holding.describe(binding.layout.number, binding.text)
        values.release(slot.image[offset:])
        capture = Capture(binding, self._copier, id.step, lambda: self._binder.still_true(binding))
        self._flight = _Flight(id, capture)
        capture.start(slot, lambda seconds: self._copied(id, capture, values, seconds))
        self._digest = None if capture.digest is None else (id.step, capture.digest)
        return None

    def _copied(self, id: SnapshotId, capture: Capture, values: Values, seconds: float) -> None:
        """On the copying thread: every byte of the tensors has landed."""
        layout, unchanged = capture.binding.layout, capture.unchanged()
        reason = self._holding.copied(id, layout, values, unchanged)
        self._stats.copy_s, self._stats.image_bytes = seconds, layout.values_offset + values.nbytes
        self._stats.copied_bytes = self._stats.image_bytes - unchanged.nbytes
        # 0: the next are encoded before a slot is chosen for them
        self._text_bytes = 0 if reason else values.text_bytes
        self._books.skip(reason)
        self._report(id.step)

    def _close_window(self) -> None:
        """End the open window: wait for the copy, and keep it only if nothing was touched meanwhile."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            flight.capture.fence(self._deadlines.fence)
        except Exception as error:
            self._holding.discard(flight.id, str(error))
            raise
        if flight.capture.restructured:
            self._books.skip("new-layout")
            self._holding.discard(flight.id, "the state's tensors were exchanged for others")
            self._binder.note_changed()
            return
        torn = flight.capture.torn()
        if torn:
            self._books.skip("torn")
            self._holding.discard(flight.id, "torn")
            self._binder.note_torn(torn)
            raise SnapshotSkipped(
                f"{flight.id} was discarded: {', '.join(torn[:5])} changed between step() and the optimizer's step; "
                f"state that changes there belongs into extras"
            )
        self._holding.fenced(flight.id)
        flight.capture.settled()

    def _protect_again(self, restored: SnapshotId, relied: Relied) -> None:
        """Nodes that came, and ranks that moved, have the restored snapshot protected before training goes on. Collective.

        If that cannot be, training goes on all the same: the state is right, and later snapshots are protected as soon as
        all nodes can. What the job relies on meanwhile stays where it is.
        """
        self._assemble(restored, relied.parities)
        try:
            self._wait_protected(Ticket(restored.step, None, restored), self._deadlines.protect)
        except HoldfastError as error:
            _log.warning("%s is restored, and not protected again: %s", restored, error)
            self._fall_back_on(relied.id, restored)
        else:
            self._holding.floor_stands()

    def _fall_back_on(self, protected: SnapshotId | None, restored: SnapshotId) -> None:
        """What was *restored* is not protected, and an older snapshot is: that one stays until this run has its own."""
        if protected not in (None, restored):
            self._floor = protected
            self._holding.discard(restored, f"it cannot be protected, and {protected} is")

    def _wait_protected(self, ticket: Ticket, timeout_s: float) -> None:
        id = self._arrivals.protected(ticket, timeout_s)
        if id == self._id(id.step):
            self._pulse.complete(id.step)
            self._spilling.advance(id.step)

    @property
    def _arrivals(self) -> Arrivals:
        return Arrivals(self._ranks, self._holding, self._spilling)

    def _last_step(self, ticket: Ticket | None) -> None:
        """All ranks are here: see the last snapshot to where it is safest, within the grace. Collective."""
        if self._ending.goes_on(taken=ticket is not None, missed=self._pulse.missed_stop, wait=self._holding.wait_able):
            return
        watermark = self._pulse.agreed.watermark
        last = ticket or Ticket(watermark, None, self._keep() if watermark != NONE else None)
        state: State = "persisted" if self._spilling.tiers else "sealed" if self._holding.alone else "protected"
        self._ending.see(last.step, state, lambda left_s: self.wait(last, state, left_s))

    def _settle_flight(self) -> None:
        """Fence what is open and wait for it to be sealed, within the deadline of ``close``."""
        flight = self._flight
        self._close_window()
        if flight is not None:
            self._holding.wait_sealed(flight.id, self._deadlines.close)

    # -- what this rank knows ----------------------------------------------------------------------------------------

    def _standing(self) -> Standing:
        """The facts that this rank contributes to the next beat. Never raises: the others count on a contribution."""
        try:
            self._objection = self._object()
        except Exception as error:  # noqa: BLE001 - see above
            self._objection = f"error: {type(error).__name__}"
            self._books.say("beat", error)
        return Standing(
            held={id.step: sealed for id, sealed in self._holding.held().items() if id.run == self._run},
            able=not self._objection,
            relayout=self._binder.stale,
            busy_us=self._books.busy_us,
            digest=self._digest,
            stop=self._notice.given,
            due=self._spilling.due(),
            free=self._spilling.free(),
            persisted=self._spilling.persisted,
        )

    def _object(self) -> str:
        """Why this rank could take no snapshot at the end of the running step, or nothing."""
        if self._copier.busy:
            return "copy-under-way"
        if not self._binder.finish(0.0):
            return "layout-pending"
        if (refusal := too_many_tensors(self._binder.text_bytes)) is not None:
            self._books.say("layout", refusal)
            return "layout-too-large"
        return self._holding.objection() or ""

    def _id(self, step: int) -> SnapshotId:
        return SnapshotId(self._generation, step, self._run)

    def _keep(self) -> SnapshotId | None:
        """The snapshot that must not be overwritten: the watermark, or what the job started from."""
        watermark = self._pulse.agreed.watermark
        started_from = self._restored.step if self._restored else NONE
        return self._floor if watermark == started_from else self._id(watermark)

    def _dropped(self, step: int) -> None:
        """All ranks gave *step* up because one of them had to."""
        self._spilling.dropped(self._id(step))
        if self._id(step) in self._holding.held():
            self._books.skip("discarded-elsewhere")
            self._holding.discard(self._id(step), "another rank gave it up")

    def _advanced(self, step: int) -> None:
        """All ranks have *step*."""
        self._holding.mark_complete(self._id(step))
        self._spilling.advance(step)

    def _heard(self, message: wire.FromAgent) -> None:
        """What the agent says of spills and preemption; on another thread than the training's."""
        kind = message.WhichOneof("kind")
        if kind == "spilled":
            self._spilling.told(message.spilled)
            self._books.skip("not-spilled" if message.spilled.error and not message.spilled.trying else None)
        elif kind == "due":
            self._spilling.ask(message.due.tiers)
        elif kind == "stop":
            self._notice.give(message.stop.reason)

    def _lay_out(self, ordinal: int) -> None:
        """All ranks agreed to lay their state out anew."""
        self._digest = None
        self._binder.begin(ordinal)

    # -- runs --------------------------------------------------------------------------------------------------------

    def _begin_run(self) -> Found:
        """Agree on a new run, younger than anything held anywhere; returns what is held. Collective."""
        wait_s = self._deadlines.restore
        reply, listed = together(
            self._ranks, "asking the agents", wait_s,
            lambda: (self._holding.inventory(wait_s), self._holding.stored(wait_s)),
        )  # fmt: skip
        found = gather_inventories(self._ranks, reply, listed, wait_s, self._holding.elsewhere)
        names = self._ranks.gather(f"{uuid.uuid4().hex} {time.time() // 60:.0f}".encode(), "agreeing on a run", wait_s)
        self._run, minutes = names[0].decode().split()
        left = [part.id for parts in (found.images, found.parities, found.stored) for part in parts]
        self._generation = 1 + max((id.generation for id in left), default=0)
        if found.silent:  # a tier that cannot be read now may hold runs that none of these knows of
            self._generation = max(self._generation, int(minutes))
        # What the job would go back to until this run has a complete snapshot of its own; never overwritten before.
        floor = plan(found.images, parities=found.parities).chosen
        self._go_on_from(None, floor or max(self._holding.held(), default=None))
        self._assemble(None)
        return found

    def _assemble(self, floor: SnapshotId | None, kept: Iterable[HeldParity] = ()) -> None:
        """Tell every agent of all agents. *floor* is to be protected before training goes on; *kept* is parity that the job
        relies on until then. Collective."""
        wait_s = self._deadlines.attach
        roster = gather_roster(
            self._ranks, self._holding.welcome, self._protect, wait_s,
            run=self._run, floor=floor, kept=kept, timeout_s=self._deadlines.protect,
        )  # fmt: skip
        together(self._ranks, "preparing the protection", wait_s, lambda: self._holding.protect(roster, wait_s))

    def _go_on_from(self, restored: SnapshotId | None, floor: SnapshotId | None) -> None:
        """This run's first step comes after *restored*; *floor* must not be overwritten before it has its own snapshot."""
        self._restored, self._floor, self._digest = restored, floor, None
        self._pulse = Pulse(
            self._ranks, self._slot_count, Agreed(watermark=restored.step if restored else NONE),
            dropped=self._dropped, relayout=self._lay_out, advanced=self._advanced,
        )  # fmt: skip
        self._spilling.begin_run(self._run, restored.step if restored else 0)
        self._holding.forget_spills()

    def _interrupt_run(self) -> Found:
        """Leave the run in the middle; what is held has changed since it began, and is returned. Collective.

        Ranks may have begun different numbers of beats, so they go on with a new group: on the old one, one rank's beat
        would meet another's question.
        """
        with self._books.guard("restore"):
            self._settle_flight()
        self._ranks.close()
        self._ranks = join()
        self._binder = Binder(self._state, self._ranks)
        return self._begin_run()

    def _unmapping(self, slot: Slot) -> None:
        """The slot's memory goes away: let go of every view into it."""
        self._copier.forget(slot)
        self._binder.forget_slot(slot)

    def _report(self, step: int) -> None:
        """Figures for the agent now and then; of a snapshot, on the copying thread."""
        now_s = time.monotonic()
        if now_s - self._reported_s < _REPORT_EVERY_S:
            return
        self._reported_s = now_s
        self._holding.report(self._books.report(step, self._pulse.agreed.watermark))
