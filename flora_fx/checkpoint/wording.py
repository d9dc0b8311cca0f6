"""How shapes, lists of names and other libraries' errors are told."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["all_lines", "examples", "first_line", "shape"]


def shape(sizes: Sequence[int]) -> str:
    """
    >>> shape((4, 32))
    '4 × 32'
    """
    return " × ".join(map(str, sizes)) or "a single number"


def examples(names: Sequence[str]) -> str:
    """The first three in parentheses; nothing of nothing.

    >>> examples(["a", "b", "c", "d"]), examples([])
    (' (a, b, c, …)', '')
    """
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def first_line(error: BaseException) -> str:
    """The first line that says something, short enough to stand in a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".:") if len(line) <= 160 else f"{line[:160]}…"


def all_lines(error: BaseException) -> str:
    """All lines as one: where the first is a heading, what counts stands below it."""
    line = " ".join(str(error).split()) or type(error).__name__
    line = line if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {line}"
    return line.rstrip(".:") if len(line) <= 400 else f"{line[:400]}…"
