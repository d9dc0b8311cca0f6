"""Packages that others import because they are installed, although nobody here needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["leave_out"]

_OF_QUANTIZED = ("bitsandbytes", "torchao")
"""PEFT and transformers import both, with torch's compiler: a fifth of the time that a small export takes."""


def leave_out(model: str, adapters: Iterable[str]) -> None:
    """Let packages for quantized weights be as if they were not installed, where a checkpoint has no such weights.

    For the rest of the process, and only before transformers and PEFT are there: they look once.

    Args:
        model: of the checkpoint. Of one that is not a directory here nothing is known.
        adapters: beside it, likewise.
    """
    if "transformers" in sys.modules or "peft" in sys.modules:
        return
    if _is_plain(Path(model) / "config.json") and all(_is_plain(Path(a) / "adapter_config.json") for a in adapters):
        for name in _OF_QUANTIZED:
            if name not in sys.modules:
                sys.modules[name] = None  # type: ignore[assignment]


def _is_plain(config: Path) -> bool:
    """Whether a config is there, and nothing in it speaks of quantized weights."""
    try:
        text = config.expanduser().read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError):
        return False
    # A start that is named, such as "loftq", may compute on quantized weights as the adapter is put there.
    named = isinstance(content, dict) and isinstance(content.get("init_lora_weights"), str)
    return "quant" not in text and not named
