"""How trainings go down a loss, alone and in lanes: a schedule of the learning rate, and steps of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["CLIP", "Descent", "scheduled", "step"]

CLIP = 1.0
"""The norm that gradients are clipped to."""


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer down a loss."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Descent:
    """AdamW without weight decay, where every lane has a learning rate of its own.

    AdamW proposes a step of rate one; of that each lane goes its part.

    Args:
        weights: that learn, by name [lanes, ...].
        rates: by the same names a learning rate for each lane [lanes].
    """

    def __init__(self, weights: Mapping[str, Tensor], rates: Mapping[str, Tensor]) -> None:
        self._weights = list(weights.values())
        self._rates = [rates[name].to(weight).view(-1, *[1] * (weight.dim() - 1)) for name, weight in weights.items()]
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


def scheduled(index: int, steps: int) -> float:
    """The learning rate's factor: up over the first tenth, then half a cosine down.

    >>> [round(scheduled(index, 20), 2) for index in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    warm_up = max(1, steps // 10)
    if index < warm_up:
        return (index + 1) / warm_up
    return (1 + math.cos(math.pi * (index - warm_up) / (steps - warm_up))) / 2
