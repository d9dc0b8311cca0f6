"""What ``generate`` and ``stream`` can be told, and what that comes to for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch

from .arguments import token_ids
from .manifest import Manifest
from .sampling import Sampling
from .stopping import Stopping

__all__ = ["GenerationOptions", "Plan", "plan"]


class GenerationOptions(TypedDict, total=False):
    """Named as in transformers' ``generate``; each may be left out.

    Attributes:
        max_new_tokens: at most so many are added; 20.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 takes the
            likeliest token.
        eos_token_id: token or tokens that end a row; None for the model's own, ``[]`` for none.
        pad_token_id: what follows in rows that ended; None for the model's own, or else the first end token.
        stop_strings: string or strings that end a row when its new text contains one; its last token is kept.
        tokenizer: the model's, for ``stop_strings``.
        seed: for sampling; the same seed draws the same tokens.
        generator: instead of ``seed``.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float | None
    repetition_penalty: float
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    seed: int | None
    generator: torch.Generator | None


@dataclass(frozen=True)
class Plan:
    """Options, checked.

    Attributes:
        count: at most so many new tokens.
        choose: the next token.
        stopping: which rows have ended; for one generation.
        pad: what follows in rows that ended.
    """

    count: int
    choose: Sampling
    stopping: Stopping
    pad: int


def plan(options: Mapping[str, Any], manifest: Manifest) -> Plan:
    """Check `GenerationOptions` and fill in what a model has of its own.

    Raises:
        TypeError, ValueError: an option that there is not, or that cannot be.
    """
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        known = ", ".join(GenerationOptions.__annotations__)
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {known}")
    given = {name: value for name, value in options.items() if name != "seed"}
    count = given.get("max_new_tokens", 20)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"max_new_tokens is {count!r}; it must be a whole number")
    if count < 1:
        raise ValueError(f"max_new_tokens is {count}; it must be at least 1")
    seed = options.get("seed")
    if seed is not None:
        if given.get("generator") is not None:
            raise ValueError("pass either seed or generator")
        given["generator"] = torch.Generator().manual_seed(seed)
    choose = Sampling(**{field.name: given[field.name] for field in fields(Sampling) if field.name in given})
    ends, pad = given.get("eos_token_id"), given.get("pad_token_id")
    ends = token_ids("eos_token_id", manifest.eos_token_ids if ends is None else ends)
    pad = manifest.pad_token_id if pad is None else token_ids("pad_token_id", pad)[0]
    if pad is None:
        pad = ends[0] if ends else 0  # 0 is used only after a stop string: without ends no row ends otherwise
    return Plan(count, choose, Stopping(ends, given.get("stop_strings"), given.get("tokenizer")), pad)
