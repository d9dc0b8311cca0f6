"""When a row has ended: at a token, or at a string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Stopping"]


class Stopping:
    """Told each new token, says which rows have ended. Use one per generation.

    Args:
        tokens: that end a row.
        strings: that end a row whose new text contains one, wherever in its last token it ends, as in transformers.
        tokenizer: a transformers tokenizer; for strings only.

    Raises:
        TypeError, ValueError: ``strings`` is empty text or no text, or has no tokenizer.

    >>> stopping = Stopping(tokens=[2])
    >>> stopping([5, 2])
    [False, True]
    >>> stopping([7, 0])  # a row that has ended stays so
    [False, True]
    """

    def __init__(
        self, tokens: Sequence[int], strings: str | Sequence[str] | None = None, tokenizer: Any = None
    ) -> None:
        self._tokens = frozenset(tokens)
        self._strings = [strings] if isinstance(strings, str) else list(strings or ())
        self._tokenizer = tokenizer
        for string in self._strings:
            if not isinstance(string, str):
                raise TypeError(f"stop_strings holds {string!r}; it must be a string or a list of them")
            if not string:
                raise ValueError("stop_strings holds an empty string, which every text contains")
        if self._strings and tokenizer is None:
            raise ValueError("stop_strings needs the model's tokenizer; pass tokenizer=")
        # A character is at most four tokens (bytes); the first ones may be cut off, or lose a space, in decoding.
        self._window = 4 * max(map(len, self._strings), default=0) + 4
        self._ended: list[bool] = []
        self._texts: list[list[int]] = []

    def __call__(self, tokens: list[int]) -> list[bool]:
        """Whether each row has ended, by its new token or before.

        Args:
            tokens: the new one of each row; of a row that has ended, anything.
        """
        if not self._ended:
            self._ended, self._texts = [False] * len(tokens), [[] for _ in tokens]
        self._ended = [
            ended or token in self._tokens or self._stops(text, token)
            for ended, token, text in zip(self._ended, tokens, self._texts, strict=True)
        ]
        return self._ended

    def _stops(self, text: list[int], token: int) -> bool:
        if not self._strings:
            return False
        text.append(token)
        del text[: -self._window]
        decoded = self._tokenizer.decode(text, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in decoded for string in self._strings)
