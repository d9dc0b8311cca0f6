"""What may follow what: rules that change the scores of the next token before it is chosen, as in transformers.

repetition penalty -> repeated n-grams -> bad words -> too short to end -> forced first, forced last -> suppressed
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "BadWords",
    "ForcedFirst",
    "ForcedLast",
    "History",
    "MinLength",
    "NoRepeatedNGrams",
    "RepetitionPenalty",
    "Rule",
    "Suppressed",
    "seen_tokens",
]


class History:
    """What the rows hold so far. All have one length; padding in front counts, as it does in transformers.

    Args:
        ids: prompts [batch, prompt], int64.
        mask: [batch, prompt]; 0 where padded.
        limit: how long a row may become.

    Attributes:
        rows: the tokens of each row.

    >>> history = History(torch.tensor([[0, 7]]), torch.tensor([[0, 1]]), limit=9)
    >>> history.add([8])
    >>> history.rows, history.length
    ([[0, 7, 8]], 3)
    """

    def __init__(self, ids: Tensor, mask: Tensor, limit: int) -> None:
        self.ids = ids
        self.mask = mask
        self.limit = limit
        self.rows: list[list[int]] = ids.tolist()

    @property
    def length(self) -> int:
        """Of every row."""
        return len(self.rows[0])

    def add(self, tokens: Sequence[int]) -> None:
        """The next token of each row."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)


class Rule(Protocol):
    """Use one per generation: it may remember what it saw."""

    def __call__(self, scores: Tensor, history: History) -> None:
        """Change the scores [batch, vocab] of the next token, float32, in place."""


class RepetitionPenalty:
    """Of tokens that a row holds already, padding in front not counted: scores above 0 are divided, others multiplied.

    Args:
        penalty: 1 for none.
    """

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty
        self._seen: Tensor | None = None
        self._read = 0

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        vocab = scores.shape[-1]
        if self._seen is None:
            self._seen, self._read = seen_tokens(history.ids, history.mask, vocab), history.ids.shape[1]
        for row, tokens in enumerate(history.rows):
            for token in tokens[self._read :]:
                if token < vocab:
                    self._seen[row, token] = True
        self._read = history.length
        every, seen = scores.numpy(), self._seen.numpy()  # see `sampling`
        held = torch.from_numpy(every[seen])
        every[seen] = torch.where(held < 0, held * self.penalty, held / self.penalty).numpy()


class NoRepeatedNGrams:
    """No run of so many tokens occurs twice in a row."""

    def __init__(self, size: int) -> None:
        self._before = size - 1
        self._followers: list[dict[tuple[int, ...], list[int]]] = []
        self._read = 0

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        if not self._followers:
            self._followers = [defaultdict(list) for _ in history.rows]
        before, vocab = self._before, scores.shape[-1]
        for row, (tokens, followers) in enumerate(zip(history.rows, self._followers, strict=True)):
            for at in range(max(self._read, before), len(tokens)):
                followers[tuple(tokens[at - before : at])].append(tokens[at])
            if len(tokens) >= before:
                repeated = followers.get(tuple(tokens[len(tokens) - before :]), ())
                scores[row, _known(repeated, vocab)] = -torch.inf
        self._read = history.length


class BadWords:
    """None of these runs of tokens is finished.

    Args:
        words: a token or more each.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._lasts: dict[int, dict[tuple[int, ...], list[int]]] = {}  # by the number of tokens before the last
        for word in words:
            *first, last = word
            self._lasts.setdefault(len(first), {}).setdefault(tuple(first), []).append(last)

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        for before, lasts in self._lasts.items():
            if before > history.length:
                continue
            for row, tokens in enumerate(history.rows):
                scores[row, lasts.get(tuple(tokens[len(tokens) - before :]), [])] = -torch.inf


class MinLength:
    """Nothing ends a row that is shorter.

    Args:
        length: prompt included.
        ends: the tokens that end a row.
    """

    def __init__(self, length: int, ends: Sequence[int]) -> None:
        self.length = length
        self._ends = ends

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        if history.length < self.length:
            scores[:, _known(self._ends, scores.shape[-1])] = -torch.inf


class ForcedFirst:
    """The only token that follows a prompt of one token, such as a language."""

    def __init__(self, token: Sequence[int]) -> None:
        self._token = token

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        if history.length == 1:
            _only(scores, self._token)


class ForcedLast:
    """The last token of what did not end before; of several, any."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        if history.length == history.limit - 1:
            _only(scores, self._tokens)


class Suppressed:
    """Tokens that are never chosen, or not at one place.

    Args:
        tokens: those outside of the vocabulary are passed over: Whisper's defaults name some that small models have
            not.
        at: the length at which they are suppressed; None for all.
    """

    def __init__(self, tokens: Sequence[int], at: int | None = None) -> None:
        self._tokens = tokens
        self._at = at

    def __call__(self, scores: Tensor, history: History) -> None:
        """See `Rule`."""
        if self._at in (None, history.length):
            scores[:, _known(self._tokens, scores.shape[-1])] = -torch.inf


def seen_tokens(ids: Tensor, mask: Tensor, vocab: int) -> Tensor:
    """Which tokens prompts hold, padding in front not counted.

    Args:
        ids, mask: [batch, prompt], int64.
        vocab: columns; tokens above are left out.

    Returns:
        [batch, vocab], bool.

    >>> seen_tokens(torch.tensor([[0, 0, 2, 3]]), torch.tensor([[0, 0, 1, 1]]), 5)
    tensor([[False, False,  True,  True, False]])
    """
    padding = mask.cumsum(1) == 0
    places = ids.clamp(max=vocab).masked_fill(padding, vocab)
    return torch.zeros(len(ids), vocab + 1, dtype=torch.bool).scatter_(1, places, True)[:, :vocab]


def _known(tokens: Sequence[int], vocab: int) -> list[int]:
    return [token for token in tokens if 0 <= token < vocab]


def _only(scores: Tensor, tokens: Sequence[int]) -> None:
    scores.fill_(-torch.inf)
    scores[:, list(tokens)] = 0
