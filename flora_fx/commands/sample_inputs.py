"""Inputs that a transformers model can be captured with; which ones does not matter to what fuses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from flora_fx.errors import CaptureError

__all__ = ["sample_inputs"]

_ROWS = 2
_SAMPLES = 16_000  # a second of speech


def sample_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Made-up inputs of a transformers model, or of a PEFT model around one: tokens, pixels or sound, by its config.

    Args:
        model: encoders, causal LMs, encoder-decoders. One that reads images beside text gets the text alone if it
            generates, both if it does not.

    Returns:
        by name, batch first; floats in the dtype of the model.

    Raises:
        CaptureError: the model reads something that its config does not describe.

    >>> import transformers
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    >>> bert = transformers.BertModel(transformers.BertConfig(**sizes))
    >>> {name: tuple(value.shape) for name, value in sample_inputs(bert).items()}
    {'input_ids': (2, 8), 'attention_mask': (2, 8)}
    """
    around: Any = model
    core = around.get_base_model() if hasattr(around, "get_base_model") else around
    config, main = core.config, core.main_input_name
    text = config.get_text_config(decoder=True) if getattr(config, "is_encoder_decoder", False) else _text(config)
    parameters = inspect.signature(core.forward).parameters
    device = next(core.parameters()).device
    tokens = torch.arange(_ROWS * 8, device=device).reshape(_ROWS, 8) % (getattr(text, "vocab_size", None) or 1)
    if main == "input_ids":
        found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if "pixel_values" in parameters and not core.can_generate() and hasattr(config, "vision_config"):
            found["pixel_values"] = _floats(core, main, _pixels(config))
        found = {name: value for name, value in found.items() if name in parameters}
    else:
        found = {main: _floats(core, main, _features(config, main))}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        found["decoder_input_ids"] = tokens[:, :3]
    return found


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _floats(core: Any, name: str, sizes: tuple[Any, ...] | None) -> Tensor:
    if sizes is None or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CaptureError(
            f"{type(core).__name__} reads {name!r}, of which its config does not tell the sizes; pass example inputs"
        )
    parameter = next(core.parameters())
    return torch.zeros(sizes, dtype=parameter.dtype, device=parameter.device)


def _features(config: Any, name: str) -> tuple[Any, ...] | None:
    """Sizes by the conventions of transformers' feature extractors."""
    if name == "pixel_values":
        return _pixels(config)
    bins = getattr(config, "num_mel_bins", None)
    if name == "input_values":
        frames = getattr(config, "max_length", None)
        return (_ROWS, frames, bins) if bins and isinstance(frames, int) else (_ROWS, _SAMPLES)
    if name == "input_features" and bins and hasattr(config, "max_source_positions") and not _per_channel(config):
        return (_ROWS, bins, 2 * config.max_source_positions)
    if name == "input_features":
        width = _per_channel(config) or getattr(config, "feature_projection_input_dim", None)
        return (_ROWS, 64, width)
    return None


def _per_channel(config: Any) -> int | None:
    """The width of Speech2Text's features."""
    width = getattr(config, "input_feat_per_channel", None)
    return width * config.input_channels if width else None


def _pixels(config: Any) -> tuple[Any, ...] | None:
    parts = (config, *(getattr(config, name, None) for name in ("vision_config", "encoder", "backbone_config")))
    vision = next((part for part in parts if getattr(part, "image_size", None)), None)
    if vision is None:
        return None
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return (_ROWS, getattr(vision, "num_channels", 3), height, width)
