"""What the A of a LoRA may begin with besides what PEFT offers; an FFBA adapter's configuration says these itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["leading", "orthonormal"]


def orthonormal(model: Any) -> None:
    """Orthonormal rows, as ``FloraConfig(init="orthogonal")`` has them."""
    _begin(model, lambda down, _: nn.init.orthogonal_(down))


def leading(model: Any) -> None:
    """The leading right singular vectors of the weight beside it, as ``FloraConfig(init="svd")`` has them."""
    _begin(model, lambda down, weight: torch.linalg.svd(weight, full_matrices=False)[2][: len(down)])


@torch.no_grad()
def _begin(model: Any, of: Callable[[Tensor, Tensor], Tensor]) -> None:
    for module in model.modules():
        for down in getattr(module, "lora_A", {}).values():
            down.weight.copy_(of(down.weight, module.base_layer.weight))
