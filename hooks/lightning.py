"""Lightning: a callback that snapshots at every optimizer step, and has ``fit`` go on where the job was.

A snapshot is taken as the next batch is about to be fetched. By then everything that belongs to a step is done: schedulers,
other callbacks, validation, the end of an epoch; so a job that is killed in any of these does them again, as a whole, from
the step before. That moment is no hook of Lightning's; it is when the training loader is asked for the next batch, and a
strategy's ``process_dataloader`` may put something of its own around the loader.
"""

from __future__ import annotations

import json
import logging
from operator import attrgetter
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import CombinedLoader

from ..snapshot.streams import random_state, set_random_state
from .batches import Followed
from .checkpointer import Checkpointer

_log = logging.getLogger(__name__)


class HoldfastCallback(Callback):
    """``Trainer(callbacks=[HoldfastCallback()])``, and ``fit`` survives ``kill -9``: started again, it goes on bit for bit.

    Captured: the model, all optimizers, schedulers, the precision plugin's scaler, the loops' progress, the position in the
    training data, what callbacks and the data module give as their ``state_dict``, and all random generators.
    ``Trainer.fit(ckpt_path=…)`` works as ever; if Holdfast holds a snapshot of the job, that comes after it and wins.

    Attributes:
        checkpointer: the ``Checkpointer`` of the running ``fit``: its ``stats``, ``watermark``, ``should_stop``.
    """

    checkpointer: Checkpointer | None

    def __init__(self, extras: dict[str, Any] | None = None, **options: Any) -> None:
        """
        Args:
            extras: more state, as for ``Checkpointer``.
            options: of ``Checkpointer``: ``every``, ``slots``, ``protect``, ``tiers``, ``job``, ``strict`` and so on.
        """
        super().__init__()
        self.checkpointer = None
        self._extras, self._options = dict(extras or {}), options
        self._trainer: Trainer | None = None
        self._process: Any = None
        self._found: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._open = self._running = False
        self._step = 0

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trainer, self._process = trainer, trainer.strategy.process_dataloader
            trainer.strategy.process_dataloader = self._wrap

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(ended=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end(ended=True)

    def _end(self, *, ended: bool) -> None:
        self._open = self._running = False
        self._found = None
        if self.checkpointer is not None:
            self.checkpointer.close(ended=ended)
        if self._trainer is not None:
            self._trainer.strategy.process_dataloader = self._process
            self._trainer = None

    # -- the training data -------------------------------------------------------------------------------------------

    def _wrap(self, dataloader: object) -> object:
        dataloader = self._process(dataloader)
        trainer = self._trainer
        return _Fetched(dataloader, self) if trainer is not None and self._concerns(trainer) else dataloader

    def _concerns(self, trainer: Trainer) -> bool:
        """Lightning's tuner runs ``fit`` within ``fit``, and leaves callbacks out for it."""
        return bool(trainer.training) and self in trainer.callbacks

    def passing(self) -> None:
        """A pass through the training data begins. Before the first, all objects are made and nothing was trained yet."""
        trainer = self._trainer
        if trainer is None or self._open:
            return
        self._open = True
        optimizers = {str(i): optimizer for i, optimizer in enumerate(trainer.optimizers)}
        assert trainer.model is not None
        self.checkpointer = Checkpointer(
            trainer.model,
            optimizers["0"] if len(optimizers) == 1 else optimizers,
            {"lightning": _Progress(trainer, self), **self._extras},
            **self._options,
        )
        step = self.checkpointer.restore()
        self._step = trainer.global_step
        if step is not None:
            _log.info("training goes on from step %d", step)
            assert self._found is not None
            self._found = self._found[0], random_state()

    def restored(self, loops: dict[str, Any]) -> None:
        """The progress of the loops that a snapshot holds."""
        self._found = loops, {}

    def fetching(self) -> bool:
        """A batch is about to be fetched. False if the job was told to end, and is safe."""
        trainer, checkpointer = self._trainer, self.checkpointer
        if trainer is None or checkpointer is None or not self._running:
            return True
        if self._found is not None:
            # On its way here Lightning has counted and drawn at random; that was done before, when the snapshot was taken.
            (loops, random), self._found = self._found, None
            trainer.fit_loop.load_state_dict(loops)
            trainer.fit_loop.on_iteration_done()
            trainer.fit_loop.epoch_loop.restarting = False
            set_random_state(random)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            checkpointer.step(self._step)
            trainer.should_stop = trainer.should_stop or checkpointer.should_stop
        return not checkpointer.should_stop


class _Fetched(Followed):
    """The training loader, which tells of what is done with it."""

    def __init__(self, loader: Any, callback: HoldfastCallback) -> None:
        # Lightning fetches one batch ahead if it could not know the last one otherwise.
        super().__init__(loader, ahead=_length(loader) is None)
        self._callback = callback

    def __iter__(self) -> Any:
        self._callback.passing()
        return super().__iter__()

    def go_on(self) -> bool:
        return self._callback.fetching()

    @property
    def worker_init_fn(self) -> Any:
        """Lightning sets it, and means the loader's."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self._loader.worker_init_fn = function


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


class _Progress:
    """What Lightning has to remember, besides tensors."""

    def __init__(self, trainer: Trainer, callback: HoldfastCallback) -> None:
        self._trainer, self._callback = trainer, callback
        # To ask the loop for its state costs a tenth of a millisecond, most of it for copies of single numbers. So it is asked
        # once for the names, and the counters behind them are read at each step.
        loop = trainer.fit_loop
        names = [name for name in loop.state_dict() if name != "state_dict"]  # that one is the loaders': see positions
        parts = [name.rpartition(".")[0] for name in names if name.endswith(".state_dict")]
        self._counters = {name: attrgetter(name)(loop) for name in names if not name.endswith(".state_dict")}
        self._others = {f"{part}.state_dict": attrgetter(part)(loop).on_save_checkpoint for part in parts}

    def _loops(self) -> str:
        others = {name: save() for name, save in self._others.items()}
        return json.dumps({**self._counters, **others}, default=vars)

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        data = getattr(trainer, "datamodule", None)
        callbacks = ((one.state_key, one.state_dict()) for one in trainer.callbacks)
        return {
            "loops": self._loops(),
            "positions": [loader.position() for loader in self._loaders()],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "callbacks": {key: state for key, state in callbacks if state},
            "data": data.state_dict() if data is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self._trainer
        for config, scheduler in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(scheduler)
        trainer.precision_plugin.load_state_dict(state["precision"])
        for callback in trainer.callbacks:
            if found := state["callbacks"].get(callback.state_key):
                callback.load_state_dict(found)
        data = getattr(trainer, "datamodule", None)
        if data is not None and state["data"]:
            data.load_state_dict(state["data"])
        self._callback.restored(json.loads(state["loops"]))
        trainer.fit_loop.load_state_dict(_as_if_in_batch_end(json.loads(state["loops"])))
        for loader, position in zip(self._loaders(), state["positions"], strict=True):
            loader.resume(position)

    def _loaders(self) -> list[_Fetched]:
        found: list[_Fetched] = CombinedLoader(self._trainer.train_dataloader).flattened
        return found


def _as_if_in_batch_end(loops: dict[str, Any]) -> dict[str, Any]:
    """*loops*, changed to what a checkpoint would show that was saved in ``on_train_batch_end`` of the last batch.

    From there Lightning goes straight to the next batch. Taken for one that was saved after a validation, it would
    first update schedulers that it has updated already.
    """
    for count in ("total", "current"):
        loops["epoch_loop.batch_progress"][count]["completed"] -= 1
    return loops
