"""Why a model is not captured one way: another way may be tried."""

from __future__ import annotations

__all__ = ["NotCaptured", "Unsuited", "first_line"]


class NotCaptured(Exception):  # noqa: N818
    """torch.export refuses a program; in one line, why."""


class Unsuited(Exception):  # noqa: N818
    """The model computes something that GroupQueryAttention cannot; the general target is for it."""


def first_line(error: Exception) -> str:
    """What an error says, without the lines that follow.

    >>> first_line(RuntimeError("no\\nbecause")), first_line(KeyError())
    ('no', 'KeyError')
    """
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
