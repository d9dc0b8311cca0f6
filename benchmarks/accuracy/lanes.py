"""Trainings of one model side by side: each weight that trains once per training, all others once for all.

A lane is one of them. `torch.func.vmap` runs the model as it is, adapters and all, over the stacked weights, so that
lanes share every GEMM with the frozen base. A lane learns what it would learn alone, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .descent import CLIP

__all__ = ["Lanes"]


class Lanes:
    """A model with so many values of what it trains.

    Args:
        model: its weights that require gradients train.
        starts: what those begin with, by name, a mapping for each lane.
    """

    def __init__(self, model: nn.Module, starts: Sequence[Mapping[str, Tensor]]) -> None:
        self.model = model
        self.weights = {
            name: torch.stack([start[name].detach() for start in starts]).to(weight.device).requires_grad_()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    def each(self, function: Callable[..., Tensor], *rows: Tensor, same: bool) -> Tensor:
        """What a function makes of the model in every lane [lanes, ...].

        Args:
            function: of the model and rows.
            rows: with a first dimension for the lanes.
            same: the rows have no such dimension: all lanes get these.
        """
        called = _Called(self.model, function)

        def one(weights: Mapping[str, Tensor], *rows: Tensor) -> Tensor:
            found: Tensor = functional_call(called, {f"model.{name}": weight for name, weight in weights.items()}, rows)
            return found

        given = (None if same else 0,) * len(rows)
        found: Tensor = vmap(one, in_dims=(0, *given), randomness="different")(self.weights, *rows)
        return found


class Descent:
    """AdamW without weight decay, where every lane has a learning rate of its own.

    AdamW proposes a step of rate one; of that each lane goes its part.

    Args:
        lanes: that learn.
        rates: by the name of a weight a learning rate for each lane [lanes].
    """

    def __init__(self, lanes: Lanes, rates: Mapping[str, Tensor]) -> None:
        self._weights = list(lanes.weights.values())
        self._rates = [
            rates[name].to(weight).view(-1, *[1] * (weight.dim() - 1)) for name, weight in lanes.weights.items()
        ]
        self._optimizer = torch.optim.AdamW(self._weights, lr=1.0, weight_decay=0.0)

    def step(self, losses: Tensor, part: float) -> None:
        """One step of every lane.

        Args:
            losses: [lanes].
            part: of the learning rates.
        """
        losses.sum().backward()  # a lane's loss knows no other lane's weights
        self._clip()
        before = [weight.detach().clone() for weight in self._weights]
        self._optimizer.step()
        with torch.no_grad():
            for weight, start, rate in zip(self._weights, before, self._rates, strict=True):
                weight.copy_(torch.lerp(start, weight, part * rate))
        self._optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, lane by lane."""
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
        factor = (CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))


class _Called(nn.Module):
    """A function of a model as a module, which is what has its weights replaced."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *rows: Any) -> Tensor:
        return self.function(self.model, *rows)
