"""A transformers model as a `torch.export` program with flat inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.errors import ExportError

from .attention import use_grouped_attention
from .decoder_tracing import Unsuited, trace_decoder
from .seq2seq import trace_seq2seq
from .source import Kind, private_copy
from .traced import PREFIX, Target, Traced, capture, text_config

__all__ = ["PREFIX", "Traced", "trace"]


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
        ExportError: the model's inputs cannot be guessed, the trace fails, or the model is not for the target.
    """
    if target == "decoder" and kind != "causal-lm":
        raise ExportError(f"{type(model).__name__} is no causal LM, so it is not for target 'decoder'; leave that out")
    if kind == "causal-lm" and (unknown := dict(example_inputs or {}).keys() - {"input_ids", "attention_mask"}):
        raise ExportError(f"example_inputs has {', '.join(sorted(unknown))}; a causal LM takes input_ids only")
    notes: tuple[str, ...] = ()
    if kind == "causal-lm" and target != "general":
        try:
            return trace_decoder(model, provider)
        except Unsuited as reason:
            if target is not None:
                raise ExportError(
                    f"{type(model).__name__} is not for target {target!r}: {reason}. Without target= it is exported "
                    "by the general route"
                ) from reason
            notes = (f"exported by the general route: {reason}",)
    twin = private_copy(model)
    use_grouped_attention(twin)
    tracers = {"causal-lm": _trace_causal_lm, "encoder": _trace_encoder, "seq2seq-lm": trace_seq2seq}
    try:
        return replace(tracers[kind](twin, dict(example_inputs or {})), notes=notes)
    except ExportError:
        raise
    except Exception as error:  # torch.export raises errors of many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"torch.export cannot capture {type(model).__name__}: {first}. Does its forward run, and run without "
            "Python branches on tensor values?"
        ) from error


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
    with torch.no_grad():
        _, *first = wrapper(ids, torch.ones_like(ids), ())
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
    )


# --- encoders ---------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """Named inputs in, the tensors of the model's output out."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], extra: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.extra = extra

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        out = self.model(**dict(zip(self.names, inputs, strict=True)), **self.extra)
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(*inputs).values())


def _trace_encoder(model: nn.Module, examples: dict[str, Tensor]) -> Traced:
    examples = examples or _guess_inputs(model)
    parameters = inspect.signature(model.forward).parameters
    if unknown := examples.keys() - parameters.keys():
        raise ExportError(f"{type(model).__name__} has no input {', '.join(sorted(unknown))} (in example_inputs)")
    extra: dict[str, Any] = {"return_dict": True}
    if "use_cache" in parameters:
        extra["use_cache"] = False
    names = tuple(examples)
    wrapper = _Encoder(model, names, extra)
    values = tuple(examples.values())
    with torch.no_grad():
        outputs = wrapper.named(*values)
    rows = Dim("batch")
    # Two-dimensional inputs are [batch, sequence]; an image's sides stay what its patches are made for. DYNAMIC: BERT
    # has an upper limit, which a named dimension would have to know.
    shapes = tuple({0: rows, 1: Dim.DYNAMIC} if value.dim() == 2 else {0: rows} for value in values)
    program = capture(wrapper, values, (shapes,))
    lengths = {value.shape[1] for value in values if value.dim() == 2}
    axes = {name: {0: "batch", 1: "sequence"} if v.dim() == 2 else {0: "batch"} for name, v in examples.items()}
    for name, value in outputs.items():
        sequence = value.dim() > 2 and value.shape[1] in lengths
        axes[name] = {0: "batch", 1: "sequence"} if sequence else {0: "batch"}
    return Traced(program, names, tuple(outputs), axes)


def _guess_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs by the model's main input; batch 2, so that it is not taken for a constant."""
    config = text_config(model)
    device = next(model.parameters()).device
    main = model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    if main == "input_ids":
        ids = torch.arange(2 * 7, device=device).reshape(2, 7) % config.vocab_size
        guessed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            guessed["token_type_ids"] = torch.zeros_like(ids)
        return {name: value for name, value in guessed.items() if name in parameters}
    if main == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.zeros(2, config.num_channels, height, width, dtype=dtype, device=device)}
    raise ExportError(
        f"{type(model).__name__} reads {main!r}, of which no example can be made up; "
        "pass example_inputs={name: tensor with the batch in front}"
    )
