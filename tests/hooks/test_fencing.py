"""When the fence comes, in steps with and without closures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from holdfast.hooks.fencing import fence_before_step


class Foreign(torch.optim.SGD):
    """One that changes parameters before it calls its closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1)
        return closure() if closure is not None else None


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
@pytest.mark.parametrize("by_name", [False, True])
def test_it_comes_after_the_closure_and_before_any_change(kind: type[torch.optim.Optimizer], by_name: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)  # type: ignore[call-arg]
    seen: list[tuple[str, float]] = []
    fence_before_step(optimizer, lambda: seen.append(("fence", weight.sum().item())))

    def closure() -> torch.Tensor:
        seen.append(("closure", weight.sum().item()))
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step: Any = optimizer.step
    loss = step(closure=closure) if by_name else step(closure)
    assert seen[:2] == [("closure", 3.0), ("fence", 3.0)]
    assert loss == 3.0
    assert weight.sum().item() < 3


def test_without_a_closure_it_comes_first_and_an_undone_one_never() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    seen: list[float] = []
    handle = fence_before_step(optimizer, lambda: seen.append(weight.sum().item()))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [3.0]


def test_of_what_others_do_before_a_closure_nothing_is_assumed() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Foreign([weight], lr=0.1)
    seen: list[float] = []
    fence_before_step(optimizer, lambda: seen.append(weight.sum().item()))
    optimizer.step(lambda: weight.sum())
    assert seen == [3.0]
