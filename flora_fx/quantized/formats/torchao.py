"""torchao's integer tensors, weights only: codes one an int8 element, [N, K], with scales and zero points a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora_fx.quantized.weight import QuantizedWeight

from .affine import affine_weight
from .refusal import InexactError

__all__ = ["TENSORS", "read_torchao"]

TENSORS = ("IntxUnpackedToInt8Tensor", "Int8Tensor")
"""The classes that are read."""

_ON_ACTIVATIONS = ("activation_quantization", "act_quant_kwargs", "act_pre_scale", "act_quant_scale")


def read_torchao(tensor: Any) -> QuantizedWeight:
    """The weight that such a tensor is.

    Args:
        tensor: of one of the classes `TENSORS`.

    Raises:
        InexactError: activations are quantized, too; zero points that are no integers; blocks that do not divide rows.
    """
    if any(getattr(tensor, name, None) is not None for name in _ON_ACTIVATIONS):
        raise InexactError("it quantizes or scales its activations, too")
    rows, block = tensor.block_size
    target = str(getattr(tensor, "target_dtype", torch.int8)).removeprefix("torch.int")
    bits = int(target)
    half = 2 ** (bits - 1)
    zeros = None
    if tensor.zero_point is not None:
        if not torch.equal(tensor.zero_point, tensor.zero_point.round()):
            raise InexactError("it has float zero points, which are no codes")
        zeros = _each_row(tensor.zero_point, rows).to(torch.int32)
        if bool(((zeros < -half) | (zeros >= half)).any()):
            bits, half = 8, 128
        zeros = zeros + half
    return affine_weight(
        (tensor.qdata.to(torch.int16) + half).to(torch.uint8),
        _each_row(tensor.scale, rows),
        zeros,
        None,
        bits=bits,
        block=int(block),
        dtype=tensor.dtype,
        source=f"torchao int{target}",
    )


def _each_row(blocks: Tensor, rows: int) -> Tensor:
    """[N / rows, blocks] -> [N, blocks]."""
    return blocks.repeat_interleave(rows, 0)
