"""Attention as a trace for ONNX Runtime should hold it: few nodes, no copies of keys and values.

sdpa           repeat(k), repeat(v) -> q·√s, kᵀ·√s -> MatMul -> + mask -> Softmax -> where NaN -> MatMul
here           q·s -> MatMul(q, kᵀ) -> + mask -> Softmax -> MatMul
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require

__all__ = ["grouped_attention", "use_grouped_attention"]

_NAME = "flora_fx"
_LIKE_SDPA = ("sdpa", "flash", "flex", "paged")


def use_grouped_attention(model: nn.Module) -> None:
    """Let a (private) transformers model compute its attention with `grouped_attention`.

    Models that ask for ``"eager"`` keep it: some of them add what SDPA has not (soft caps, sinks).
    """
    transformers = require("transformers", "hf")
    asked = str(getattr(model.config, "_attn_implementation", None))
    if not asked.startswith(_LIKE_SDPA) or not getattr(model, "_supports_sdpa", False):
        return
    transformers.AttentionInterface.register(_NAME, grouped_attention)
    transformers.AttentionMaskInterface.register(_NAME, transformers.AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(_NAME)  # type: ignore[operator]


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' ``sdpa_attention_forward`` computes, heads that share keys computed together.

    A row that may attend to nothing (left padding) gets the mean of all values instead of NaN; nothing reads it.

    Args:
        module: the attention layer.
        query: [batch, heads, seq, head_dim].
        key, value: [batch, kv_heads, total, head_dim].
        attention_mask: [batch, 1, seq, total], boolean (True: attend) or additive.
        position_bias: [1, heads, seq, total], added to the scores, as T5 does.

    Returns:
        [batch, seq, heads, head_dim], and no attention weights.
    """
    if attention_mask is None or attention_mask.shape[1] != 1:
        sdpa = require("transformers.integrations.sdpa_attention", "hf").sdpa_attention_forward
        result: tuple[Tensor, None] = sdpa(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )
        return result
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    query = query if scale == 1 else query * scale  # T5 does not scale
    if attention_mask.dtype == torch.bool:
        # Half the smallest number: a score on top of it cannot overflow to -inf, nor a row of them to NaN.
        low = torch.finfo(query.dtype).min / 2
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, low)
    if position_bias is not None:
        attention_mask = attention_mask + position_bias
    if heads == kv_heads:
        scores = query @ key.transpose(-1, -2) + attention_mask
        mixed = scores.softmax(-1) @ value
    else:
        # [b, heads, s, d] -> [b, kv_heads, group · s, d] is free, while repeating the keys would copy them all.
        rows = query.reshape(batch, kv_heads, -1, width)
        scores = (rows @ key.transpose(-1, -2)).reshape(batch, heads, length, -1) + attention_mask
        weights = scores.softmax(-1).reshape(batch, kv_heads, heads // kv_heads * length, -1)
        mixed = (weights @ value).reshape(batch, heads, length, -1)
    return mixed.transpose(1, 2), None
