"""How long a text onnxruntime-genai may be told to make.

Where rotary positions change for the whole text, the keys that it has kept mean nothing, and it goes on with them. It
knows one exception (0.18): models of the types of Phi-3 at 4,096 tokens, where it runs the text of one row again.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["genai_context"]

_RUNS_AGAIN = {"phi3": 4096, "phimoe": 4096}


def genai_context(model_type: str, positions: int, switches: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """The longest text, and what a reader should know of it.

    Args:
        model_type: as in ``genai_config.json``.
        positions: of the model.
        switches: after how many tokens its rotary positions change, see `export.trace.switches`.

    >>> genai_context("llama", 128, [32])[0], genai_context("phi3", 131072, [4096])[0], genai_context("llama", 128, [])
    (32, 131072, (128, ()))
    """
    if not switches:
        return positions, ()
    first = switches[0]
    if list(switches) == [_RUNS_AGAIN.get(model_type)]:
        return positions, (
            f"rotary positions change after {first} tokens; onnxruntime-genai runs a text again there if it is one row "
            "and its tokens are made one by one: a batch, or tokens appended across that length, go on wrongly",
        )
    return first, (
        f"rotary positions change after {first} tokens; onnxruntime-genai would go on wrongly from there, so "
        "genai_config.json ends a text there",
    )
