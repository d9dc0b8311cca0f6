"""An encoder-decoder as two programs, so that a prompt is encoded once.

encoder    input_ids, attention_mask -> keys and values of the decoder's cross-attention, layer by layer
decoder    input_ids, encoder_attention_mask, those, past -> logits, present
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.errors import ExportError

from .pruning import prune
from .traced import Traced, capture, text_config

__all__ = ["trace_seq2seq"]


class _CrossAttention(nn.Module):
    """The encoder and, of the decoder, the projections of cross-attention that read the encoder's output.

    The whole decoder runs on one token; the cache holds what is wanted of it, and `prune` drops the rest.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = torch.zeros(inputs[0].shape[0], 1, dtype=torch.int64, device=inputs[0].device)
        named = dict(zip(self.names, inputs, strict=True))
        self.model(**named, decoder_input_ids=start, past_key_values=cache, use_cache=True)
        return _flat(cache.cross_attention_cache)


class _Decoder(nn.Module):
    """Prefill and decode in one. The encoder's output itself is not read any more, only its shape is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.width: int = text_config(model).hidden_size

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, cross: tuple[Tensor, ...], past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(_pairs(past) or None), DynamicCache(_pairs(cross)))
        encoded = cross[0].new_zeros(cross[0].shape[0], cross[0].shape[2], self.width)
        extra = {} if mask is None else {"attention_mask": mask}
        out = self.model(
            decoder_input_ids=input_ids, encoder_outputs=(encoded,), past_key_values=cache, use_cache=True, **extra
        )
        return (out.logits, *_flat(cache.self_attention_cache))


def trace_seq2seq(model: nn.Module, examples: dict[str, Tensor]) -> Traced:
    """Capture an encoder-decoder.

    Args:
        model: a private copy.
        examples: what the encoder may be traced with: ``input_ids``, or ``input_features`` of a speech model.

    Returns:
        the decoder, with its encoder.

    Raises:
        ExportError: an input of another name, or keys and values that are not [batch, heads, length, head_dim].
    """
    main = str(model.main_input_name)
    device = next(model.parameters()).device
    if unknown := examples.keys() - {main, "attention_mask"}:
        raise ExportError(f"example_inputs has {', '.join(sorted(unknown))}; this encoder-decoder takes {main} only")
    values = _inputs(model, main, examples.get(main))
    wrapper = _CrossAttention(model, tuple(values))
    with torch.no_grad():
        cross = wrapper(*values.values())
    if not cross or not all(isinstance(kv, Tensor) and kv.dim() == 4 for kv in cross):
        raise ExportError(f"{type(model).__name__} keeps no keys and values of its encoder; it cannot be exported")
    text = "attention_mask" in values
    rows = Dim("batch")
    # DYNAMIC: learned positions have an upper limit, which a named dimension would have to know.
    shape = {0: rows, 1: Dim.DYNAMIC} if text else {0: rows}
    encoder = capture(wrapper, tuple(values.values()), (tuple(shape for _ in values),))
    prune(encoder)

    batch, heads, length, width = cross[0].shape
    ids = torch.arange(batch * 3, device=device).reshape(batch, 3) % text_config(model).vocab_size
    mask = ids.new_ones(batch, length) if text else None
    past = tuple(kv.new_zeros(batch, kv.shape[1], 5, kv.shape[3]) for kv in cross)  # sizes that differ, none 0 or 1
    source: Any = Dim.DYNAMIC if text else None
    decoder = capture(
        _Decoder(model),
        (ids, mask, cross, past),
        (
            {0: rows, 1: Dim.DYNAMIC},
            {0: rows, 1: source} if text else None,
            tuple({0: rows, 2: source} if text else {0: rows} for _ in cross),
            tuple({0: rows, 2: Dim.DYNAMIC} for _ in past),
        ),
    )
    layers = len(cross) // 2
    names = [f"{i}.{which}" for i in range(layers) for which in ("key", "value")]
    inputs = {0: "batch", 1: "sequence"} if text else {0: "batch"}
    cross_axes = {f"cross_key_values.{name}": {0: "batch", 2: "sequence"} if text else {0: "batch"} for name in names}
    return Traced(
        decoder,
        (
            "input_ids",
            *(["encoder_attention_mask"] if text else []),
            *(f"cross_key_values.{name}" for name in names),
            *(f"past_key_values.{name}" for name in names),
        ),
        ("logits", *(f"present.{name}" for name in names)),
        {
            "input_ids": {0: "batch", 1: "target"},
            "encoder_attention_mask": inputs,
            **cross_axes,
            **{f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names},
            "logits": {0: "batch", 1: "target"},
            **{f"present.{name}": {0: "batch", 2: "total"} for name in names},
        },
        layers,
        heads,
        width,
        Traced(encoder, tuple(values), tuple(cross_axes), {**dict.fromkeys(values, inputs), **cross_axes}),
    )


def _inputs(model: nn.Module, main: str, example: Tensor | None) -> dict[str, Tensor]:
    """Examples for the encoder; sizes that differ keep the dimensions apart, and 0 and 1 are special."""
    config = text_config(model)
    parameter = next(model.parameters())
    if main == "input_ids":
        if example is None or min(example.shape) < 2:
            example = torch.arange(2 * 7, device=parameter.device).reshape(2, 7) % config.vocab_size
        return {"input_ids": example, "attention_mask": torch.ones_like(example)}
    if example is None:
        # Whisper's features have one length.
        example = parameter.new_zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    return {main: example}


def _pairs(flat: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


def _flat(cache: Any) -> tuple[Tensor, ...]:
    return tuple(kv for layer in cache.layers for kv in (layer.keys, layer.values))
