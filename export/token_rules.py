"""What the generation config of an encoder-decoder forces or forbids, whatever the logits say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TokenRules"]


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Named as in transformers' ``GenerationConfig``.

    Attributes:
        forced_bos_token_id: the first token, where the decoder starts from a single one.
        forced_eos_token_id: the last token, of what did not end before.
        suppress_tokens: never chosen.
        begin_suppress_tokens: not chosen as the first token that is free.

    >>> TokenRules(forced_bos_token_id=1, suppress_tokens=(2,))(torch.zeros(1, 3), index=0, count=5, prompt=1)
    tensor([[-inf, 0., -inf]])
    """

    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()

    @classmethod
    def of(cls, generation: Any) -> TokenRules:
        """Those of a ``GenerationConfig``; bad words of one token are suppressed ones."""
        bad = [word[0] for word in generation.bad_words_ids or () if len(word) == 1]
        last = generation.forced_eos_token_id
        return cls(
            forced_bos_token_id=generation.forced_bos_token_id,
            forced_eos_token_id=min(last) if isinstance(last, list) else last,
            suppress_tokens=(*(generation.suppress_tokens or ()), *bad),
            begin_suppress_tokens=tuple(generation.begin_suppress_tokens or ()),
        )

    def __call__(self, logits: Tensor, *, index: int, count: int, prompt: int) -> Tensor:
        """Logits [batch, vocab], -inf for what cannot be.

        Args:
            logits: of the next token.
            index: how many tokens there are already, without the prompt.
            count: how many there may be.
            prompt: how many tokens the decoder started from.
        """
        forces_first = self.forced_bos_token_id is not None and prompt == 1
        if index == 0 and forces_first:
            return _only(logits, self.forced_bos_token_id)
        if index == count - 1 and self.forced_eos_token_id is not None:
            return _only(logits, self.forced_eos_token_id)
        at_first = self.begin_suppress_tokens if index == int(forces_first) else ()
        # Whisper's defaults name tokens that a smaller vocabulary has not.
        never = [token for token in (*self.suppress_tokens, *at_first) if token < logits.shape[-1]]
        return logits.index_fill(-1, torch.tensor(never), -torch.inf) if never else logits


def _only(logits: Tensor, token: Any) -> Tensor:
    return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([token]), 0.0)
