"""compressed-tensors, format "pack-quantized".

weight_packed       int32 [N, words]          codes + 2 ** (bits - 1) along K, the first in the lowest bits
weight_scale        float [N, groups]
weight_zero_point   int32 [words, groups]     likewise, along N; or int8 [N, groups]; none where symmetric
weight_shape        int64 [2]                 N, K
weight_g_idx        int32 [K]                 the group of each column, with act-order
"""

from __future__ import annotations

import torch
from torch import Tensor

from flora_fx.quantized.weight import QuantizedWeight

from .affine import affine_weight
from .packing import unpack_words
from .refusal import InexactError

__all__ = ["bits_of", "read_compressed"]


def bits_of(packed: Tensor, columns: int, known: set[int]) -> int:
    """Which of some numbers of bits a packed weight has.

    Raises:
        InexactError: none of them, or several may be.

    >>> bits_of(torch.zeros(3, 4, dtype=torch.int32), columns=32, known={4, 8})
    4
    """
    found = [bits for bits in sorted(known) if -(-columns // (32 // bits)) == packed.shape[1]]
    if len(found) != 1:
        raise InexactError(
            f"{packed.shape[1]} words a row of {columns} columns may hold codes of {found or 'no known'} bits"
        )
    return found[0]


def read_compressed(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, shape: Tensor, g_idx: Tensor | None, *, bits: int
) -> QuantizedWeight:
    """The weight of one layer.

    Args:
        bits: 4 or 8.

    Raises:
        InexactError: other bits, unequal groups.
    """
    if 32 % bits:
        raise InexactError(f"compressed-tensors with {bits} bits has no layout that is known")
    n, k = (int(size) for size in shape)
    codes = unpack_words(packed.t(), bits, k).t()
    scale = scale.expand(n, 1) if scale.numel() == 1 else scale.reshape(n, -1)
    half = 2 ** (bits - 1)
    zeros = None
    if zero_point is not None:
        packed_zeros = zero_point.dtype == torch.int32
        zeros = unpack_words(zero_point, bits, n).to(torch.int32) if packed_zeros else zero_point.to(torch.int32) + half
        zeros = zeros.reshape(-1, 1).expand(n, 1) if zeros.numel() == 1 else zeros.reshape(n, -1)
    if k % scale.shape[1]:
        raise InexactError(
            f"{scale.shape[1]} scales stand over {k} columns, so that its groups are not all of one size"
        )
    return affine_weight(
        codes,
        scale,
        zeros,
        # -1 throughout: there is an index, and no act-order
        None if g_idx is None or bool((g_idx == -1).all()) else g_idx,
        bits=bits,
        block=k // scale.shape[1],
        dtype=scale.dtype,
        source="compressed-tensors",
    )
