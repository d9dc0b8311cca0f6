"""Why a row has ended: at a token or a string, at the model's last position, or because enough tokens came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .stopping import Stopping

__all__ = ["Ending", "FinishReason"]

FinishReason = Literal["stop", "length", "positions"]
"""``"stop"``: a token or a string that ends it; ``"length"``: all tokens came that were asked for; ``"positions"``: the
model has no more positions."""


class Ending:
    """Told each new token, says which rows have ended. Use one per generation.

    Args:
        stopping: at which tokens and strings.
        lengths: tokens of each row's prompt.
        count: at most so many new ones.
        limit: the model's positions; 0 where there is no end. The last token needs none of its own.

    Attributes:
        limit: as given.

    >>> ending = Ending(Stopping([9]), [3, 5, 2], count=4, limit=6)
    >>> ending([7, 7, 9]), ending([7, 7, 0]), ending([7, 0, 0])
    ([False, False, True], [False, True, True], [False, True, True])
    >>> ending([7, 0, 0]), ending.reasons
    ([False, True, True], ['length', 'positions', 'stop'])
    """

    def __init__(self, stopping: Stopping, lengths: Sequence[int], count: int, limit: int) -> None:
        self.limit = limit
        self._stopping = stopping
        self._last = [limit - length + 1 if limit else math.inf for length in lengths]
        self._count = count
        self._early: list[FinishReason | None] = [None] * len(lengths)
        self._made = 0

    def __call__(self, tokens: list[int]) -> list[bool]:
        """Whether each row has ended, by its new token or before.

        Args:
            tokens: the new one of each row; of a row that has ended, anything.
        """
        self._made += 1
        for row, stopped in enumerate(self._stopping(tokens)):
            if self._early[row] is None and stopped:
                self._early[row] = "stop"
            elif self._early[row] is None and self._last[row] <= self._made < self._count:
                self._early[row] = "positions"
        return self.ended

    @property
    def ended(self) -> list[bool]:
        """Whether each row has ended before its next token."""
        return [reason is not None for reason in self._early]

    @property
    def over(self) -> bool:
        """Whether there are no more tokens."""
        return self._made == self._count or None not in self._early

    @property
    def reasons(self) -> list[FinishReason]:
        """Why each row ended, if there are no more tokens."""
        return [reason or "length" for reason in self._early]
