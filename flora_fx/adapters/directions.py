"""What A may begin with: the directions that the base's weights beside it amplify most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from flora_fx.errors import AdapterError

__all__ = ["begin_with_directions"]


@torch.no_grad()
def begin_with_directions(down: Any, beside: Sequence[nn.Module], name: str) -> None:
    """Make the rows of A the leading right singular vectors of some weights, stacked.

    Args:
        down: A, a linear layer [r, in].
        beside: linear layers that read the same; quantized ones are dequantized for it, one after the other.
        name: of what reads, for messages.

    Raises:
        AdapterError: the rank is larger than A is wide, or a layer does not show its weight.
    """
    rank, width = down.weight.shape
    if rank > width:
        raise AdapterError(
            f"FloraConfig(r={rank}, init='svd'): {name} reads {width} features, which have no more than {width} "
            "directions; lower r or use init='lora'"
        )
    dtype = torch.promote_types(down.weight.dtype, torch.float32)
    gram = torch.zeros(width, width, dtype=dtype, device=down.weight.device)
    for module in beside:
        matrix = _matrix(module, name).to(gram)
        gram += matrix.T @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors  # by eigenvalue, the largest last
    down.weight.copy_(vectors[:, -rank:].flip(1).T)


def _matrix(module: Any, name: str) -> Tensor:
    """A layer's weight [out, in]."""
    from transformers.pytorch_utils import Conv1D

    weight = dequantize_module_weight(module) if hasattr(module, "weight") else None
    if weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise AdapterError(
            f"FloraConfig(init='svd') needs the weights that read what {name} reads, and a {type(module).__name__} "
            "does not show them; use init='orthogonal'"
        )
    found: Tensor = weight
    return found.T if isinstance(module, Conv1D) else found
