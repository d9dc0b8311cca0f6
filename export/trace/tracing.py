"""A transformers model as a `torch.export` program with flat inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.errors import ExportError

from .capture import PREFIX, NotCaptured, Target, Traced, capture, max_positions, text_config
from .decoder import Unsuited, trace_decoder
from .encoder import trace_encoder
from .grouped_attention import use_grouped_attention
from .model import Kind, private_copy
from .running import run_on
from .seq2seq import trace_seq2seq
from .stateless_rope import forget_lengths
from .switches import observed_switches

__all__ = ["PREFIX", "Traced", "trace"]

_OWN_FORWARD = "its forward must run on token ids and an attention mask"
_WITHOUT_EXPORT = 'torch.compile(model, backend="flora") fuses adapters without a capture of the whole model'


def trace(
    model: nn.Module,
    kind: Kind,
    example_inputs: Mapping[str, Tensor] | None = None,
    target: Target | None = None,
    provider: str = "CPUExecutionProvider",
) -> Traced:
    """Capture a model; it is left as it was.

    Args:
        model: a transformers model.
        kind: of the model.
        example_inputs: by name, batch first, for an encoder whose inputs cannot be guessed. For a language
            model, ``input_ids`` [batch, seq] that the trace may use.
        target: for a causal LM; None for ``"decoder"`` where the model's attention is such, else ``"general"``.
        provider: the execution provider that it is for.

    Raises:
        ExportError: the model's inputs cannot be guessed, it does not run on those that are given, torch.export refuses
            it (then with the reason why target ``"decoder"`` did, too), or the model is not for the target.
    """
    if target == "decoder" and kind != "causal-lm":
        raise ExportError(f"{type(model).__name__} is no causal LM, so it is not for target 'decoder'; leave that out")
    if kind == "causal-lm" and (unknown := dict(example_inputs or {}).keys() - {"input_ids", "attention_mask"}):
        raise ExportError(f"example_inputs has {', '.join(sorted(unknown))}; a causal LM takes input_ids only")
    name = type(model).__name__
    unsuited: Unsuited | None = None
    if kind == "causal-lm" and target != "general":
        try:
            return trace_decoder(model, provider)
        except Unsuited as reason:
            if target is not None:
                raise ExportError(
                    f"{name} is not for target {target!r}: {reason}. Without target= the general route is taken"
                ) from reason
            unsuited = reason
    twin = private_copy(model)
    use_grouped_attention(twin)
    endless = forget_lengths(twin)
    tracers = {"causal-lm": _trace_causal_lm, "encoder": trace_encoder, "seq2seq-lm": trace_seq2seq}
    try:
        traced = tracers[kind](twin, dict(example_inputs or {}))
    except NotCaptured as refusal:
        general = f"torch.export cannot capture it ({refusal})"
        why = general if unsuited is None else f"for target 'decoder': {unsuited}; for target 'general': {general}"
        raise ExportError(f"{name} cannot be exported: {why}. {_WITHOUT_EXPORT}") from refusal
    notes = () if unsuited is None else (f"exported by the general route: {unsuited}",)
    return replace(traced, notes=(*traced.notes, *notes), endless=endless)


# --- causal language models -------------------------------------------------------------------------------


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


def _trace_causal_lm(model: nn.Module, examples: dict[str, Tensor]) -> Traced:
    device = next(model.parameters()).device
    ids = examples.get("input_ids")
    if ids is None or min(ids.shape) < 2:
        # Sizes 0 and 1 are special to torch.export; sizes that differ keep the dimensions apart.
        ids = torch.arange(2 * 3, device=device).reshape(2, 3) % text_config(model).vocab_size
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
    layers = len(past) // 2
    names = [f"{i}.{which}" for i in range(layers) for which in ("key", "value")]
    kv_axes = {0: "batch", 2: "past"}
    return Traced(
        program,
        ("input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)),
        ("logits", *(f"present.{name}" for name in names)),
        {
            "input_ids": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total"},
            **{f"past_key_values.{name}": kv_axes for name in names},
            "logits": {0: "batch", 1: "sequence"},
            **{f"present.{name}": {0: "batch", 2: "total"} for name in names},
        },
        layers,
        first[0].shape[1],
        first[0].shape[3],
        switches=tuple(sorted(switches)),
    )
