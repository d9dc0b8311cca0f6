"""What a model's ``generation_config`` asks for: what an export takes of it, and what it names instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_fx.errors import require

from ..trace.text_config import text_config

__all__ = ["TAKEN", "genai_notes", "generation_notes", "left_out", "own_options", "setting", "without_genai"]

TAKEN = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "stop_strings",
)
"""What an export keeps for `generate`, beside the tokens that start, end and pad."""

_GENAI = {
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p"),
    *("repetition_penalty", "no_repeat_ngram_size"),
}
"""Of those, what ``genai_config.json`` says too (onnxruntime-genai 0.18)."""

_SAMPLING = {"temperature", "top_k", "top_p", "min_p"}

_NO_TOKEN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),  # kept on their own
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"),  # of beams: num_beams is named
    # Drafts that the model itself accepts or not
    *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
    *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
    *("assistant_lookbehind", "target_lookbehind"),
}
"""Attributes of a ``GenerationConfig`` that choose no token. What is in none of these sets is named."""


def generation_notes(model: Any) -> list[str]:
    """Where tokens will not be those of transformers' ``generate``.

    Args:
        model: the transformers model.
    """
    notes = []
    if missing := left_out(getattr(model, "generation_config", None)):
        asked = ", ".join(f"{name}={value!r}" for name, value in missing.items())
        notes.append(f"generation_config asks for {asked}, which exports do not have: `generate` goes without")
    if type(model).generate is not require("transformers", "hf").GenerationMixin.generate:
        notes.append(
            f"generation: {type(model).__name__} has a `generate` of its own in transformers, whose further rules "
            "exports do not have"
        )
    return notes


def genai_notes(model: Any) -> list[str]:
    """Where the tokens of onnxruntime-genai will not be those of `generate`."""
    untold = without_genai(own_options(getattr(model, "generation_config", None)))
    if not untold:
        return []
    return [
        f"generation_config asks for {', '.join(untold)}: `generate` goes by it, but genai_config.json cannot say "
        "it, and onnxruntime-genai goes without"
    ]


def setting(model: Any, name: str) -> Any:
    """What a transformers model's generation config says, else the config of its text; None for nothing."""
    found = getattr(getattr(model, "generation_config", None), name, None)
    return getattr(text_config(model), name, None) if found is None else found


def own_options(generation: Any) -> dict[str, Any]:
    """Those of `TAKEN` that a ``GenerationConfig`` sets; where it leaves ``top_k`` open, transformers' 50.

    >>> from transformers import GenerationConfig
    >>> own_options(GenerationConfig(repetition_penalty=1.05, min_length=0, num_beams=4))
    {'top_k': 50, 'repetition_penalty': 1.05}
    """
    neutral = _neutral()
    found = {name: getattr(generation, name, None) for name in TAKEN}
    if found["top_k"] is None:
        found["top_k"] = neutral.pop("top_k", None)
    neutral.pop("top_k", None)
    neutral.pop("max_length", None)  # one that is set counts the prompt, the default does not
    return {name: value for name, value in found.items() if value is not None and value != neutral.get(name)}


def left_out(generation: Any) -> dict[str, Any]:
    """What a ``GenerationConfig`` sets that changes tokens, and that no export has.

    >>> from transformers import GenerationConfig
    >>> left_out(GenerationConfig(repetition_penalty=1.05, num_beams=4, early_stopping=True, typical_p=1.0))
    {'num_beams': 4}
    """
    neutral = _neutral()
    fields = vars(require("transformers", "hf").GenerationConfig())
    return {
        name: value
        for name in fields
        if name[0] != "_" and name not in _NO_TOKEN and name not in TAKEN
        if (value := getattr(generation, name, None)) not in (None, False, neutral.get(name))
    }


def without_genai(options: Mapping[str, Any]) -> list[str]:
    """Which of a model's `own_options` onnxruntime-genai cannot be told by its config.

    >>> without_genai({"min_length": 5, "min_new_tokens": 3, "min_p": 0.1, "top_k": 50})
    ['min_new_tokens']
    """
    idle = set() if options.get("do_sample") else _SAMPLING
    return [name for name in options if name not in _GENAI and name not in idle]


def _neutral() -> dict[str, Any]:
    """What transformers takes where neither a model nor a caller says anything."""
    defaults: dict[str, Any] = require("transformers", "hf").GenerationConfig._get_default_generation_params()
    return {**defaults, "guidance_scale": 1}
