"""Codes out of 32-bit words, and groups of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .refusal import InexactError

__all__ = ["container", "order_of", "unpack_words"]


def container(bits: int) -> int:
    """The bits of the codes that hold codes of so many bits.

    Raises:
        InexactError: none does.

    >>> [container(bits) for bits in (2, 3, 4, 6, 8)]
    [2, 4, 4, 8, 8]
    """
    for found in (2, 4, 8):
        if 1 <= bits <= found:
            return found
    raise InexactError(f"its codes have {bits} bits, and 1 to 8 can be held")


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes that lie behind each other in 32-bit words along the first dimension, the first in the lowest bits.

    Args:
        words: int32 [words, ...].
        bits: of a code; one that crosses words (3 bits) goes on in the lowest bits of the next.
        count: codes along the first dimension.

    Returns:
        uint8 [count, ...].

    Raises:
        InexactError: so many codes are another number of words.

    >>> unpack_words(torch.tensor([[0x4321]], dtype=torch.int32), bits=4, count=3).flatten().tolist()
    [1, 2, 3]
    """
    if words.shape[0] != -(-bits * count // 32):
        raise InexactError(f"{words.shape[0]} words of 32 bits do not hold {count} codes of {bits} bits")
    mask = 2**bits - 1
    if 32 % bits == 0:
        parts = [((words >> shift) & mask).to(torch.uint8) for shift in range(0, 32, bits)]
        return torch.stack(parts, 1).flatten(0, 1)[:count]
    unsigned = torch.cat([words.long() & 0xFFFFFFFF, torch.zeros_like(words[:1]).long()])
    at = torch.arange(count, device=words.device) * bits
    shift = (at % 32).reshape(-1, *[1] * (words.dim() - 1))
    both = unsigned[at // 32] | (unsigned[at // 32 + 1] << 32)
    return ((both >> shift) & mask).to(torch.uint8)


def order_of(groups: Tensor | None, columns: int, block: int) -> Tensor | None:
    """The order of columns in which the groups lie behind each other; None where they do already.

    Args:
        groups: [columns], the group of each (GPTQ's ``g_idx``); None where they are in order.

    Returns:
        int64 [columns].

    Raises:
        InexactError: the groups are not all of one size.

    >>> order_of(torch.tensor([1, 0, 1, 0]), columns=4, block=2).tolist()
    [1, 3, 0, 2]
    """
    if groups is None:
        return None
    groups = groups.long()
    wanted = torch.arange(columns, device=groups.device) // block
    if groups.shape == wanted.shape and torch.equal(groups, wanted):
        return None
    order = groups.argsort(stable=True)
    if groups.shape != wanted.shape or not torch.equal(groups[order], wanted):
        raise InexactError(f"its groups of columns are not all of {block}")
    return order
