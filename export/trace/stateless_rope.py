"""Rotary positions whose frequencies follow the length of a text (dynamic NTK scaling), as a function of that length.

transformers keeps the frequencies of the longest text so far in a buffer, and asks the data whether to renew them. A
text that grows from its beginning always has those of its own length:

up to max_position_embeddings tokens    the frequencies of a default rotary embedding
with n tokens beyond                    those of n tokens; keys that are cached keep theirs, as in transformers
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import require

__all__ = ["forget_lengths"]

_DYNAMIC = "dynamic"


def forget_lengths(model: nn.Module) -> bool:
    """Replace the rotary embeddings of a private model that remember lengths; others stay as they are.

    Returns:
        whether there is one.
    """
    found = [(name, module) for name, module in model.named_modules() if _remembers(module)]
    for name, module in found:
        model.set_submodule(name, _Stateless(module))
    return bool(found)


def _remembers(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    return _DYNAMIC in (kinds.values() if isinstance(kinds, dict) else (kinds,)) and hasattr(module, "config")


class _Stateless(nn.Module):
    """A rotary embedding of transformers, given the frequencies of each text; as it is called, so is this."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.kinds = module.rope_type
        # Then its forward reads its frequencies and does nothing else about them.
        module.rope_type = dict.fromkeys(self.kinds, "default") if isinstance(self.kinds, dict) else "default"
        self.module = module

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        named = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.kinds if layer_type is None else self.kinds[layer_type]
        if kind != _DYNAMIC:
            return self.module(x, position_ids, **named)
        rope = require("transformers.modeling_rope_utils", "hf")
        length = position_ids.max() + 1
        longer, _ = rope.ROPE_INIT_FUNCTIONS[kind](self.module.config, x.device, seq_len=length, **named)
        prefix = "" if layer_type is None else f"{layer_type}_"
        own = self.module.get_buffer(f"{prefix}original_inv_freq")
        frequencies = torch.where(length > self.module.original_max_seq_len, longer, own)
        return torch.func.functional_call(
            self.module, {f"{prefix}inv_freq": frequencies}, (x, position_ids), kwargs=named
        )
