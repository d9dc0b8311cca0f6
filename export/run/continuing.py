"""A text of a causal LM, checked, and the tokens that follow it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..tokens.arguments import padding_mask, tokens
from ..tokens.ending import Ending
from ..tokens.logits import Logits
from ..tokens.looping import tokens_of
from ..tokens.options import Plan
from .kv_memory import too_many
from .text_cache import TextCache

__all__ = ["checked_prompt", "checked_text", "continuation"]


def checked_text(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask as int64 on the CPU, both [batch, seq].

    Raises:
        TypeError, ValueError: of the wrong type or shape, tokens outside of the vocabulary, or a row without one.
    """
    ids = tokens("input_ids", input_ids, vocab_size)
    mask = padding_mask(attention_mask, ids)
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"row {row} of attention_mask is all 0: there is no token in it")
    return ids, mask


def checked_prompt(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """As `checked_text`, of what is to be continued.

    Raises:
        TypeError, ValueError: see `checked_text`; or padding on the right.
    """
    ids, mask = checked_text(input_ids, attention_mask, vocab_size)
    if not bool(mask[:, -1].all()):
        row = int((mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"row {row} of attention_mask ends with 0: the prompt is padded on the right, and its continuation "
            "would follow the padding. Pad on the left (tokenizer.padding_side = 'left')"
        )
    return ids, mask


def continuation(
    cache: TextCache, ids: Tensor, mask: Tensor, plan: Plan, limit: int
) -> tuple[Iterator[Tensor], Ending]:
    """The tokens after a whole text, and what is told of each.

    Args:
        cache: may hold the beginning of the text.
        ids, mask: the text [batch, seq], as `checked_prompt` returns it.
        plan: how tokens are chosen.
        limit: the model's positions; 0 where there is no end.

    Raises:
        AdapterError: the adapter of a row is not there.
        ValueError: the text is longer than the model has positions; or there are adapters for another number of rows.
    """
    cache.begin(len(ids))
    lengths = mask.sum(1).tolist()
    if limit and max(lengths) > limit:
        raise too_many(max(lengths), limit)

    def first() -> Logits:
        return cache.prefill(ids, mask, plan.count - 1)

    def step(token: Tensor) -> Logits:
        return cache.decode(token.tolist())

    ending = Ending(plan.stopping, lengths, plan.count, limit)
    return tokens_of(first, step, plan, ending, len(ids)), ending
