"""Writers of other tools' layouts, each by its own loop over numbers; none shares code with the readers."""

from __future__ import annotations

import torch
from torch import Tensor

Parts = dict[str, Tensor]


def _drawn(n: int, k: int, bits: int, block: int, seed: int, zero_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, groups] and zero points [N, groups]."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-k // block)
    codes = torch.randint(0, 2**bits, (n, k), generator=draw)
    scales = (0.01 + 0.05 * torch.rand(n, groups, generator=draw)).half()
    return codes, scales, torch.randint(0, zero_top, (n, groups), generator=draw)


def _numbers(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """What they stand for, in float32."""
    return (codes - zeros[:, groups]).float() * scales[:, groups].float()


def _stream(columns: list[list[int]], bits: int) -> Tensor:
    """Numbers of each column one behind the other in a stream of bits, cut into words: int32 [words, columns]."""
    words = []
    for numbers in columns:
        stream = sum(number << (bits * index) for index, number in enumerate(numbers))
        count = -(-bits * len(numbers) // 32)
        words.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return torch.tensor(words, dtype=torch.int64).t().contiguous().to(torch.int32)


def gptq(
    n: int,
    k: int,
    *,
    bits: int = 4,
    block: int = 32,
    v2: bool = False,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
    order_seed: int = 7,
) -> tuple[Parts, Tensor]:
    """A layer of GPTQ, and its weight [N, K]."""
    codes, scales, zeros = _drawn(n, k, bits, block, seed, 2**bits - 1)
    zeros = zeros + 1 if not symmetric else torch.full_like(zeros, 2 ** (bits - 1))
    if v2 and not symmetric:
        zeros[0, 0] = 0
    zeros = zeros.clamp(max=2**bits - 1)
    groups = torch.arange(k) // block
    if act_order:
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(order_seed))]
    stored = zeros if v2 else zeros - 1
    parts = {
        "qweight": _stream(codes.tolist(), bits),
        "qzeros": _stream(stored.t().tolist(), bits).t().contiguous(),
        "scales": scales.t().contiguous(),
        "g_idx": groups.to(torch.int32),
    }
    return parts, _numbers(codes, scales, zeros, groups)


def awq(n: int, k: int, *, block: int = 32, seed: int = 0) -> tuple[Parts, Tensor]:
    """A layer of AWQ, version GEMM, and its weight."""
    codes, scales, zeros = _drawn(n, k, 4, block, seed, 16)

    def packed(rows: Tensor) -> Tensor:
        found = torch.zeros(rows.shape[0], rows.shape[1] // 8, dtype=torch.int64)
        for word in range(found.shape[1]):
            for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                found[:, word] |= rows[:, 8 * word + column].long() << (4 * place)
        return found.to(torch.int32)

    parts = {"qweight": packed(codes.t()), "qzeros": packed(zeros.t()), "scales": scales.t().contiguous()}
    return parts, _numbers(codes, scales, zeros, torch.arange(k) // block)


def compressed(
    n: int,
    k: int,
    *,
    bits: int = 4,
    block: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Parts, Tensor]:
    """A layer of compressed-tensors, format "pack-quantized", and its weight."""
    codes, scales, zeros = _drawn(n, k, bits, block, seed, 2**bits)
    scales = scales.to(dtype)
    groups = torch.arange(k) // block
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    parts = {
        "weight_packed": _stream(codes.tolist(), bits).t().contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        parts["weight_zero_point"] = _stream(zeros.t().tolist(), bits)
    if act_order:
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(7))]
        parts["weight_g_idx"] = groups.to(torch.int32)
    return parts, _numbers(codes, scales, zeros, groups)
