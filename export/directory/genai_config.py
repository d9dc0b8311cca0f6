"""``genai_config.json``: what makes an exported decoder a model directory of onnxruntime-genai.

https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..trace.text_config import text_config
from ..trace.traced import Traced
from .genai_context import genai_context
from .generation_config import own_options, setting

__all__ = ["GENAI_CONFIG", "write_genai_config"]

GENAI_CONFIG = "genai_config.json"

_TYPES = {
    "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "phi3",
    "qwen2", "qwen3", "smollm3",
}  # fmt: skip
"""Model types that onnxruntime-genai 0.18 knows by name; ``decoder`` is for all others with the same inputs."""


def write_genai_config(
    place: Path, model: Any, traced: Traced, provider: str, operators: str | None = None
) -> tuple[str, ...]:
    """Write ``genai_config.json`` beside a decoder's graph.

    Args:
        place: the directory.
        model: the transformers model.
        traced: what was captured of it.
        provider: ONNX Runtime's name of the execution provider that the export is for.
        operators: name of a library of operators that the graph needs, beside it; None for none.

    Returns:
        what a reader should know.
    """
    config, generation = text_config(model), getattr(model, "generation_config", None)

    def token(name: str, default: int) -> int:
        found = setting(model, name)
        return found if found is not None and 0 <= found < config.vocab_size else default

    ends = setting(model, "eos_token_id")
    ends = [] if ends is None else ends
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if 0 <= end < config.vocab_size]
    first = ends[0] if ends else 0
    kind = config.model_type if config.model_type in _TYPES else "decoder"
    positions = getattr(config, "max_position_embeddings", None) or 2048
    context, notes = genai_context(kind, positions, traced.switches)
    search = own_options(generation)
    content = {
        "model": {
            "type": kind,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "bos_token_id": token("bos_token_id", first),
            "eos_token_id": ends[0] if len(ends) == 1 else ends,  # of none, what pads ends a sequence
            "pad_token_id": token("pad_token_id", first),
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{"cuda": {}}] if provider == "CUDAExecutionProvider" else [],
                    **({} if operators is None else {"custom_ops_library": operators}),
                },
                "filename": "model.onnx",
                "head_size": traced.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": traced.layers,
                "num_key_value_heads": traced.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(search.get("do_sample", False)),
            "temperature": float(search.get("temperature", 1.0)),
            "top_k": int(search["top_k"]),
            "top_p": float(search.get("top_p", 1.0)),
            "repetition_penalty": float(search.get("repetition_penalty", 1.0)),
            "no_repeat_ngram_size": search.get("no_repeat_ngram_size", 0),
            "max_length": min(search.get("max_length", context), context),
            "min_length": search.get("min_length", 0),
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
        },
    }
    (place / GENAI_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return notes
