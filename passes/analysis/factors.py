"""What multiplies a value: constants, symbolic numbers, and tensors with one number per token."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from flora_fx.graph.examples import same_sizes
from flora_fx.graph.program import Program
from flora_fx.ir import Factor

from .operations import DIVIDES, FILLS, MULTIPLIES, NEGATES, WHERES, is_number, operation
from .values import Values

__all__ = ["Factors"]


class Factors:
    """The factors in a graph.

    Args:
        program: the graph's.
        values: which of its nodes hold equal values.
        projections: the linear nodes: of two operands of a product the one that such a node computes is the value.
    """

    def __init__(self, program: Program, values: Values, projections: Collection[Node]) -> None:
        self.program = program
        self.values = values
        self._scaled = self._find_scaled(projections)

    def product(self, node: Node) -> tuple[Node, float, Factor | None] | None:
        """(value, constant, None) or (value, 1, factor) for a value times a factor, or divided by a number."""
        kind, args = operation(node), node.args
        if kind in NEGATES:
            return node.all_input_nodes[0], -1.0, None
        if kind in DIVIDES and len(args) == 2 and is_number(args[1]) and args[1] and not node.kwargs:
            return node.all_input_nodes[0], 1 / float(args[1]), None  # type: ignore[arg-type]
        if kind not in MULTIPLIES | DIVIDES or len(args) != 2 or node.kwargs:
            return None
        first, second = args
        if kind in DIVIDES:
            by_symbol = isinstance(first, Node) and isinstance(second, Node) and self.program.is_number(second)
            return (first, 1.0, Factor(second, divides=True)) if by_symbol else None  # type: ignore[return-value,arg-type]
        if isinstance(first, Node) and is_number(second):
            return first, float(second), None  # type: ignore[arg-type]
        if isinstance(second, Node) and is_number(first):
            return second, float(first), None  # type: ignore[arg-type]
        if not isinstance(first, Node) or not isinstance(second, Node):
            return None
        for value, factor in ((first, second), (second, first)):
            if self.program.is_number(factor):
                return value, 1.0, Factor(factor)
        leads = [self.values.earliest_rows(operand) in self._scaled for operand in (first, second)]
        if leads == [True, False]:
            return first, 1.0, Factor(second)
        return (second, 1.0, Factor(first)) if leads == [False, True] else None

    def per_token(self, factor: Node, value: Node) -> bool:
        """Whether a factor multiplies all features of a token alike, in the value's dtype and shape."""
        if self.program.is_number(factor):
            return True
        shape, of = self.program.shape(factor), self.program.shape(value)
        dtype, wanted = self.program.dtype(factor), self.program.dtype(value)
        if shape is None or (wanted is None and dtype is None):
            return False
        if len(shape) == 0:
            return dtype is not None and dtype.is_floating_point
        if of is None or dtype != wanted or len(shape) > len(of) or shape[-1] != 1:
            return False
        tail = of[len(of) - len(shape) :]
        return same_sizes([b if isinstance(a, int) and a == 1 else a for a, b in zip(shape, tail, strict=True)], tail)

    def vector(self, factor: Node) -> int | None:
        """The length of a vector, which multiplies all tokens alike and changes no shape; None for other factors."""
        shape = self.program.shape(factor)
        return shape[0] if shape is not None and len(shape) == 1 and isinstance(shape[0], int) else None

    def _find_scaled(self, projections: Collection[Node]) -> set[Node]:
        """The values that are one projection's, times factors, in some tokens or in all."""
        found = set(projections)
        for node in self.program.graph.nodes:
            if operation(node) in MULTIPLIES | DIVIDES | NEGATES | WHERES | FILLS:
                operands = [n for n in node.all_input_nodes if self.values.earliest_rows(n) in found]
                if len(operands) == 1:
                    found.add(self.values.earliest_rows(node))
        return found
