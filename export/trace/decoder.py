"""A causal LM captured with ONNX Runtime's attention: one `group_query_attention` a layer, no mask, no repeated keys.

The model runs twice with an attention of our own (`attention`). First eagerly, to see what each layer asks for
(`survey`, `masks`); what GroupQueryAttention cannot do is refused then, with a reason. Then under `torch.export`, where
each layer's keys and values go through the operator instead of transformers' cache, and rotary positions are rows of
tables (`rotary_tables`); of layers that compute alike one is traced (`by_layer`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from flora_fx.decoder_ops import group_query_attention, positions

from ..rewrite.rotary import absorb_rotary, count_rotary, reads_positions
from .attention import AttentionRun, attending, replace_attention
from .by_layer import capture_by_layer, shorten
from .example import token_ids
from .model import private_copy
from .refusals import NotCaptured, Unsuited
from .rotary_tables import switches_of, tabulate_rotary
from .shapes_alone import for_shapes
from .survey import AttentionLayer, survey
from .traced import Traced, with_cache

__all__ = ["trace_decoder"]


def trace_decoder(model: nn.Module, provider: str = "CPUExecutionProvider") -> Traced:
    """Capture a causal LM; it is left as it was.

    Args:
        model: a transformers model in eval mode.
        provider: the execution provider that it is for.

    Returns:
        prefill and decode in one: input_ids [batch, seq], attention_mask [batch, total], past keys and values
        [batch, kv_heads, past, dim] -> logits [batch, seq, vocab], present keys and values.

    Raises:
        Unsuited: it cannot be computed by GroupQueryAttention.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsuited("its forward takes no position_ids")
    private = private_copy(model)
    replace_attention(private)
    tabulate_rotary(private)
    layers = for_shapes(private, lambda: survey(private))
    if provider == "CUDAExecutionProvider" and next(model.parameters()).dtype == torch.float32:
        raise Unsuited("GroupQueryAttention has no float32 kernel on CUDA (dtype=torch.float16 has one)")
    program = _captured(private, layers)
    outside = ("rotary positions are computed outside of the attention",) if count_rotary(program) else ()
    return with_cache(
        program,
        {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}},
        len(layers),
        layers[0].kv_heads,
        layers[0].dim,
        notes=outside,
        switches=switches_of(private),
    )


def _captured(model: nn.Module, layers: list[AttentionLayer]) -> ExportedProgram:
    before = 5
    ids = token_ids(model, 2, 3)
    batch, length = ids.shape
    mask = ids.new_ones(batch, before + length)
    keys = next(model.parameters()).new_zeros
    past = tuple(keys(batch, layer.kv_heads, before, layer.dim) for layer in layers for _ in ("key", "value"))
    rows, seq, total, old = Dim("batch"), Dim("sequence"), Dim("total"), Dim("past")
    shapes = ({0: rows, 1: seq}, {0: rows, 1: total}, tuple({0: rows, 2: old} for _ in past))
    decoder = _Decoder(model, layers)
    try:
        return capture_by_layer(decoder, (ids, mask, past), shapes, decoder.shortened, _rotate_in_attention)
    except NotCaptured as refusal:
        raise Unsuited(f"torch.export cannot capture it so ({refusal})") from refusal


def _rotate_in_attention(program: ExportedProgram) -> None:
    if not reads_positions(program):
        raise Unsuited("it makes positions of its own")
    absorb_rotary(program)


class _Decoder(nn.Module):
    """Prefill and decode in one, keys and values by way of `group_query_attention`.

    Args:
        model: a private copy whose attention was replaced.
        layers: what each of its layers asks for.
    """

    def __init__(self, model: nn.Module, layers: list[AttentionLayer]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def shortened(self, path: str, kept: Sequence[int]) -> _Decoder:
        """The same with some of its layers, which are in the list at ``path``."""
        private: Any = shorten(self, path, kept)
        private.layers = [self.layers[index] for index in kept]
        decoder: _Decoder = private
        return decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seqlens = (attention_mask.sum(1) - 1).to(torch.int32)
        total = attention_mask.shape[1]

        def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
            index = len(run.present) // 2
            layer = self.layers[index]
            flat = (x.transpose(1, 2).flatten(2) for x in (query, key, value))
            past_key, past_value = past[2 * index], past[2 * index + 1]
            numbers = (layer.heads, layer.kv_heads, layer.scale, layer.window, layer.softcap, False)
            out, *present = group_query_attention(*flat, past_key, past_value, seqlens, total, None, None, *numbers)
            run.present.extend(present)
            return out.unflatten(-1, (layer.heads, layer.dim))

        run = AttentionRun(attend, lambda **_: None, seqlens.max() + 1)
        with attending(run):
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions(seqlens, input_ids),
                use_cache=False,
            )
        return (out.logits, *run.present)
