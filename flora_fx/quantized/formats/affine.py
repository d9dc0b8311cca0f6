"""From codes one an element to a `QuantizedWeight`: what GPTQ, AWQ, compressed-tensors and torchao have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_fx.quantized.weight import QuantizedWeight, pack_codes

from .packing import container, order_of
from .refusal import InexactError

__all__ = ["affine_weight"]


def affine_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    *,
    bits: int,
    block: int,
    dtype: torch.dtype,
    source: str,
) -> QuantizedWeight:
    """A weight of unsigned codes.

    Args:
        codes: [N, K], columns as W has them.
        scales: [N, blocks].
        zeros: [N, blocks], the codes that mean 0; None for half of the range.
        groups: [K], the group of each column; None where they are in order.
        bits: of the codes.
        block: columns of a group.
        dtype: what the source dequantizes to.
        source: for readers; the bits, groups and act-order are added.

    Raises:
        InexactError: unequal groups, zero points that are no codes, scales that are no finite numbers.
    """
    n, k = codes.shape
    held = container(bits)
    order = order_of(groups, k, block)
    if tuple(scales.shape) != (n, -(-k // block)) or (zeros is not None and zeros.shape != scales.shape):
        raise InexactError(f"it has scales for {list(scales.shape)} groups, and {-(-k // block)} groups a row of {k}")
    if not bool(scales.isfinite().all()):
        raise InexactError("a scale is NaN or infinite")
    half = 2 ** (bits - 1)
    zero = torch.full(scales.shape, half, device=codes.device) if zeros is None else zeros.to(torch.int32)
    if not bool(((zero >= 0) & (zero < 2**held)).all()):
        raise InexactError(f"a zero point is none of its {2**held} codes")
    default = bool((zero == 2 ** (held - 1)).all())
    told = f"{source}, {bits} bits, " + ("one group a row" if block >= k else f"groups of {block}")
    return QuantizedWeight(
        "affine",
        held,
        block,
        pack_codes(codes if order is None else codes[:, order], held, block),
        scales.contiguous(),
        None if default else zero.to(torch.uint8),
        order,
        (n, k),
        dtype,
        told if order is None else f"{told}, act-order",
    )
