"""AWQ (arXiv 2306.00978), version GEMM.

qweight   int32 [K, N / 8]        4-bit codes along N, eight a word, in the order 0, 2, 4, 6, 1, 3, 5, 7
qzeros    int32 [groups, N / 8]   zero points, in the same order
scales    float16 [groups, N]
"""

from __future__ import annotations

from torch import Tensor

from flora_fx.quantized.weight import QuantizedWeight

from .affine import affine_weight
from .packing import unpack_words
from .refusal import InexactError

__all__ = ["read_awq"]

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which of a word's eight codes, counted from the lowest bits, each column is."""


def read_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int, group_size: int) -> QuantizedWeight:
    """The weight of one layer.

    Args:
        bits, group_size: of the quantization config; a group of -1 is all of K.

    Raises:
        InexactError: other than 4 bits.
    """
    if bits != 4:
        raise InexactError(f"AWQ with {bits} bits has no layout that is known")
    k = qweight.shape[0]
    return affine_weight(
        _columns(qweight).t(),
        scales.t(),
        _columns(qzeros).t(),
        None,
        bits=4,
        block=k if group_size == -1 else group_size,
        dtype=scales.dtype,
        source="AWQ",
    )


def _columns(words: Tensor) -> Tensor:
    """[rows, words] -> uint8 [rows, 8 · words], the columns in their own order."""
    rows, count = words.shape
    codes = unpack_words(words.t(), 4, 8 * count)
    return codes.reshape(count, 8, rows)[:, _PLACES].flatten(0, 1).t()
