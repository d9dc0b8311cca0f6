"""Logits, a token of them, the next logits: until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from .ending import Ending
from .logits import Logits
from .options import Plan

__all__ = ["tokens_of"]


def tokens_of(
    first: Callable[[], Logits], step: Callable[[Tensor], Logits], plan: Plan, ending: Ending, rows: int
) -> Iterator[Tensor]:
    """The tokens of one generation, [batch], int64, one of every row at a time; nothing runs before one is asked for.

    Args:
        first: runs the prompt.
        step: runs one more token of each row [batch].
        plan: how they are chosen.
        ending: is told of each.
        rows: the batch.
    """
    logits = first()
    ended = [False] * rows
    while True:
        token = plan.choose(logits, ended)
        yield token
        ended = ending(token.tolist())
        if ending.over:
            return
        logits = step(token)
