"""Where torch's optimizers are fenced: when backward has ended, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def fence_before_step(optimizer: torch.optim.Optimizer, fence: Callable[[], None]) -> RemovableHandle:
    """Have *optimizer* call *fence* in each of its steps; the handle undoes it.

    A step that is given a closure runs forward and backward inside (so do all of Lightning's). torch's own optimizers call
    the closure before they change anything, so *fence* comes after it, and copies go on during forward and backward as
    ever. What optimizers of other origin do before they call it is unknown: for them *fence* comes first.
    """
    closure_first = type(optimizer).__module__.partition(".")[0] == "torch"

    def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = kwargs.get("closure") or next(iter(args[1:]), None)  # args[0] is the optimizer
        if given is None or not closure_first:
            fence()
            return None

        def closure() -> Any:
            loss = given()
            fence()
            return loss

        return args[:1], {**kwargs, "closure": closure}

    # A compiled step calls it, too; the compiler must not look into it.
    return optimizer.register_step_pre_hook(torch.compiler.disable(hook))  # type: ignore[no-untyped-call]
