"""The operators of a quantized linear layer: one node in every graph, whatever the weight's format.

They compute in PyTorch, on any device: the weight is dequantized at each call. What runs them faster replaces the node.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight import values_of

__all__ = ["OPERATOR", "dequantized", "quantized_linear"]


@torch.library.custom_op("flora_fx::dequantized", mutates_args=())
def dequantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: str,
    bits: int,
    block: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in] that codes stand for, computed in float32 and rounded once to ``dtype``.

    Arguments are those of `flora_fx.quantized.weight.QuantizedWeight`.
    """
    return values_of(codes, scales, zeros, order, kind, bits, block, (out_features, in_features)).to(dtype)


@dequantized.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    kind: str,
    bits: int,
    block: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((out_features, in_features), dtype=dtype)


@torch.library.custom_op("flora_fx::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    kind: str,
    bits: int,
    block: int,
    out_features: int,
) -> Tensor:
    """``x @ Wᵀ + bias`` over a weight that is held quantized.

    Args:
        x: [..., in], of a floating-point dtype: the weight is rounded to it once.
        codes, scales, zeros, order, kind, bits, block: as `flora_fx.quantized.weight.QuantizedWeight` has them.
        bias: [out] or None.
        out_features: rows of the weight.

    Returns:
        [..., out], x's dtype. It has gradients with respect to x and the bias; the weight is frozen.

    Raises:
        TypeError: x is of no floating-point dtype.
    """
    _require_floats(x)
    weight = values_of(codes, scales, zeros, order, kind, bits, block, (out_features, x.shape[-1])).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@quantized_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    kind: str,
    bits: int,
    block: int,
    out_features: int,
) -> Tensor:
    _require_floats(x)
    return x.new_empty((*x.shape[:-1], out_features))


def _require_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"a quantized linear layer takes floating-point numbers, not {x.dtype}")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, order, bias, *ctx.how = inputs
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scales, zeros, order)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales, zeros, order = ctx.saved_tensors
    kind, bits, block, out_features = ctx.how
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        of = (kind, bits, block, out_features, ctx.in_features, dy.dtype)
        dx = dy @ torch.ops.flora_fx.dequantized(codes, scales, zeros, order, *of)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        dbias = dy.reshape(-1, out_features).sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, None, dbias, None, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_keep)

OPERATOR = torch.ops.flora_fx.quantized_linear.default
"""What a node of a graph calls."""
