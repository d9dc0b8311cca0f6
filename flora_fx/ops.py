"""The one operation of fused graphs that torch has no name for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["accumulate", "accumulate_reference"]


def accumulate(y: Tensor, z: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """``y + scale · z @ upᵀ`` as one accumulating GEMM (``addmm``): no extra elementwise kernel.

    Args:
        y: [..., out], any strides.
        z: [..., rank], as many rows as y.
        up: [out, rank], an up-projection or several in one (block-diagonal) matrix.
        scale: the adapter's scaling.

    Returns:
        [..., out], contiguous, y's dtype. y is left as it was.

    >>> y, z, up = torch.ones(2, 5, 3), torch.ones(2, 5, 4), torch.ones(3, 4)
    >>> accumulate(y, z, up, 0.5)[0, 0].tolist()
    [3.0, 3.0, 3.0]
    """
    if has_torch_function((y, z, up)):  # a symbolic trace keeps this as one node
        return handle_torch_function(accumulate, (y, z, up), y, z, up, scale)
    if y.dim() == 2 and z.dim() == 2:
        return torch.addmm(y, z, up.t(), alpha=scale)
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), up.t(), alpha=scale)
    return rows.view(y.shape)


def accumulate_reference(y: Tensor, z: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """`accumulate` as an adapter's author writes it: the oracle of its tests.

    >>> y, z, up = torch.randn(7, 3), torch.randn(7, 2), torch.randn(3, 2)
    >>> torch.testing.assert_close(accumulate(y, z, up, 0.3), accumulate_reference(y, z, up, 0.3))
    """
    return y + (z.reshape(*y.shape[:-1], z.shape[-1]) @ up.transpose(0, 1)) * scale
