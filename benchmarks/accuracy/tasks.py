"""Synthetic sequence tasks: what the small model is pretrained on, and what it has not seen and is fine-tuned on.

Each maps 8 symbols out of 16 to an answer. The unseen ones ask for other positions, other orders, other values, and
values that depend on all symbols before. They were chosen from some fifty by what a LoRA reaches on them: those that it
learns perfectly at once, or not at all, tell nothing apart, nor does one on which its seeds disagree most. No other
method was run for that choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from .data import SPLITS, Example, Splits

__all__ = ["LENGTH", "PRETRAINING", "SIZES", "SYMBOLS", "UNSEEN", "VOCABULARY", "example", "splits"]

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
    "interleave halves": lambda x: _interleaved(x[: len(x) // 2], x[len(x) // 2 :]),
    "alternate ends": lambda x: _interleaved(x, x[::-1])[: len(x)],
    "reverse, running max": lambda x: list(accumulate(x[::-1], max)),
    "sums of even places": lambda x: _running_sum(_interleaved(x[::2], [0] * (len(x) // 2))),
    "sort pairs": lambda x: [symbol for pair in zip(x[::2], x[1::2], strict=True) for symbol in sorted(pair)],
    "sort, increment": lambda x: _incremented(sorted(x)),
    "sort descending": lambda x: sorted(x, reverse=True),
    "sort by low bits": lambda x: sorted(x, key=lambda symbol: (symbol % 4, symbol)),
}
"""What pretraining does not contain."""

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
