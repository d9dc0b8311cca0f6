"""Quantized weights made at random: what a layer computes with them is told in plain torch."""

from __future__ import annotations

import torch

from flora_fx.quantized import QuantizedWeight
from flora_fx.quantized.weight import pack_codes


def affine(
    n: int,
    k: int,
    *,
    bits: int = 4,
    block: int = 16,
    zeros: bool = True,
    ordered: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    order: torch.Tensor | None = None,
) -> tuple[QuantizedWeight, torch.Tensor]:
    """An affine weight, and the matrix [n, k] in float32 that it stands for, computed one number after the other."""
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-k // block)
    codes = torch.randint(0, 2**bits, (n, k), generator=draw)
    scales = (0.02 + 0.1 * torch.rand(n, blocks, generator=draw)).to(dtype)
    zero = torch.randint(0, 2**bits, (n, blocks), generator=draw) if zeros else torch.full((n, blocks), 2 ** (bits - 1))
    if ordered and order is None:
        order = torch.randperm(k, generator=draw)
    expected = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            group = column // block
            place = column if order is None else int(order[column])
            value = float(codes[row, column] - zero[row, group]) * float(scales[row, group])
            expected[row, place] = value
    weight = QuantizedWeight(
        *("affine", bits, block, pack_codes(codes, bits, block), scales),
        *(zero.to(torch.uint8) if zeros else None, order, (n, k), dtype, f"by hand, {bits} bits"),
    )
    return weight, expected


def codebook(n: int, k: int, *, kind: str = "nf4", block: int = 16, seed: int = 0) -> QuantizedWeight:
    """A weight of bitsandbytes' kind."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n * k // 2,), generator=draw).to(torch.uint8)
    scales = 0.02 + torch.rand(n * k // block, generator=draw)
    return QuantizedWeight(kind, 4, block, codes, scales, None, None, (n, k), torch.float32, f"by hand, {kind}")  # type: ignore[arg-type]
