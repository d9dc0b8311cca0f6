"""Find what is selected by token: values that stand in some tokens, and zeros in the others.

    where(mask, v, 0)    where(mask, 0, v)    masked_fill(v, mask, 0)    with mask [..., 1], or broadcast to it

A selection commutes with a linear layer that has no bias: ``up(where(mask, z, 0)) = where(mask, up(z), 0)``. A product
with a mask is no selection: zero times infinity is not zero.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from flora_fx.graph.examples import same_sizes
from flora_fx.graph.program import Program
from flora_fx.ir import Choice, Select

from .operations import EQUALS, FILLS, RESHAPES, UNSQUEEZES, WHERES, is_number, operation
from .values import Values

__all__ = ["Masked", "Selections"]

aten = torch.ops.aten

ZEROS = {
    *(torch.zeros_like, aten.zeros_like.default),
    *(torch.zeros, aten.zeros.default),
    *(aten.new_zeros.default, "new_zeros"),
}
CONSTANTS = {torch.full: 1, aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
"""What makes a tensor of one number, and which argument the number is."""


class Masked(NamedTuple):
    """``where(mask, value, 0)``, or another filling in the place of the zero.

    Attributes:
        value: what stands where it is selected.
        select: by what.
        zero: whether zeros stand elsewhere.
    """

    value: Node
    select: Select
    zero: bool


class Selections:
    """The selections in a graph.

    Args:
        program: the graph's.
        values: which of its nodes hold equal values.
    """

    def __init__(self, program: Program, values: Values) -> None:
        self.program = program
        self.values = values

    def masked(self, node: Node) -> Masked | None:
        """The value that a node selects from; None if it does not select."""
        kind, args = operation(node), node.args
        if kind in FILLS and len(args) == 3 and not node.kwargs:
            value, mask, fill = args
            kept = False
        elif kind in WHERES and len(args) == 3 and not node.kwargs:
            mask, value, fill = (args[1], args[0], args[2]) if kind == "where" else args
            kept = True
            if self._is_zero(value) and isinstance(fill, Node):
                value, fill, kept = fill, value, False
        else:
            return None
        if not isinstance(value, Node) or not isinstance(mask, Node):
            return None
        mask = self.values.earliest(mask)
        choice = self._choice(mask) if kept else None
        return Masked(value, Select(mask, value, kept, choice), self._is_zero(fill))

    def per_token(self, node: Node, masked: Masked) -> bool:
        """Whether a node keeps or drops all features of a token alike, and changes neither shape nor dtype."""
        mask, value = self.program.shape(masked.select.mask), self.program.shape(masked.value)
        if not masked.zero or mask is None or value is None or masked.select.mask in self.values.effects.touched:
            return False
        if self.program.dtype(masked.select.mask) != torch.bool:
            return False
        if self.program.dtype(node) != self.program.dtype(masked.value):
            return False
        return self.program.same_shape(node, masked.value) and (not mask or mask[-1] == 1) and len(mask) <= len(value)

    def same_tokens(self, select: Select, value: Node) -> bool:
        """Whether a value is known to have the tokens of that which was selected from, in the same order."""
        shapes = self.program.shape(select.of), self.program.shape(value)
        return all(shapes) and same_sizes(shapes[0][:-1], shapes[1][:-1])  # type: ignore[index]

    def _choice(self, mask: Node) -> Choice | None:
        """``ids == number``, each seen through reshapes."""
        node = self._ungrouped(mask)
        if operation(node) not in EQUALS or len(node.args) != 2 or node.kwargs:
            return None
        ids, number = node.args
        if not isinstance(ids, Node) or not isinstance(number, int) or not is_number(number):
            return None
        return Choice(self._ungrouped(ids), number) if self.program.dtype(ids) == torch.int64 else None

    def _ungrouped(self, node: Node) -> Node:
        """The earliest value with the same elements in the same order."""
        node = self.values.earliest(node)
        while operation(node) in RESHAPES | UNSQUEEZES or _adds_dimensions(node):
            node = self.values.earliest(node.all_input_nodes[0])
        return node

    def _is_zero(self, fill: Any) -> bool:
        if not isinstance(fill, Node):
            return is_number(fill) and fill == 0
        fill = self.values.earliest(fill)
        kind, args = operation(fill), fill.args
        if fill in self.values.effects.touched or fill.kwargs.get("fill_value") is not None:
            return False
        place = CONSTANTS.get(kind)
        return kind in ZEROS or (place is not None and len(args) > place and is_number(args[place]) and not args[place])


def _adds_dimensions(node: Node) -> bool:
    """``ids[:, None, None]``"""
    if operation(node) is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    return all(one is None or one == slice(None) for one in node.args[1])
