"""What the adapters of the matrix sit on: small models, each of one kind of layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 12
"""Features of what the models read."""


class Linears(nn.Module):
    """q, k, v on one read, o behind them, a head. With two layers they stand in ``layers``."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 6, bias=False), nn.Linear(WIDTH, 8)
        self.o = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.cat([torch.tanh(self.q(x)), self.k(x), self.v(x)], -1))


class Transposed(nn.Module):
    """transformers' Conv1D, whose weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.qkv, self.o = Conv1D(24, WIDTH), Conv1D(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(8, -1)
        return x + self.o(torch.tanh(q) * k + v)


class Tokens(nn.Module):
    """A table of embeddings and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.o = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(torch.tanh(self.table(ids)))


class Convolutions(nn.Module):
    """A convolution over one, two or three dimensions, and a projection."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv, self.o = kind(6, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.conv(x)).flatten(2).mean(-1))


class Attending(nn.Module):
    """`nn.MultiheadAttention`, which multiplies with its weights itself, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.o = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.o(x + y)


class Experts(nn.Module):
    """A mixture of experts: a router, the experts' weights as parameters [experts, out, in], a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.o = nn.Linear(WIDTH, 3), ExpertWeights(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.experts(x, torch.softmax(self.router(x), -1)))


class ExpertWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, WIDTH)), nn.Parameter(torch.randn(3, WIDTH, 8))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        found = [F.linear(torch.tanh(F.linear(x, up)), down) for up, down in zip(self.up, self.down, strict=True)]
        return (torch.stack(found, -1) * shares.unsqueeze(-2)).sum(-1)


class Wide(nn.Module):
    """Two projections on one read, wide enough for kernels of quantized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.q(x)), self.k(x)], -1)
