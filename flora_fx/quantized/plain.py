"""The way back: a model whose quantized layers are plain ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .linear import QuantizedLinear

__all__ = ["dequantize"]


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model with an `nn.Linear` for every `QuantizedLinear`: the same numbers, in several times the memory.

    For what needs weights in floating point: to merge an adapter, to train them, to put a DoRA beside them.

    Args:
        model: left as it is; the memory of all other weights is shared with it.
        dtype: of these layers; None for what each one's source dequantizes to.

    Returns:
        the copy.

    >>> from flora_fx.quantized import QuantizedWeight
    >>> weight = QuantizedWeight("affine", 8, 3, torch.ones(2, 3, dtype=torch.uint8), torch.ones(2, 1), None,
    ...     None, (2, 3), torch.float32, "by hand")
    >>> dequantize(nn.Sequential(QuantizedLinear(weight)))
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=False)
    )
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            memo[id(module)] = module.dequantize(dtype)
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        memo.update((id(buffer), buffer.detach()) for buffer in module._buffers.values() if buffer is not None)
    return copy.deepcopy(model, memo)
