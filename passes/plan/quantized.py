"""Which quantized projections may share a pack: those whose codes mean the same under each other.

q, k   NF4, blocks of 64            [codes_q; codes_k]   [scales_q; scales_k]       one operator
v      NF4, blocks of 128           stays apart, and the report says why
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_fx.graph.program import Program
from flora_fx.internals import FakeTensor
from flora_fx.ir import Held, Projection

__all__ = ["alike", "difference"]


def alike(program: Program, bases: Sequence[Projection]) -> list[list[Projection]]:
    """The bases of one read, sorted by what may be rows of one weight; the group that down-projections go to first.

    That is the one in floating point, whose rows they may be; where all are quantized, the one with the most bases.

    Args:
        program: whose graph the bases are in.
        bases: in graph order.
    """
    dense = [base for base in bases if base.held is None]
    found: list[list[Projection]] = []
    for base in bases:
        if base.held is None:
            continue
        alone = base.bias is not None and program.trains([base.bias])
        fits = [group for group in found if not alone and not difference(group[0], base)]
        if fits:
            fits[0].append(base)
        else:
            found.append([base])
    found.sort(key=len, reverse=True)
    return [dense, *found] if dense or not found else found


def difference(first: Projection, second: Projection) -> str:
    """Why two quantized projections cannot share a pack; ``""`` where they can."""
    one, other = first.held, second.held
    assert one is not None
    assert other is not None
    for what, own, its in (
        ("kinds", one.kind, other.kind),
        ("bits", one.bits, other.bits),
        ("groups", one.block, other.block),
        ("scales", _name(one.scales.tensor), _name(other.scales.tensor)),
    ):
        if own != its:
            return f"their {what} are {own} and {its}"
    if (one.zeros is None) != (other.zeros is None):
        return "one has zero points and the other has none"
    biases = [base.bias.tensor.dtype for base in (first, second) if base.bias is not None]
    if len(set(biases)) > 1:
        return "their biases have different dtypes"
    return "" if _same_order(one, other) else "their columns are in another order (act-order)"


def _same_order(one: Held, other: Held) -> bool:
    if one.order is None or other.order is None:
        return one.order is other.order
    first, second = one.order.tensor, other.order.tensor
    known = not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in (first, second))
    return first is second or (known and torch.equal(first, second))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
