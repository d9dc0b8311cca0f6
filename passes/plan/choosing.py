"""Which form an up-projection is written in, for a compiler that writes loops: the one table of device, rows and rank.

An element of y + s·B z is read and written once, whoever computes it; unrolled it costs 2·rank operations more. By the
data sheet an H100 does some 70 of them in the time that its memory takes (60 TFLOP/s beside 3.4 TB/s, 4 bytes an
element), so with many rows ranks up to 32 should be free. With few rows the launch that is saved is worth more. Neither
was timed. On a CPU the forms are level, so ``addmm`` stays; ``python -m benchmarks forms`` measures them anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flora_fx.config import Accumulate

__all__ = ["HIGHEST_RANK", "accumulation", "unrolls"]


@dataclass(frozen=True)
class _Device:
    """What is written for one kind of device.

    Attributes:
        default: the form that the backend takes where nobody asks for another.
        bounds: (rows, rank): with up to so many rows, up-projections of up to this rank are unrolled, if they are to
            be; None is any number of rows, or one that is not known.
    """

    default: Accumulate
    bounds: tuple[tuple[int | None, int], ...]


_CPU = _Device("addmm", ((16, 64), (None, 32)))
_LAUNCHED = _Device("unrolled", ((16, 64), (None, 32)))


def _device(kind: str) -> _Device:
    return _CPU if kind == "cpu" else _LAUNCHED


HIGHEST_RANK = max(rank for device in (_CPU, _LAUNCHED) for _, rank in device.bounds)
"""Above it nothing is unrolled anywhere, and B stands as it was made."""


def accumulation(kind: str) -> Accumulate:
    """The form that Inductor is fastest with on a kind of device.

    >>> accumulation("cuda")
    'unrolled'
    """
    return _device(kind).default


def unrolls(rank: int, rows: Sequence[Any] | None, kind: str) -> bool:
    """Whether to write an up-projection as a product and a sum, where that is asked for.

    Args:
        rank: columns of the up-projection.
        rows: the leading sizes of the low-rank value, numbers or symbols; None for any.
        kind: of the device, as in `torch.device.type`.

    >>> [unrolls(rank, rows, "cuda") for rank, rows in [(16, [1, 4096]), (64, [1, 4096]), (64, [1, 1]), (128, [1, 1])]]
    [True, False, True, False]
    """
    known = rows is not None and all(isinstance(size, int) for size in rows)
    count = math.prod(rows) if rows is not None and known else None
    for most, highest in _device(kind).bounds:
        if most is None or (count is not None and count <= most):
            return rank <= highest
    return False
