"""What A may begin with besides what configurations offer: orthonormal rows, or directions of the base's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["leading", "orthonormal"]


def orthonormal(model: Any) -> None:
    """The rows of every LoRA's A begin orthonormal; of FFBA adapters the configuration can say so."""
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            nn.init.orthogonal_(weight)


@torch.no_grad()
def leading(model: Any) -> None:
    """The rows of every A begin as what the weights beside it amplify most: their leading right singular vectors.

    Args:
        model: with LoRAs or FFBA adapters; the latter's A reads for several projections, whose weights are stacked.
    """
    for down, weights in _reading(model):
        *_, directions = torch.linalg.svd(torch.cat(weights), full_matrices=False)
        down.copy_(directions[: len(down)])


def _reading(model: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Every A [r, in], with the weights [out, in] that read the same."""
    from flora_fx.adapters.blocks import find_blocks

    for module in model.modules():
        for adapter in getattr(module, "lora_A", {}):
            yield module.lora_A[adapter].weight, [module.base_layer.weight]
    for adapter, config in model.peft_config.items():
        if config.peft_type.value == "FLORA":
            base = model.base_model.model
            for block in find_blocks(base, config):
                first = [base.get_submodule(name) for name in block.first]
                yield first[0].flora_A[adapter].weight, [_base(module).weight for module in first]


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)
