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

__all__ = ["Lanes"]


class Lanes:
    """A model with so many values of what it trains.

    Args:
        model: its weights that require gradients train.
        starts: what those begin with, by name, a mapping for each lane.
        gained: names of weights that are multiplied by a number each, which trains as well.
    """

    def __init__(self, model: nn.Module, starts: Sequence[Mapping[str, Tensor]], gained: Sequence[str] = ()) -> None:
        self.model = model
        self.weights = {
            name: torch.stack([start[name].detach().to(weight.device) for start in starts]).requires_grad_()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        self._gains = {name: f"gain of {name}" for name in gained}
        for name, gain in self._gains.items():
            self.weights[gain] = torch.ones_like(self.weights[name][:, 0, 0]).requires_grad_()

    def each(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """What a function makes of the model in every lane [lanes, ...].

        Args:
            function: of the model and rows.
            rows: [lanes, ...].
        """
        called = _Called(self.model, function)

        def one(weights: dict[str, Tensor], *rows: Tensor) -> Tensor:
            gained = {name: weights[name] * weights.pop(gain) for name, gain in self._gains.items()}
            given = {f"model.{name}": weight for name, weight in (weights | gained).items()}
            found: Tensor = functional_call(called, given, rows)
            return found

        found: Tensor = vmap(one, randomness="different")(self.weights, *rows)
        return found


class _Called(nn.Module):
    """A function of a model as a module, which is what has its weights replaced."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *rows: Any) -> Tensor:
        return self.function(self.model, *rows)
