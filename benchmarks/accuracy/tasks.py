"""Synthetic sequence tasks: what the small model is pretrained on, and what it has not seen and is fine-tuned on.

Each maps 8 symbols out of 16 to an answer. The unseen ones ask for other positions, other orders and other values.
They were chosen from forty by what LoRAs reach on them, at three learning rates with six seeds each: rank 2 answers 15
to 85% right, rank 8 20 to 92%, and of those the eight on which seeds disagree least. No other method was run for that.

There are few examples to learn from, and each is seen some forty times: so a training has come to its end, and what it
reaches depends on the method more than on the seed. With 2048 examples and 80 steps, as this suite once had, seeds were
up to 44 points apart, and after 400 steps LoRAs had learnt every task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from .data import SPLITS, Example, Splits

__all__ = ["COMPARED", "LENGTH", "PRETRAINING", "SIZES", "SYMBOLS", "UNSEEN", "VOCABULARY", "example", "splits"]

SYMBOLS = 16
LENGTH = 8
SIZES = {"train": 128, "validation": 256, "test": 512}

Task = Callable[[Sequence[int]], list[int]]


def _interleaved(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """
    >>> _interleaved([1, 2], [3, 4])
    [1, 3, 2, 4]
    """
    return [symbol for pair in zip(left, right, strict=True) for symbol in pair]


def _incremented(x: Sequence[int]) -> list[int]:
    return [(symbol + 1) % SYMBOLS for symbol in x]


def _running_sum(x: Sequence[int]) -> list[int]:
    return [total % SYMBOLS for total in accumulate(x)]


PRETRAINING: dict[str, Task] = {
    "copy": list,
    "reverse": lambda x: list(x[::-1]),
    "sort": sorted,
    "running sum": _running_sum,
    "increment": _incremented,
    "rotate by one": lambda x: [*x[1:], x[0]],
}
"""The mixture that the small model learns."""

UNSEEN: dict[str, Task] = {
    "reverse, running max": lambda x: list(accumulate(x[::-1], max)),
    "sort by low bits": lambda x: sorted(x, key=lambda symbol: (symbol % 4, symbol)),
    "sort by parity": lambda x: sorted(x, key=lambda symbol: (symbol % 2, symbol)),
    "sort by high bits": lambda x: sorted(x, key=lambda symbol: symbol // 4),
    "sort halves": lambda x: sorted(x[: len(x) // 2]) + sorted(x[len(x) // 2 :]),
    "medians of three": lambda x: [sorted((x[i - 1], x[i], x[(i + 1) % len(x)]))[1] for i in range(len(x))],
    "smallest, largest": lambda x: _interleaved(sorted(x)[: len(x) // 2], sorted(x, reverse=True)[: len(x) // 2]),
    "sort, reverse halves": lambda x: sorted(x)[: len(x) // 2][::-1] + sorted(x)[len(x) // 2 :][::-1],
    "sort descending": lambda x: sorted(x, reverse=True),
}
"""What pretraining does not contain."""

COMPARED = tuple(UNSEEN)[:8]
"""Those on which methods are compared; the last is for adapters that are deployed over few bits."""

# 0 pads.
_SEPARATOR, _END, _NEW = 1, 2, 3
_FIRST_TAG = 4
_FIRST_SYMBOL = _FIRST_TAG + len(PRETRAINING)

VOCABULARY = _FIRST_SYMBOL + SYMBOLS
"""Tokens that there are."""


def example(name: str, x: Sequence[int]) -> Example:
    """A question and its answer as tokens: a tag, the symbols, a separator; what the task makes of them, an end.

    Args:
        name: of a task. The unseen ones share one tag, which pretraining never shows.
        x: symbols.

    >>> example("sort descending", [0, 1, 2, 3])
    Example(prompt=(3, 10, 11, 12, 13, 1), answer=(13, 12, 11, 10, 2))
    """
    if name in PRETRAINING:
        tag, task = _FIRST_TAG + list(PRETRAINING).index(name), PRETRAINING[name]
    else:
        tag, task = _NEW, UNSEEN[name]
    prompt, answer = ([_FIRST_SYMBOL + symbol for symbol in symbols] for symbols in (x, task(x)))
    return Example((tag, *prompt, _SEPARATOR), (*answer, _END))


def splits(name: str, sizes: Mapping[str, int] = SIZES) -> Splits:
    """The examples of an unseen task; none is in two splits, or twice in one.

    Args:
        name: of `UNSEEN`.
        sizes: examples by split.
    """
    drawn = random.Random(name)
    sequences: dict[tuple[int, ...], None] = {}
    while len(sequences) < sum(sizes.values()):
        sequences[tuple(drawn.choices(range(SYMBOLS), k=LENGTH))] = None
    left = iter(sequences)
    return {split: [example(name, next(left)) for _ in range(sizes[split])] for split in SPLITS}
