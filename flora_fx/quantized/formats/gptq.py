"""GPTQ (arXiv 2210.17323), as AutoGPTQ and GPTQModel store it.

qweight   int32 [K · bits / 32, N]      codes along K
qzeros    int32 [groups, N · bits / 32] zero points along N: format "gptq" stores z - 1, "gptq_v2" z
scales    float16 [groups, N]
g_idx     int32 [K]                     the group of each row of qweight; not monotone with act-order
"""

from __future__ import annotations

import torch
from torch import Tensor

from flora_fx.quantized.weight import QuantizedWeight

from .affine import affine_weight
from .packing import unpack_words
from .refusal import InexactError

__all__ = ["read_gptq"]


def read_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, bits: int, group_size: int, v2: bool
) -> QuantizedWeight:
    """The weight of one layer.

    Args:
        bits, group_size: of the quantization config; a group of -1 is all of K.
        v2: whether zero points are stored as they are.

    Raises:
        InexactError: unequal groups, or a zero point of format "gptq" that its kernels do not agree on.
    """
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    if g_idx is not None:
        k = g_idx.shape[0]
    zeros = unpack_words(qzeros.t(), bits, n).to(torch.int32)
    if not v2:
        if bool((zeros == 2**bits - 1).any()):
            raise InexactError(
                f"a stored zero point of format 'gptq' is {2**bits - 1}: some kernels take it as {2**bits}, others as "
                "0; only format 'gptq_v2' says which it is"
            )
        zeros = zeros + 1
    return affine_weight(
        unpack_words(qweight, bits, k).t(),
        scales.t(),
        zeros,
        g_idx,
        bits=bits,
        block=k if group_size == -1 else group_size,
        dtype=scales.dtype,
        source="GPTQ",
    )
