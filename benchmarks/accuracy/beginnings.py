"""What the A of a LoRA may begin with besides what PEFT offers; an FFBA adapter's configuration says these itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["leading", "orthonormal"]


def orthonormal(model: Any) -> None:
    """Orthonormal rows, as ``FloraConfig(init="orthogonal")`` has them."""
    for _, _, down in _downs(model):
        nn.init.orthogonal_(down.weight)


def leading(model: Any) -> None:
    """The leading right singular vectors of the weight beside it, as ``FloraConfig(init="svd")`` has them."""
    from flora_fx.adapters.directions import begin_with_directions

    for name, module, down in _downs(model):
        begin_with_directions(down, [module.base_layer], name)


def _downs(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """The name of every layer with LoRAs, the layer, and each A."""
    for name, module in model.named_modules():
        for down in getattr(module, "lora_A", {}).values():
            yield name, module, down
