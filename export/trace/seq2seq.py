"""An encoder-decoder as two programs, so that a prompt is encoded once.

encoder    input_ids, attention_mask -> keys and values of the decoder's cross-attention, layer by layer
decoder    input_ids, encoder_attention_mask, those, past -> logits, present

Of sound, the encoder makes fewer frames than there are samples, so it returns the decoder's mask as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from flora_fx.errors import ExportError

from ..rewrite.pruning import prune
from .capture import capture
from .encoder_inputs import EncoderInputs, find_encoder_inputs
from .example import token_ids, varied
from .running import run_on
from .traced import Traced, with_cache
from .whole_numbers import symbolic_int

__all__ = ["trace_seq2seq"]

_MASK = "encoder_attention_mask"


class _CrossAttention(nn.Module):
    """The encoder and, of the decoder, the projections of cross-attention that read the encoder's output.

    The whole decoder runs on one token; the cache holds what is wanted of it, and `prune` drops the rest.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.named(dict(zip(self.names, inputs, strict=True)))

    def named(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Cross keys and values, and the decoder's mask of them, if it is given one that is not ``attention_mask``."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = next(iter(inputs.values()))
        start = torch.zeros(first.shape[0], 1, dtype=torch.int64, device=first.device)
        with _decoder_mask(self.model) as seen:
            self.model(**inputs, decoder_input_ids=start, past_key_values=cache, use_cache=True)
        masks = [] if "input_ids" in inputs else [mask.long() for mask in seen[-1:] if mask is not None]
        return (*_flat(cache.cross_attention_cache), *masks)


class _Decoder(nn.Module):
    """Prefill and decode in one. The encoder's output itself is not read any more, only its shape is.

    Args:
        model: a private copy.
        encoded: what its encoder returned for some inputs.
        text: whether those were tokens, whose mask is the decoder's as it is.
    """

    def __init__(self, model: nn.Module, encoded: Any, text: bool) -> None:
        super().__init__()
        self.model = model
        self.text = text
        self.kind = type(encoded)
        self.width = int(encoded.last_hidden_state.shape[-1])

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, cross: tuple[Tensor, ...], past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(_pairs(past) or None), DynamicCache(_pairs(cross)))
        encoded = self.kind(last_hidden_state=cross[0].new_zeros(cross[0].shape[0], cross[0].shape[2], self.width))
        extra = {"attention_mask": mask} if self.text else {}
        with _decoder_mask(self.model, None if self.text else mask):
            out = self.model(
                decoder_input_ids=input_ids, encoder_outputs=encoded, past_key_values=cache, use_cache=True, **extra
            )
        return (out.logits, *_flat(cache.self_attention_cache))


@contextmanager
def _decoder_mask(model: Any, given: Tensor | None = None) -> Iterator[list[Tensor | None]]:
    """The masks of the encoder's output that a model's decoder gets meanwhile; ``given`` instead, if there is one."""
    seen: list[Tensor | None] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(kwargs.get(_MASK))
        return None if given is None else (args, {**kwargs, _MASK: given})

    handle = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _encoder_outputs(model: Any) -> Iterator[list[Any]]:
    """What a model's encoder returns meanwhile."""
    seen: list[Any] = []
    handle = model.get_encoder().register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def trace_seq2seq(model: nn.Module, examples: dict[str, Tensor]) -> Traced:
    """Capture an encoder-decoder.

    Args:
        model: a private copy.
        examples: what the encoder may be traced with: ``input_ids``, or the features of a speech model; made up where
            there are none.

    Returns:
        the decoder, with its encoder.

    Raises:
        ExportError: an input of another name, one that the model does not run on, or keys and values that are not
            [batch, heads, length, head_dim].
        NotCaptured: torch.export refuses the model.
    """
    name = type(model).__name__
    probe = _CrossAttention(model)
    given = find_encoder_inputs(model, probe.named, examples)
    remedy = f"pass example_inputs={{{given.main!r}: tensor with the batch in front}}, as its processor gives it"
    with _encoder_outputs(model) as encoded:
        cross = run_on(model, given.example, lambda: probe.named(given.example), remedy)
    masked = not given.is_text and given.has_mask and len(cross) % 2 == 1
    cross = cross[: len(cross) - masked]
    if not cross or not all(isinstance(kv, Tensor) and kv.dim() == 4 for kv in cross):
        raise ExportError(f"{name} keeps no keys and values of its encoder; it cannot be exported")
    if not hasattr(encoded[-1], "last_hidden_state"):
        raise ExportError(f"{name}'s encoder returns no last_hidden_state; it cannot be exported")
    encoder = _trace_encoder(model, given)

    batch, heads, length, width = cross[0].shape
    ids = token_ids(model, batch, 3)
    mask = ids.new_ones(batch, length) if given.is_text or masked else None
    past = tuple(kv.new_zeros(batch, kv.shape[1], 5, kv.shape[3]) for kv in cross)  # sizes that differ, none 0 or 1
    rows = Dim("batch")
    varies = given.time is not None
    reads: Any = Dim.DYNAMIC if varies else None
    decoder = capture(
        _Decoder(model, encoded[-1], given.is_text),
        (ids, mask, cross, past),
        (
            {0: rows, 1: Dim.DYNAMIC},
            None if mask is None else {0: rows, 1: reads},
            tuple({0: rows, 2: reads} if varies else {0: rows} for _ in cross),
            tuple({0: rows, 2: Dim.DYNAMIC} for _ in past),
        ),
    )
    layers = len(cross) // 2
    names = [f"{i}.{which}" for i in range(layers) for which in ("key", "value")]
    seen = "sequence" if given.is_text else "encoded"
    cross_axes = {f"cross_key_values.{name}": {0: "batch", 2: seen} if varies else {0: "batch"} for name in names}
    mask_axes = {_MASK: {0: "batch", 1: seen}}
    return with_cache(
        decoder,
        {"input_ids": {0: "batch", 1: "target"}, **({} if mask is None else mask_axes), **cross_axes},
        layers,
        heads,
        width,
        encoder=Traced(
            encoder,
            tuple(given.example),
            (*cross_axes, *([_MASK] if masked else [])),
            {**given.axes, **cross_axes, **mask_axes},
        ),
        example=varied(probe.named, given.other, 0) if given.other else {},
        needs_mask=given.needs_mask,
    )


def _trace_encoder(model: nn.Module, given: EncoderInputs) -> Any:
    wrapper = _CrossAttention(model, tuple(given.example))
    rows = Dim("batch")
    # DYNAMIC: learned positions have an upper limit, which a named dimension would have to know.
    shapes = [{axis: Dim.DYNAMIC if axis else rows for axis in given.axes[name]} for name in given.example]
    with nullcontext() if given.is_text else symbolic_int(model):
        program = capture(wrapper, tuple(given.example.values()), (tuple(shapes),))
    prune(program)
    return program


def _pairs(flat: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]


def _flat(cache: Any) -> tuple[Tensor, ...]:
    return tuple(kv for layer in cache.layers for kv in (layer.keys, layer.values))
