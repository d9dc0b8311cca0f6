"""Which up-projections are worth writing as a product and a sum: those with few products for each element.

An element of y + s·B z is read and written once, whoever computes it; unrolled it costs 2·rank operations more. By the
data sheet an H100 does some 70 of them in the time that its memory takes (60 TFLOP/s beside 3.4 TB/s, 4 bytes an
element), so with many rows ranks up to 32 should be free. With few rows the launch that is saved is worth more. Neither
was timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["HIGHEST_RANK", "unrolls"]

HIGHEST_RANK = 64
"""Above it nothing is unrolled, and B stands as it was made."""
_RANK_OF_ANY_ROWS = 32
_FEW_ROWS = 16


def unrolls(rank: int, rows: Sequence[Any] | None) -> bool:
    """Whether to write an up-projection as a product and a sum, for a compiler that writes loops.

    Args:
        rank: columns of the up-projection.
        rows: the leading sizes of the low-rank value, numbers or symbols; None for any.

    >>> unrolls(16, [1, 4096]), unrolls(64, [1, 4096]), unrolls(64, [1, 1]), unrolls(128, [1, 1])
    (True, False, True, False)
    """
    few = rows is not None and all(isinstance(size, int) for size in rows) and math.prod(rows) <= _FEW_ROWS
    return rank <= (HIGHEST_RANK if few else _RANK_OF_ANY_ROWS)
