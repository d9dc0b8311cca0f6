"""bitsandbytes' 4 bits (QLoRA, arXiv 2305.14314), in a layer or serialized.

weight    uint8, two codes a byte, the first in the high bits, of the flattened [N, K]
absmax    float32 [N·K / blocksize]; with double quantization uint8, which stands for code2[absmax] · absmax2 + offset
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flora_fx.quantized.weight import CODEBOOKS, QuantizedWeight

from .refusal import InexactError

__all__ = ["STATE", "read_serialized", "read_state", "undo_double"]

STATE = "quant_state.bitsandbytes__"
"""What a serialized state's key begins with, behind the weight's name."""


def undo_double(absmax: Tensor, code: Tensor, absmax2: Tensor, blocksize: int, offset: Tensor | float) -> Tensor:
    """Scales that were quantized themselves, in float32, as bitsandbytes computes them.

    >>> code = torch.tensor([0.0, 0.5, 1.0])
    >>> undo_double(torch.tensor([2, 1, 1], dtype=torch.uint8), code, torch.tensor([4.0, 8.0]), 2, 0.25)
    tensor([4.2500, 2.2500, 4.2500])
    """
    blocks = torch.arange(absmax.numel(), device=absmax.device) // blocksize
    found = code.to(torch.float32)[absmax.flatten().long()] * absmax2.to(torch.float32)[blocks]
    return found + offset


def read_state(weight: Tensor, state: Any) -> QuantizedWeight:
    """The weight of a live layer.

    Args:
        weight: the data of its ``Params4bit``.
        state: its ``QuantState``.

    Raises:
        InexactError: another codebook, or a last block that is not whole.
    """
    packed = bool(getattr(state, "packing_format_for_cpu", False))
    n, k = (int(size) for size in state.shape)
    absmax = state.absmax
    if packed:  # [K / blocksize, N]: what its CPU kernel reads
        absmax = absmax.t().reshape(-1)
    elif getattr(state, "nested", False):
        inner = state.state2
        absmax = undo_double(absmax, inner.code, inner.absmax, inner.blocksize, state.offset)
    codes = _from_cpu_order(weight, n, k) if packed else weight.detach().view(torch.uint8).reshape(-1)
    dtype = getattr(state, "original_dtype", state.dtype) if packed else state.dtype
    told = ", scales rounded to bfloat16 by its CPU kernel" if packed else ""
    return _weight(codes, absmax, state.code, state.quant_type, state.blocksize, (n, k), dtype, told)


def read_serialized(parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of one layer of a checkpoint.

    Args:
        parts: by what their keys end in: ``weight``, ``weight.absmax``, ``weight.quant_map``,
            ``weight.quant_state.bitsandbytes__nf4`` and so on.

    Raises:
        InexactError: as `read_state`; a part is missing, or says something else than the others.
    """
    state = next((tensor for key, tensor in parts.items() if key.startswith(f"weight.{STATE}")), None)
    if state is None or "weight.absmax" not in parts or "weight.quant_map" not in parts:
        raise InexactError("its quantization state is not complete")
    told = json.loads(bytes(state.tolist()).decode("utf-8"))
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        absmax = undo_double(
            absmax,
            parts["weight.nested_quant_map"],
            parts["weight.nested_absmax"],
            int(told["nested_blocksize"]),
            torch.tensor(told["nested_offset"], dtype=torch.float32),
        )
    n, k = told["shape"]
    dtype = getattr(torch, told["dtype"])
    codes = parts["weight"].view(torch.uint8).reshape(-1)
    return _weight(codes, absmax, parts["weight.quant_map"], told["quant_type"], told["blocksize"], (n, k), dtype, "")


def _weight(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    kind: Any,
    block: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    told: str,
) -> QuantizedWeight:
    if kind not in CODEBOOKS or not torch.equal(codebook.cpu().to(torch.float32), torch.tensor(CODEBOOKS[kind])):
        raise InexactError(f"its codebook is not that of NF4 or FP4 ({kind})")
    absmax = absmax.to(torch.float32).reshape(-1)
    if absmax.numel() * block != shape[0] * shape[1]:
        raise InexactError(f"its {absmax.numel()} blocks of {block} are not whole blocks of {shape[0]} × {shape[1]}")
    source = f"bitsandbytes {kind.upper()}, 4 bits, blocks of {block}{told}"
    if not bool(absmax.isfinite().all()):
        raise InexactError("a scale is NaN or infinite")
    return QuantizedWeight(kind, 4, block, codes, absmax, None, None, shape, dtype, source)


def _from_cpu_order(weight: Tensor, n: int, k: int) -> Tensor:
    """Codes as they were before bitsandbytes' CPU kernel reordered them: rows in 32s, two rows a byte."""
    rows = 32
    data = weight.detach().view(torch.uint8).reshape(n // rows, k // 2, rows)
    pairs = torch.cat([data & 15, data >> 4], -1).reshape(n // rows, k // 2, rows, 2)
    codes = pairs.transpose(1, 2).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]
