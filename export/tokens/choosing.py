"""The next token of each row: rules, then sampling or the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .generated import Record
from .logits import Logits
from .rules import History, Rule
from .sampling import Sampling

__all__ = ["Choice"]


class Choice:
    """Use one per generation. Without rules, sampling and record it costs no more than the likeliest token does.

    Args:
        sampling: how one is chosen of what the rules leave.
        rules: in their order.
        history: the prompts.
        pad: what follows in rows that ended.
        record: of what is wanted beside the tokens.

    >>> ids = torch.tensor([[4, 1]])
    >>> choice = Choice(Sampling(), [], History(ids, torch.ones_like(ids), limit=9), pad=0)
    >>> choice(Logits(torch.tensor([[0.1, 2.0, 0.3]])), [False])
    tensor([1])
    """

    def __init__(
        self, sampling: Sampling, rules: Sequence[Rule], history: History, pad: int, record: Record | None = None
    ) -> None:
        self._sampling = sampling
        self._rules = rules
        self._history = history
        self._pad = pad
        self._record = record

    def __call__(self, logits: Logits, ended: Sequence[bool]) -> Tensor:
        """The next tokens.

        Args:
            logits: [batch, vocab].
            ended: which rows have ended: they get what pads.

        Returns:
            [batch], int64, on the CPU.

        Raises:
            ValueError: the rules leave no token.
        """
        if self._rules or self._record is not None:
            return self._by_scores(logits.cpu().float(), torch.tensor(ended))
        token = self._sampling(logits)
        return token.masked_fill(torch.tensor(ended), self._pad) if any(ended) else token

    def _by_scores(self, logits: Tensor, ended: Tensor) -> Tensor:
        scores = torch.from_numpy(logits.numpy().copy())  # the next run may write to the logits; numpy: see `sampling`
        for rule in self._rules:
            rule(scores, self._history)
        stuck = ~ended & torch.from_numpy(scores.numpy().max(-1) == -torch.inf)
        if bool(stuck.any()):
            raise ValueError(
                f"row {int(stuck.nonzero()[0])} has {self._history.length} tokens, and no other may follow: each is "
                "suppressed, a bad word, or repeats; loosen no_repeat_ngram_size, bad_words_ids or suppress_tokens"
            )
        if self._sampling.draws:
            # A row that has ended may have nothing left to draw from.
            token = self._sampling.choose(scores.masked_fill(ended[:, None], 0.0) if bool(ended.any()) else scores)
        else:
            token = Logits(scores).likeliest()
        token = token.masked_fill(ended, self._pad)
        if self._record is not None:
            self._record.add(logits, self._sampling.warp(scores) if self._sampling.draws else scores, token, ended)
        self._history.add(token.tolist())
        return token
