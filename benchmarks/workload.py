"""What every contender trains: a state of a given size, and iterations of a given length. The same for all of them.

The state is that of a transformer under AdamW: 12 layers of 12 tensors each and an embedding, float32, with both moments
and the step count of every parameter, 588 tensors in all, from 4 bytes to a tenth of the whole. Nothing is computed with
the large ones: an iteration takes its time as a GPU would (``sleep``) or as one CPU thread would (``compute``).

The optimizer is a real AdamW, but only the last norm has gradients: on a CPU, updating gigabytes would take longer than
the iteration itself. That leaves less time in which to copy, and no byte less to be copied; it is so for all contenders.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn

Mode = Literal["sleep", "compute"]

LAYERS: Final = 12
ITERATION_S: Final = 0.2
_STATE_FACTOR: Final = 3  # a parameter and its two moments
_MATMUL_SIDE: Final = 512  # three matrices of 1 MB: they stay in a core's own cache, as blocked kernels do


class Block(nn.Module):
    """The tensors of one transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = _norm(width)
        self.attn_qkv = _linear(width, 3 * width)
        self.attn_out = _linear(width, width)
        self.ln_2 = _norm(width)
        self.mlp_in = _linear(width, 4 * width)
        self.mlp_out = _linear(4 * width, width)


class Transformer(nn.Module):
    """The tensors of a transformer whose parameters have *parameter_bytes* bytes, give or take one row of the embedding."""

    def __init__(self, parameter_bytes: int) -> None:
        super().__init__()
        numbers = parameter_bytes // 4
        width = 8
        while LAYERS * (12 * (width + 8) ** 2 + 13 * (width + 8)) <= 0.9 * numbers:
            width += 8
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.ln_f = _norm(width)
        rows = (numbers - sum(p.numel() for p in self.parameters())) // width
        self.embedding = nn.Parameter(torch.empty(max(rows, 1), width))


def _norm(width: int) -> nn.ParameterDict:
    return nn.ParameterDict({"weight": nn.Parameter(torch.empty(width)), "bias": nn.Parameter(torch.empty(width))})


def _linear(inputs: int, outputs: int) -> nn.ParameterDict:
    weight, bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.empty(outputs))
    return nn.ParameterDict({"weight": weight, "bias": bias})


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and its optimizer, all memory of which is resident."""

    model: Transformer
    optimizer: torch.optim.AdamW

    @classmethod
    def of(cls, state_bytes: int, *, moments: bool = True) -> Workload:
        """Parameters and moments of *state_bytes* in all. The contents depend on nothing but the size.

        Without *moments*, as a program has it that just started: the optimizer makes them in its first step.
        """
        model = Transformer(state_bytes // _STATE_FACTOR)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                _fill(parameter, index)
                if moments:
                    first, second = torch.empty_like(parameter), torch.empty_like(parameter)
                    _fill(first, index + 1)
                    _fill(second, index + 2)
                    optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
        for parameter in model.ln_f.values():
            parameter.grad = torch.full_like(parameter, 1e-3)
        return cls(model, optimizer)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*(p.detach() for p in self.model.parameters()), *moments]

    @property
    def state_bytes(self) -> int:
        """How much a snapshot has to copy."""
        return sum(tensor.nbytes for tensor in self.tensors())


def _fill(tensor: torch.Tensor, seed: int) -> None:
    """Positive numbers, fast: what is never written would share the kernel's page of zeros, and copy too fast."""
    flat = tensor.view(-1)
    torch.arange(seed, seed + flat.numel(), out=flat)
    flat.mul_(1e-9)


class Clockwork:
    """Iterations of one length. ``run`` returns when one is over."""

    def __init__(self, mode: Mode, matmuls: int) -> None:
        """*matmuls*: how many make an iteration in mode ``compute``; see ``calibrate``."""
        self._mode = mode
        self._matmuls = matmuls
        self._a = torch.full((_MATMUL_SIDE, _MATMUL_SIDE), 0.001)
        self._b = torch.full((_MATMUL_SIDE, _MATMUL_SIDE), 0.001)
        self._out = torch.empty(_MATMUL_SIDE, _MATMUL_SIDE)

    def run(self) -> None:
        """One iteration's forward and backward."""
        if self._mode == "sleep":
            time.sleep(ITERATION_S)
            return
        for _ in range(self._matmuls):
            torch.mm(self._a, self._b, out=self._out)


def calibrate() -> int:
    """How many matrix products one thread computes in an iteration's time, on this machine, now."""
    torch.set_num_threads(1)
    once = Clockwork("compute", 100)
    once.run()
    taken_s: list[float] = []
    for _ in range(7):
        began_s = time.perf_counter()
        once.run()
        taken_s.append(time.perf_counter() - began_s)
    return max(1, round(100 * ITERATION_S / sorted(taken_s)[len(taken_s) // 2]))
