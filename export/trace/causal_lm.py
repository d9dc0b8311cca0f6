"""A causal LM as a program of plain operators, with transformers' own cache: keys and values grow from run to run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.errors import ExportError

from .capture import capture
from .example import token_ids
from .running import run_on
from .switches import observed_switches
from .text_config import max_positions
from .traced import Traced, with_cache

__all__ = ["check_examples", "trace_causal_lm"]

_OWN_FORWARD = "its forward must run on token ids and an attention mask"


def check_examples(examples: Mapping[str, Tensor]) -> None:
    """Refuse example inputs that a causal LM does not take.

    Raises:
        ExportError: there are such.
    """
    if unknown := examples.keys() - {"input_ids", "attention_mask"}:
        raise ExportError(f"example_inputs has {', '.join(sorted(unknown))}; a causal LM takes input_ids only")


class _CausalLM(nn.Module):
    """Prefill and decode in one: input_ids, attention_mask, past -> logits, present."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        # No config: all layers are full ones. A sliding layer would bake its length into the trace; the mask
        # applies the window.
        cache = DynamicCache([(past[i], past[i + 1]) for i in range(0, len(past), 2)] or None)
        extra = {}
        if self.positions:
            # As `generate` makes them, so that left padding does not count.
            counted = attention_mask.cumsum(-1) - 1
            extra["position_ids"] = counted.masked_fill(attention_mask == 0, 0)[:, -input_ids.shape[1] :]
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra
        )
        return (out.logits, *(kv for layer in cache.layers for kv in (layer.keys, layer.values)))


def trace_causal_lm(model: nn.Module, examples: Mapping[str, Tensor]) -> Traced:
    """Capture a causal LM with plain operators.

    Args:
        model: a private copy.
        examples: ``input_ids`` [batch, seq] that the trace may use.

    Returns:
        prefill and decode in one: input_ids [batch, seq], attention_mask [batch, total], past keys and values
        [batch, kv_heads, past, head_dim] -> logits [batch, seq, vocab], present keys and values.

    Raises:
        ExportError: the model does not run on token ids and a mask, or keeps no keys and values.
        NotCaptured: torch.export refuses the model.
    """
    ids = examples.get("input_ids")
    if ids is None or min(ids.shape) < 2:
        ids = token_ids(model, 2, 3)
    batch, length = ids.shape
    past_length = length + 2
    wrapper = _CausalLM(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with observed_switches(model, max_positions(model)) as switches:
        _, *first = run_on(model, inputs, lambda: wrapper(*inputs.values(), ()), _OWN_FORWARD)
    if not first or not all(isinstance(kv, Tensor) and kv.dim() == 4 for kv in first):
        raise ExportError(f"{type(model).__name__} has no cache of keys and values; its decode cannot be exported")
    past = tuple(kv.new_zeros(batch, kv.shape[1], past_length, kv.shape[3]) for kv in first)
    mask = ids.new_ones(batch, past_length + length)
    rows, seq, old = Dim("batch"), Dim("sequence"), Dim("past")
    # AUTO: it is past + sequence, which torch.export finds, or a dimension of its own.
    shapes = ({0: rows, 1: seq}, {0: rows, 1: Dim.AUTO}, tuple({0: rows, 2: old} for _ in past))
    program = capture(wrapper, (ids, mask, past), shapes)
    return with_cache(
        program,
        {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}},
        len(past) // 2,
        first[0].shape[1],
        first[0].shape[3],
        switches=tuple(sorted(switches)),
    )
