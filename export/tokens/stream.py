"""The tokens of a generation as they come, and in the end why there are no more."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor

from .ending import Ending, FinishReason

__all__ = ["TokenStream"]


class TokenStream(Iterator[Tensor]):
    """An iterator of tokens [batch], int64, one of every row at a time. ``stream`` of a decoder makes one.

    Where a row ends because the model has no more positions, there is a warning after the last token.

    Args:
        tokens: one at a time.
        ending: is told of each.
    """

    def __init__(self, tokens: Iterator[Tensor], ending: Ending) -> None:
        self._tokens = tokens
        self._ending = ending
        self._told = False

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """Why each row ended, see `FinishReason`; empty until all tokens came and the next one was asked for."""
        return self._ending.reasons if self._ending.over else []

    def __next__(self) -> Tensor:
        try:
            return next(self._tokens)
        except StopIteration:
            self._tell()
            raise

    def _tell(self) -> None:
        rows = [str(row) for row, reason in enumerate(self.finish_reasons) if reason == "positions"]
        if rows and not self._told:
            self._told = True
            limit = self._ending.limit
            warnings.warn(
                f"row {', '.join(rows)} reached the last of the model's {limit} positions and ended there, with fewer "
                "new tokens than were asked for",
                stacklevel=3,
            )
