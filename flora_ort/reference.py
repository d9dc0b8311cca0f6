"""What the operators compute, in plain torch and in any dtype: their definition, and the oracle of their tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["lora_add", "lora_skip_rms_norm", "lora_swiglu", "skinny_matmul"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def lora_add(
    p: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    parts: Sequence[int],
    blocks: Sequence[int],
    z_start: int = 0,
    adapters: Sequence[int] = (),
) -> Tensor:
    """``p + z B`` in some columns of a pack.

    Args:
        p: [..., columns].
        b: B [rank, any].
        bias: of p [columns], added first.
        z: [..., rank], where it is not in p.
        ids: int64, of p's first dimensions: which adapter its rows have. They have no other's z and B, and none where
            there is no such adapter (-1).
        parts: start and width of each range of p's columns that is wanted, in the order of the result.
        blocks: begin, end, first, last, from of each: to p's columns begin..end come z's numbers first..last times B's
            rows first..last in its columns from..from + end - begin. They must not overlap.
        z_start: where z begins in p.
        adapters: with ``ids``; for each block where within first..last each adapter's rows of B begin, and where those
            of the last one end.

    Returns:
        [..., sum of the widths].

    >>> p = torch.tensor([[1.0, 2.0, 10.0]])
    >>> lora_add(p, torch.tensor([[0.5, 0.25]]), parts=(1, 1, 0, 1), blocks=(0, 2, 0, 1, 0), z_start=2)
    tensor([[4.5000, 6.0000]])

    Two adapters of rank 1, one for each row:

    >>> p, b = torch.tensor([[1.0, 10.0, 20.0], [1.0, 10.0, 20.0]]), torch.tensor([[1.0], [2.0]])
    >>> lora_add(p, b, ids=torch.tensor([1, 0]), parts=(0, 1), blocks=(0, 1, 0, 2, 0), z_start=1, adapters=(0, 1, 2))
    tensor([[41.],
            [11.]])
    """
    if bias is not None:
        p = p + bias
    low = p[..., z_start : z_start + len(b)] if z is None else z
    total = p.clone()
    count = len(adapters) // (len(blocks) // 5)
    for block, (begin, end, first, last, source) in enumerate(zip(*[iter(blocks)] * 5, strict=True)):
        up = b[:, source : source + end - begin]
        if ids is None:
            total[..., begin:end] += low[..., first:last] @ up[first:last]
            continue
        edges = adapters[block * count : (block + 1) * count]
        for adapter, (top, bottom) in enumerate(itertools.pairwise(edges)):
            mine = ids == adapter
            total[..., begin:end][mine] += low[mine][..., top:bottom] @ up[top:bottom]
    return torch.cat([total[..., start : start + width] for start, width in zip(*[iter(parts)] * 2, strict=True)], -1)


def lora_swiglu(
    p: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    gate: int,
    up: int,
    width: int,
    activation: str,
    blocks: Sequence[int],
    z_start: int = 0,
    adapters: Sequence[int] = (),
) -> Tensor:
    """``act(gate) * up``: columns of p that begin at ``gate`` and at ``up``. The rest is `lora_add`'s."""
    parts = (gate, width, up, width)
    both = lora_add(p, b, bias, z, ids, parts=parts, blocks=blocks, z_start=z_start, adapters=adapters)
    return _ACTIVATIONS[activation](both[..., :width]) * both[..., width:]


def lora_skip_rms_norm(
    p: Tensor,
    b: Tensor,
    gamma: Tensor,
    skip: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    start: int,
    width: int,
    group: int,
    epsilon: float,
    blocks: Sequence[int],
    z_start: int = 0,
    adapters: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """A sum and its root-mean-square norm.

    Args:
        gamma: [group].
        skip: [..., width], added to what `lora_add` gives.
        start, width: of p's columns.
        group: how many neighbouring columns are normalised together: ``width``, or the size of a head.
        epsilon: added to the mean of squares.
        p, b, bias, z, ids, blocks, z_start, adapters: see `lora_add`.

    Returns:
        the norm and the sum, [..., width] each.
    """
    parts = (start, width)
    total = lora_add(p, b, bias, z, ids, parts=parts, blocks=blocks, z_start=z_start, adapters=adapters)
    if skip is not None:
        total = total + skip
    heads = total.reshape(*total.shape[:-1], width // group, group)
    return (heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + epsilon) * gamma).flatten(-2), total


def skinny_matmul(x: Tensor, w: Tensor, a: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Products with weights as a model has them.

    Args:
        x: [..., k].
        w: W [n, k].
        a: A [r, k].

    Returns:
        ``x W^T`` [..., n], and ``x A^T`` [..., r] if there is A.
    """
    return x @ w.T, None if a is None else x @ a.T
