"""One forward of a decoder over a static KV cache: what TTFT and TPOT are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .settings import SHAPES, Settings

__all__ = ["CachedStep", "empty_cache"]


class CachedStep(nn.Module):
    """A causal language model as ``(tokens, position, *cache) -> logits``; the cache is written in place.

    This is transformers' own static cache (what ``generate(cache_implementation="static")`` uses, and what compiled
    decoding needs), with its tensors as plain arguments: so one step runs live, captured, compiled and as a CUDA graph.

    Args:
        model: a transformers causal language model, or a PEFT model around one.

    Shapes:
        tokens: [batch, new]; position: scalar int64, tokens that are in the cache already; cache: keys and values of
        each layer in turn, [batch, kv_heads, capacity, head_dim]; logits: [batch, vocabulary], of the last token.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, position: Tensor, *cache: Tensor) -> Tensor:
        from transformers.cache_utils import Cache, StaticLayer

        layers = []
        for keys, values in zip(cache[::2], cache[1::2], strict=True):
            layer = StaticLayer(keys.shape[2])
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.cumulative_length = position.clone()  # the layer counts on in place
            layer.is_initialized = True
            layers.append(layer)
        out: Any = self.model(input_ids=tokens, past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits[:, -1]


def empty_cache(settings: Settings, capacity: int, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Keys and values of every layer, zero, [batch, kv_heads, capacity, head_dim] each."""
    shape: Any = SHAPES[settings.shape]
    size = (settings.batch, shape["num_key_value_heads"], capacity, shape["head_dim"])
    dtype = dtype or settings.torch_dtype
    return [torch.zeros(size, dtype=dtype, device=settings.device) for _ in range(2 * settings.depth)]
