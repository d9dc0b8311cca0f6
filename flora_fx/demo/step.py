"""One step of a decoder with its KV cache as plain tensors: what TTFT and TPOT are made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flora_fx.errors import require

__all__ = ["CachedStep"]


class CachedStep(nn.Module):
    """A causal language model as ``(tokens, *past) -> (logits, *present)``.

    A whole prompt and no past make the prefill; one token and a past make a decode step.

    Args:
        model: a transformers causal language model, or a PEFT model around one.

    Shapes:
        tokens: [batch, new]; past: key and value of each layer in turn, [batch, kv_heads, old, head_dim];
        logits: [batch, 1, vocabulary], of the last token; present: as past, with old + new tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = require("transformers", "hf").DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        output: Any = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        states = (state for layer in output.past_key_values.layers for state in (layer.keys, layer.values))
        return output.logits, *states
