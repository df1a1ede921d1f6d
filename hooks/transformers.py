"""Hugging Face's Trainer: a callback that snapshots at every optimizer step, and has training go on where the job was.

A snapshot is taken as the next step begins. By then everything that belongs to a step is done: scheduler, evaluation, logs,
the end of an epoch; so a job that is killed in any of these does them again, as a whole, from the step before.

Trainer skips to an epoch and a step only if it is given a checkpoint folder before it makes optimizer and scheduler, and
what a snapshot holds can only be put back after that. So training begins, finds a snapshot, and begins again with a folder
that holds Trainer's own account of that step and names the weights without holding any: those are in place by then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from safetensors.torch import save
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError, SnapshotLost
from ..snapshot.streams import random_state, set_random_state
from .checkpointer import Checkpointer

_log = logging.getLogger(__name__)
_TRIES: Final = 3  # training begins where a snapshot is; if that one turns out to be damaged, where an older one is
_APART: Final = frozenset({"log_history", "stateful_callbacks"})


class HoldfastTrainerCallback(TrainerCallback):
    """Trains with a ``Trainer`` so that the job survives ``kill -9``: started again, it goes on bit for bit::

        holdfast = HoldfastTrainerCallback()
        holdfast.train(trainer)  # instead of trainer.train()

    Captured: the model, optimizer, scheduler, scaler, Trainer's state, what other callbacks export of theirs, and all random
    generators. Trainer finds the position in the training data itself, from the step.

    Attributes:
        checkpointer: the ``Checkpointer`` of the running training: its ``stats``, ``watermark``, ``should_stop``.
    """

    checkpointer: Checkpointer | None

    def __init__(self, extras: Mapping[str, Any] | None = None, **options: Any) -> None:
        """
        Args:
            extras: more state, as for ``Checkpointer``.
            options: of ``Checkpointer``: ``every``, ``slots``, ``protect``, ``tiers``, ``job``, ``strict`` and so on.
        """
        self.checkpointer = None
        self._extras, self._options = dict(extras or {}), options
        self._trainer: Trainer | None = None
        self._random: dict[str, Any] | None = None
        self._step = 0

    def train(self, trainer: Trainer, **options: Any) -> Any:
        """``trainer.train(**options)``, from the newest snapshot of the job if there is one.

        A checkpoint that is passed in *options* counts only while Holdfast holds nothing. When a job is told to end, this
        returns early; see ``checkpointer.should_stop``.

        Raises ``ConfigError`` if *trainer* makes its model anew, or leaves it to DeepSpeed or FSDP; and what ``Checkpointer``
        and ``Checkpointer.restore`` raise.
        """
        _check(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer, begun = trainer, random_state()
        with TemporaryDirectory(prefix="holdfast-") as folder:
            for _ in range(_TRIES):
                try:
                    return trainer.train(**options)
                except _Elsewhere as found:
                    _log.info("training goes on from step %d", found.progress["state"]["global_step"])
                    set_random_state(begun)
                    _write_folder(Path(folder), trainer, found.progress)
                    options["resume_from_checkpoint"] = folder
                finally:
                    self._close(ended=False)
        raise SnapshotLost(f"{_TRIES} times in a row, another step was restored than training had begun from")

    # -- Trainer's events --------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        if trainer is None:
            raise ConfigError("call HoldfastTrainerCallback.train(trainer) instead of trainer.train()")
        progress = _Progress(trainer)
        parts = {"trainer": progress, "scheduler": trainer.lr_scheduler, "scaler": trainer.accelerator.scaler}
        extras = {name: part for name, part in parts.items() if part is not None}
        self.checkpointer = Checkpointer(
            trainer.model_wrapped, kwargs["optimizer"].optimizer, {**extras, **self._extras}, **self._options
        )
        step = self.checkpointer.restore()
        if step is not None and step != state.global_step:
            raise _Elsewhere(progress.found)
        self._random = None if step is None else random_state()
        self._step = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        assert self.checkpointer is not None
        if self._random is not None:  # on its way here Trainer has drawn at random; that was done before, too
            set_random_state(self._random)
            self._random = None
        if state.global_step != self._step:
            self._step = state.global_step
            self.checkpointer.step(self._step)
            control.should_training_stop = control.should_training_stop or self.checkpointer.should_stop
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close(ended=True)

    def _close(self, *, ended: bool) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close(ended=ended)


class _Elsewhere(Exception):
    """The job is at another step than the one from which training was about to begin."""

    def __init__(self, progress: dict[str, Any]) -> None:
        super().__init__("training begins again, from where the job is")
        self.progress = progress


class _Progress:
    """Trainer's own account of its training, and what other callbacks export.

    Attributes:
        found: what a snapshot held.
    """

    found: dict[str, Any]

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.found = {}
        self._logged: list[Any] | None = None
        self._text, self._lines = "", 0

    def state_dict(self) -> dict[str, Any]:
        state = self._trainer.state
        kept = {field.name: getattr(state, field.name) for field in fields(state) if field.name not in _APART}
        exported = [(type(one).__name__, one.state()["attributes"]) for one in self._exporting()]
        return {"state": kept, "log": self._log_text(state.log_history), "callbacks": exported}

    def load_state_dict(self, progress: dict[str, Any]) -> None:
        self.found = progress
        for callback, (name, attributes) in zip(self._exporting(), progress["callbacks"], strict=False):
            if type(callback).__name__ == name:
                vars(callback).update(attributes)

    def _exporting(self) -> list[ExportableState]:
        callbacks: list[Any] = self._trainer.callback_handler.callbacks
        return [one for one in callbacks if isinstance(one, ExportableState)]

    def _log_text(self, history: list[Any]) -> str:
        """The log, one line for each entry. It only ever grows, so that only what is new is put into words."""
        if history is not self._logged or len(history) < self._lines:
            self._logged, self._text, self._lines = history, "", 0
        self._text += "".join(json.dumps(entry) + "\n" for entry in history[self._lines :])
        self._lines = len(history)
        return self._text


def _check(trainer: Trainer) -> None:
    if trainer.model_init is not None:
        raise ConfigError("a Trainer with model_init makes its model anew when training begins; pass it a model")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "Trainer reads back FSDP's and DeepSpeed's state only from checkpoints of theirs; use DDP, or Accelerate in a "
            "loop of your own with holdfast.accelerated"
        )


def _write_folder(folder: Path, trainer: Trainer, progress: dict[str, Any]) -> None:
    """A checkpoint as Trainer reads it: its state, and an index of weights of which every one is said to be in a file that
    holds none. Trainer takes what a file has, and leaves the rest as it is."""
    log = [json.loads(line) for line in progress["log"].splitlines()]
    TrainerState(**progress["state"], log_history=log).save_to_json(str(folder / "trainer_state.json"))
    if hasattr(trainer.model, "peft_config"):  # of adapters it would read no index
        (folder / "model.safetensors").write_bytes(save({}))
        return
    (folder / "none.safetensors").write_bytes(save({}))
    index = {"metadata": {}, "weight_map": dict.fromkeys(trainer.model.state_dict(), "none.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
