"""How all trainings go down a loss: a schedule of the learning rate, and one step of an optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["CLIP", "scheduled", "step"]

CLIP = 1.0
"""The norm that gradients are clipped to."""


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer down a loss."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def scheduled(index: int, steps: int) -> float:
    """The learning rate's factor: up over the first tenth, then half a cosine down.

    >>> [round(scheduled(index, 20), 2) for index in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    warm_up = max(1, steps // 10)
    if index < warm_up:
        return (index + 1) / warm_up
    return (1 + math.cos(math.pi * (index - warm_up) / (steps - warm_up))) / 2
