"""A small byte-level GPT: the kind of model people train, in a size that one CPU core trains quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a ``GPT``. ``width`` is a multiple of ``heads``; ``tied`` shares the embedding with the output layer."""

    context: int = 64
    width: int = 96
    heads: int = 4
    layers: int = 2
    dropout: float = 0.1
    tied: bool = False


class Attention(nn.Module):
    """Causal self-attention over ``[batch, time, width]``, with dropout on the weights and on the result."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return functional.dropout(self.out(mixed.transpose(1, 2).flatten(-2)), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(),
            nn.Linear(4 * shape.width, shape.width),
            nn.Dropout(shape.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]  # torch types a module's call as Any


class GPT(nn.Module):
    """``int64[batch, time]`` bytes to ``float32[batch, time, 256]`` logits of the next byte; ``time <= context``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, BYTES, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        if shape.tied:
            self.head.weight = self.bytes.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.dropout(self.bytes(text) + self.places(torch.arange(text.shape[1], device=text.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]  # torch types a module's call as Any
