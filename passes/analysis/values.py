"""Which nodes hold equal values: through no-ops, and through the same operation done twice.

    dropout(x, 0.1, False)   to(x, x.dtype)   clone(x)   expand(x, x.shape)      all equal x
    view(x, s)               view(x, s)                                          equal each other
    view(view(x, s), t)                                                          equals view(x, t)

Values that are changed in place, or share memory with one that is, equal nothing but themselves (see `mutation`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.internals import OpOverload
from flora_fx.ir import Weight
from flora_fx.passes.context import Context

from .mutation import Effects
from .no_ops import is_eval_dropout, no_op_operand
from .operations import (
    DROPOUTS,
    EXPANDS,
    MERGEABLE,
    RESHAPES,
    SIZES,
    TORCHS_OWN,
    TRANSPOSES,
    dependencies,
    operation,
    swaps_last_two,
)
from .reshapes import keeps_last_dimension

__all__ = ["Values", "find_values"]


def find_values(context: Context) -> Values:
    """Compare all nodes of a graph."""
    return Values(context.program, context[Effects])


class Values:
    """For each node, the earliest that holds the same value."""

    def __init__(self, program: Program, effects: Effects) -> None:
        self.program = program
        self.effects = effects
        self._earliest: dict[Node, Node] = {}
        self._first: dict[Hashable, Node] = {}
        # In graph order, so that the first of several equal nodes represents them and is defined before them all.
        for node in program.graph.nodes:
            self._earliest[node] = self._representative(node)

    def earliest(self, node: Node) -> Node:
        """The earliest node that holds the same value."""
        return self._earliest.get(node, node)

    def earliest_rows(self, node: Node) -> Node:
        """The earliest node with the same rows, however its leading dimensions are grouped."""
        node = self.earliest(node)
        while operation(node) in RESHAPES and keeps_last_dimension(self, node):
            node = self.earliest(node.all_input_nodes[0])
        return node

    def inner(self, node: Node) -> Node | None:
        """The operand of a no-op or of a reshape that keeps the last dimension; None for any other node."""
        if not node.all_input_nodes:
            return None
        operand = node.all_input_nodes[0]
        return operand if self.earliest_rows(node) is self.earliest_rows(operand) else None

    def no_op(self, node: Node) -> Node | None:
        """The operand of a node that returns it unchanged, whatever happens to either afterwards."""
        return no_op_operand(self.program, node, self.earliest)

    def weight(self, node: Node) -> Weight | None:
        """The parameter that a node shows as a matrix, through no-ops, transposes and expansion over a batch.

        ``transposed`` says how the parameter relates to the node: False where the node shows it as it is stored.
        """
        node = self.earliest(node)
        weight = self.program.weight(node)
        if weight is not None:
            return weight if weight.tensor.dim() == 2 else None
        kind = operation(node)
        if kind in TRANSPOSES and swaps_last_two(node):
            inner = self.weight(node.all_input_nodes[0])
            return replace(inner, transposed=not inner.transposed) if inner else None
        if kind in EXPANDS or kind in RESHAPES:
            inner = self.weight(node.all_input_nodes[0])
            shape = self.program.shape(node)
            if inner and shape and len(shape) > 2 and tuple(shape[-2:]) == tuple(inner.matrix.shape):
                return inner
        return None

    def is_given(self, node: Node) -> bool:
        """Whether a number is known before anything is computed: made of the graph's inputs and other numbers alone."""
        above = dependencies(node)
        given = all(found.op == "placeholder" or self.program.is_number(found) for found in above)
        return given and self.effects.touched.isdisjoint(above)

    def eval_dropouts(self) -> tuple[str, ...]:
        """The dropout modules that do nothing only because they are in eval mode, and were seen through."""
        through = [node for node, found in self._earliest.items() if found is not node]
        return tuple(sorted({str(node.target) for node in through if is_eval_dropout(self.program, node)}))

    def _representative(self, node: Node) -> Node:
        if node in self.effects.touched:
            return node
        inner = self.no_op(node)
        if inner is not None and inner not in self.effects.touched:
            return self.earliest(inner)
        if not self.effects.touched.isdisjoint(node.all_input_nodes):
            return node  # read once before and once after a change, the same operation gives two values
        if operation(node) in RESHAPES and (before := self._same_shape_before(node)) is not None:
            return before
        key = None if node in self.effects.changed else self._key(node)
        return node if key is None else self._first.setdefault(key, node)

    def _same_shape_before(self, node: Node) -> Node | None:
        """For a reshape that leads back to a shape that its value had before, the node that has it."""
        base = self.earliest(node.all_input_nodes[0])
        while operation(base) in RESHAPES and base not in self.effects.touched:
            if self.program.same_shape(base, node):
                return base
            base = self.earliest(base.all_input_nodes[0])
        return base if self.program.same_shape(base, node) and base is not node else None

    def _key(self, node: Node) -> Hashable | None:
        """Equal for nodes that compute the same from the same; None for those that may not be merged."""
        kind = operation(node)
        if isinstance(kind, OpOverload):
            # Somebody's own operator may draw numbers or keep a state without saying so.
            if kind._schema.is_mutable or kind.namespace not in TORCHS_OWN:
                return None
            if torch.Tag.nondeterministic_seeded in kind.tags or kind in DROPOUTS:
                return None
        elif kind is operator.getitem:
            if operation(node.all_input_nodes[0]) not in SIZES:
                return None
        elif kind not in MERGEABLE:
            return None
        try:
            key = (kind, _freeze(node.args, self.earliest), _freeze(node.kwargs, self.earliest))
            hash(key)
        except TypeError:
            return None
        return key


def _freeze(value: Any, earliest: Callable[[Node], Node]) -> Hashable:
    if isinstance(value, Node):
        return earliest(value)
    if isinstance(value, tuple | list):
        return tuple(_freeze(v, earliest) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v, earliest)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return (type(value), value)
