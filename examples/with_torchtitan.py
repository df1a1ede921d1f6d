"""torchtitan with Holdfast: a checkpoint manager, which is torchtitan's own extension point (``BaseCheckpointManager``).

In a recipe, take its ``Config`` instead of ``CheckpointManager.Config``::

    checkpoint = HoldfastCheckpointManager.Config(enable=True, every=1)

Every step is snapshot; killed in any way and started again, training goes on where it was. Written for torchtitan 0.3. Who
wants torchtitan's own manager and its files beside this one subclasses that, and calls ``super()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import holdfast
from torchtitan.components.checkpointer import BaseCheckpointManager


class HoldfastCheckpointManager(BaseCheckpointManager):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        every: int = 1  # steps from one snapshot to the next
        protect: str = "auto"
        tier: str = ""  # where snapshots are persisted, like s3://bucket/run7
        tier_every: str = "auto"

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: Any,
        optimizers: Any,
        lr_schedulers: Any,
        states: Any,
        **_: Any,
    ) -> None:
        self.enable, self.save_future = config.enable, None
        if not self.enable:
            return
        tiers = [holdfast.Tier(config.tier, every=config.tier_every)] if config.tier else None
        self.checkpointer = holdfast.Checkpointer(
            {str(part): model for part, model in enumerate(model_parts)},
            {str(part): optimizer for part, optimizer in enumerate(optimizers)},
            {"lr_scheduler": lr_schedulers, "dataloader": dataloader, **states},
            every=config.every, protect=config.protect, tiers=tiers,
        )  # fmt: skip

    def _load(self, step: int = -1) -> bool:
        return self.checkpointer.restore() is not None  # train_state, among the extras, says which step it was

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        return self.checkpointer.step(curr_step) is not None

    def _maybe_wait_for_staging(self) -> None:
        self.checkpointer.fence()  # called before the optimizers step

    def _wait_for_saving(self) -> None:
        pass  # nothing is saved through a future

    def _close(self) -> None:
        self.checkpointer.close()
