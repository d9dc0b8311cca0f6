"""How much of a text is cached already, and when all of it must be run again.

    a b c                      -> the whole prompt                        keys of a b c
    d                          -> one step                                keys of a b c d
    e, and positions switch    -> the whole text: a b c d e               keys of a b c d e, rotated the other way
    a b c d e | f g h          -> a prompt in pieces: f g h               keys of a b c d e f g h

The last one is another turn of a `Conversation`.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..directory.manifest import Manifest
from ..tokens.logits import Logits
from .kv_cache import KeyValues
from .slots import Rows

__all__ = ["TextCache", "left_padded", "segment"]


class TextCache:
    """One text of each row of a batch, on its way through a graph; unchecked.

    Args:
        cache: of the graph.
        manifest: of the graph.
        adapters: of the rows; the next prompt cannot use keys of other ones.
        keeps: whether the next prompt will be this text, continued; then memory for more than this prompt is asked for.
    """

    def __init__(
        self,
        cache: KeyValues,
        manifest: Manifest,
        *,
        adapters: Rows,
        keeps: bool = False,
    ) -> None:
        self._cache = cache
        self._adapters = adapters
        self._slots: list[int] = []
        self._ran_with: Hashable = None
        self._switches = manifest.switches
        self._limit = manifest.max_positions or sys.maxsize
        self._keeps = keeps
        self._rows: list[list[int]] = []
        self._longest = 0
        self._room = 0

    def begin(self, batch: int) -> None:
        """Look up the adapters of the rows, for what is run from now on.

        Raises:
            AdapterError: one is not there.
            ValueError: they are for another number of rows.
        """
        self._slots = self._adapters.slots(batch)
        self._cache.choose(self._slots)

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `KeyValues.score`."""
        return self._cache.score(ids, mask)

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Logits:
        """Run a prompt; only its end, where its beginning is in the cache. As `KeyValues.prefill`."""
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        new = self._new_tokens(rows, room)
        self._rows = []  # until all is well
        logits = self._run_all(ids, mask, room) if new is None else self._cache.extend(new)
        self._rows, self._longest, self._room = rows, max(map(len, rows)), room
        return logits

    def decode(self, tokens: list[int]) -> Logits:
        """Run one more token of each row; a row at the last position stays there. As `KeyValues.decode`."""
        rows, self._rows = self._rows, []  # until all is well
        for row, token in zip(rows, tokens, strict=True):
            if len(row) < self._limit:
                row.append(token)
        before, self._longest = self._longest, min(self._longest + 1, self._limit)
        self._room -= 1
        if segment(before, self._switches) == segment(self._longest, self._switches):
            logits = self._cache.decode(tokens)
        else:
            self._cache.claim()
            logits = self._run_all(*left_padded(rows), self._room)
        self._rows = rows
        return logits

    def _run_all(self, ids: Tensor, mask: Tensor, room: int) -> Logits:
        self._ran_with = self._adapters.state(self._slots)
        # As much memory again: then texts of n tokens, turn after turn, are run again log(n) times for want of it.
        return self._cache.prefill(ids, mask, max(room, ids.shape[1]) if self._keeps else room)

    def _new_tokens(self, rows: Sequence[Sequence[int]], room: int) -> Tensor | None:
        """What [batch, n] follows in each row of what is cached; None where that is of no use."""
        if len(rows) != len(self._rows) or not self._cache.held or self._ran_with != self._adapters.state(self._slots):
            return None
        if any(list(row[: len(old)]) != old for row, old in zip(rows, self._rows, strict=True)):
            return None
        new = [row[len(old) :] for row, old in zip(rows, self._rows, strict=True)]
        (count, *others) = {len(row) for row in new}
        if others or not count or not self._cache.takes(count, room):
            return None
        if segment(self._longest, self._switches) != segment(self._longest + count, self._switches):
            return None
        return torch.tensor(new)


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask [batch, longest row].

    >>> left_padded([[5, 6], [7, 8, 9]])
    (tensor([[0, 5, 6],
            [7, 8, 9]]), tensor([[0, 1, 1],
            [1, 1, 1]]))
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def segment(longest: int, switches: Sequence[int]) -> int:
    """Which of its ways of rotating a model uses for a text of so many tokens: the number of switches below that.

    >>> [segment(longest, (32, 64)) for longest in (1, 32, 33, 64, 65)]
    [0, 0, 1, 1, 2]
    """
    return bisect_left(switches, longest)
