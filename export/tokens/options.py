"""What ``generate`` and ``stream`` can be told, and what that comes to for one model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..directory.manifest import Manifest
from .arguments import token_ids
from .choosing import Choice
from .generated import Record
from .rules import (
    BadWords,
    ForcedFirst,
    ForcedLast,
    History,
    MinLength,
    NoRepeatedNGrams,
    RepetitionPenalty,
    Rule,
    Suppressed,
)
from .sampling import Sampling
from .stopping import Stopping

__all__ = ["GenerationOptions", "Plan", "plan"]

_NEW_TOKENS = 20


class GenerationOptions(TypedDict, total=False):
    """Named as in transformers' ``generate``, and applied in its order.

    What is left out is as the model's generation config had it at the export (``Manifest.generation``), or else as
    said here. None: of ``eos_token_id``, ``pad_token_id`` and the forced tokens the model's own, of all others none.

    Attributes:
        max_new_tokens: at most so many are added; 20.
        max_length: the same, with the prompt; ``max_new_tokens`` goes before it.
        min_new_tokens: nothing ends a row before; none.
        min_length: the same, with the prompt and its padding; ``min_new_tokens`` goes before it.
        do_sample, temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 takes the likeliest token.
        repetition_penalty: of tokens that a row holds already, prompt included: scores above 0 are divided by it,
            others multiplied; 1 for none.
        no_repeat_ngram_size: no run of so many tokens occurs twice in a row, prompt included; 0 for none.
        bad_words_ids: runs of tokens that never occur; ``[]`` for none.
        suppress_tokens: never chosen; ``[]`` for none.
        begin_suppress_tokens: not chosen as the first token that is free; ``[]`` for none.
        forced_bos_token_id: the first token after a prompt of one token, such as a language; ``[]`` for none.
        forced_eos_token_id: token or tokens to end what did not end before the last token; ``[]`` for none.
        eos_token_id: token or tokens that end a row; ``[]`` for none.
        pad_token_id: what follows in rows that ended; the first end token.
        stop_strings: string or strings that end a row when its new text contains one; its last token is kept.
        tokenizer: the model's, for ``stop_strings``.
        seed: for sampling; the same seed draws the same tokens. Without seed and generator, torch's global generator
            (``torch.manual_seed``) is drawn from.
        generator: instead of ``seed``.
    """

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | Sequence[int] | None
    forced_eos_token_id: int | Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    seed: int | None
    generator: torch.Generator | None


@dataclass(frozen=True)
class Plan:
    """Options, checked; for one generation.

    Attributes:
        count: at most so many new tokens.
        choose: the next token.
        stopping: which rows have ended.
    """

    count: int
    choose: Choice
    stopping: Stopping


def plan(
    options: Mapping[str, Any], manifest: Manifest, ids: Tensor, mask: Tensor, record: Record | None = None
) -> Plan:
    """Check `GenerationOptions` and fill in what a model has of its own.

    Args:
        options: as they were passed.
        manifest: of the model.
        ids, mask: the prompts [batch, prompt], padded on the left; of an encoder-decoder, what its decoder starts from.
        record: of what is wanted beside the tokens.

    Raises:
        TypeError, ValueError: an option that there is not, or that cannot be.
    """
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        known = ", ".join(GenerationOptions.__annotations__)
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {known}")
    own: dict[str, Any] = {"eos_token_id": manifest.eos_token_ids, **manifest.generation}
    special = ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
    held = {**own, **{name: value for name, value in options.items() if not (name in special and value is None)}}
    prompt = ids.shape[1]
    count = _count(held, options, prompt)
    if held.get("seed") is not None:
        if held.get("generator") is not None:
            raise ValueError("pass either seed or generator")
        held["generator"] = torch.Generator().manual_seed(held["seed"])
    told = {field.name: held.get(field.name) for field in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in told.items() if value is not None})
    ends = token_ids("eos_token_id", held["eos_token_id"])
    pad = held.get("pad_token_id")
    pad = manifest.pad_token_id if pad is None else token_ids("pad_token_id", pad)[0]
    if pad is None:
        pad = ends[0] if ends else 0  # 0 is used only after a stop string: without ends no row ends otherwise
    history = History(ids, mask, prompt + count)
    choose = Choice(sampling, _rules(held, options, ends, prompt, manifest.vocab_size), history, pad, record)
    return Plan(count, choose, Stopping(ends, held.get("stop_strings"), held.get("tokenizer")))


def _count(held: Mapping[str, Any], options: Mapping[str, Any], prompt: int) -> int:
    """How many new tokens there may be."""
    count, length = _whole(held, "max_new_tokens", 1), _whole(held, "max_length", 1)
    if count is not None:
        _goes_before("max_new_tokens", count, "max_length", options)
        return count
    if length is None:
        return _NEW_TOKENS
    if length <= prompt:
        raise ValueError(
            f"max_length is {length}, and the prompt has {prompt} tokens already; pass a larger one, or max_new_tokens"
        )
    return length - prompt


def _rules(
    held: Mapping[str, Any], options: Mapping[str, Any], ends: Sequence[int], prompt: int, vocab: int
) -> list[Rule]:
    """In the order of transformers' ``_get_logits_processor``."""
    rules: list[Rule] = []
    penalty = held.get("repetition_penalty")
    if penalty is not None:
        if isinstance(penalty, bool) or not isinstance(penalty, int | float):
            raise TypeError(f"repetition_penalty is {penalty!r}; it must be a number")
        if not 0 < penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {penalty}; it must be above 0, 1 for none")
        if penalty != 1:
            rules.append(RepetitionPenalty(penalty))
    if size := _whole(held, "no_repeat_ngram_size", 0):
        rules.append(NoRepeatedNGrams(size))
    if words := [word for word in _words(held, vocab) if not (len(word) == 1 and word[0] in ends)]:
        rules.append(BadWords(words))
    new, least = _whole(held, "min_new_tokens", 0), _whole(held, "min_length", 0) or 0
    if new is not None:
        _goes_before("min_new_tokens", new, "min_length", options)
        least = prompt + new
    if ends and least > prompt:
        rules.append(MinLength(least, ends))
    first, last = (_ids(held, name, vocab) for name in ("forced_bos_token_id", "forced_eos_token_id"))
    if len(first) > 1:
        raise TypeError(f"forced_bos_token_id is {first}; it must be one token id")
    if first and prompt == 1:
        rules.append(ForcedFirst(first))
    if last:
        rules.append(ForcedLast(last))
    if never := _ids(held, "suppress_tokens"):
        rules.append(Suppressed(never))
    if at_first := _ids(held, "begin_suppress_tokens"):
        rules.append(Suppressed(at_first, prompt + 1 if first and prompt == 1 else prompt))
    return rules


def _whole(held: Mapping[str, Any], name: str, least: int) -> int | None:
    value = held.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    return value


def _ids(held: Mapping[str, Any], name: str, vocab: int = 0) -> list[int]:
    """Tokens, none for None; below ``vocab``, if that is not 0."""
    value = held.get(name)
    return [] if value is None else token_ids(name, value, vocab)


def _words(held: Mapping[str, Any], vocab: int) -> list[list[int]]:
    value = held.get("bad_words_ids")
    if value is None:
        return []
    if isinstance(value, str | int) or any(isinstance(word, str | int) or not len(word) for word in value):
        raise TypeError(f"bad_words_ids is {value!r}; it must be a list of lists of token ids, none of them empty")
    return [token_ids("bad_words_ids", word, vocab) for word in value]


def _goes_before(name: str, value: int, other: str, options: Mapping[str, Any]) -> None:
    if options.get(other) is not None:
        warnings.warn(
            f"{name} is {value} (passed, or the model's own) and goes before {other}={options[other]}; "
            f"pass {name}=None to go by {other}",
            stacklevel=6,
        )
