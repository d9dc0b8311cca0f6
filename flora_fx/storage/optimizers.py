"""torch's fused optimizers and parameters that are strided views of a pack.

On a CPU they take a parameter's memory for contiguous (torch 2.13): a step on columns of a wider matrix would write
over its neighbours. What requires gradients when it is packed is never stored so, but a model may be fused frozen and
trained later. So before a fused step such parameters move out of their packs; a fused graph notices that, and packs
them anew when it is called next.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["protect_from_fused_optimizers"]


@cache
def protect_from_fused_optimizers() -> None:
    """Watch the steps of all optimizers of this process, from now on."""
    register_optimizer_step_pre_hook(_move_out)


@torch.no_grad()
def _move_out(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            for parameter in group["params"]:
                if parameter.grad is not None and _is_gappy(parameter):
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


def _is_gappy(parameter: torch.Tensor) -> bool:
    """Whether a parameter's elements do not fill one piece of memory."""
    if parameter.layout is not torch.strided or parameter.device.type != "cpu":
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.numel() < extent
