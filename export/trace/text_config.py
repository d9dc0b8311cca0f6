"""What a transformers config says of a model's text."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["max_positions", "text_config"]


def text_config(model: nn.Module) -> Any:
    """The config of a model's text part: its own, if it has no other parts."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_positions(model: nn.Module) -> int:
    """The most tokens that a model has positions for; 0 where there is no end."""
    text = text_config(model)
    # Whisper's decoder has its own.
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None) or 0
