"""What each layer of a decoder asks its attention for: seen in one run, on which nothing attends.

What GroupQueryAttention cannot do is refused here, with the reason; a new variant of attention begins here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionRun, attending
from .example import token_ids
from .masks import CausalMask, classify_mask
from .refusals import Unsuited, first_line
from .text_config import text_config

__all__ = ["AttentionLayer", "survey"]

_WITHOUT_EFFECT = {"dropout", "position_ids", "cache_position", "sliding_window"}
"""Options of attentions that change nothing: what they say is in the mask, in the rotated keys, or of training."""


@dataclass(frozen=True)
class AttentionLayer:
    """What a layer's attention asks for.

    Attributes:
        heads, kv_heads: of queries; of keys and values.
        dim: the width of each.
        scale: of the scores.
        window: how many tokens each token sees, itself included; -1 for all before it.
        softcap: the scores' largest magnitude, by tanh; 0 for none.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    softcap: float


def survey(model: nn.Module) -> list[AttentionLayer]:
    """Run a model once and note what its layers ask for, in their order.

    Args:
        model: a private copy whose attention was replaced.

    Raises:
        Unsuited: GroupQueryAttention has no such thing, or layers attend in another way.
    """
    layers: list[AttentionLayer] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        layers.append(_asked(query, key, value, **options))
        return torch.zeros_like(query.transpose(1, 2))

    ids = token_ids(model, 1, 3)
    try:
        with torch.no_grad(), attending(AttentionRun(attend, classify_mask)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids * 0, use_cache=False)
    except Unsuited:
        raise
    except Exception as error:  # whatever a model does with a mask and attention weights that are none
        raise Unsuited(f"its attention could not be replaced ({first_line(error)})") from error
    expected = text_config(model).num_hidden_layers
    if len(layers) != expected:
        raise Unsuited(f"{len(layers)} of its {expected} layers attend through transformers' interface")
    _check_widths(layers)
    return layers


def _check_widths(layers: list[AttentionLayer]) -> None:
    for layer in layers:
        if layer.dim % 16:
            raise Unsuited(f"its heads are {layer.dim} wide; ONNX Runtime's GroupQueryAttention wants multiples of 16")
    if len({(layer.kv_heads, layer.dim) for layer in layers}) != 1:
        raise Unsuited("its layers have keys and values of different shapes")


def _asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> AttentionLayer:
    """What one layer asks for.

    Raises:
        Unsuited: GroupQueryAttention has no such thing.
    """
    if not isinstance(mask, CausalMask):
        raise Unsuited("its attention adds a mask of its own to the scores")
    if unknown := [
        name for name, value in options.items() if name not in _WITHOUT_EFFECT and isinstance(value, Tensor | float)
    ]:
        raise Unsuited(f"its attention takes {', '.join(unknown)}")
    if is_causal is False or not query.shape[2] == key.shape[2] == value.shape[2]:
        raise Unsuited("its attention is not that of a sequence to itself")
    dim = query.shape[3]
    if not key.shape[3] == value.shape[3] == dim or key.shape[1] != value.shape[1]:
        raise Unsuited("its queries, keys and values are of different widths")
    scale = dim**-0.5 if scaling is None else float(scaling)
    return AttentionLayer(query.shape[1], key.shape[1], dim, scale, mask.window, float(softcap or 0.0))
