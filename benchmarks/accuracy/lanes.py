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
        squares = torch.stack([gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients]).sum(0)
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
