"""Find the low-rank paths: what an adapter adds to a value.

    z = down(x), or activation(down(x)), or v * down(x) with a vector v;  y' = onto + scale · up(z)
    y' = onto + scale · where(mask, up(z), 0), or up(where(mask, z, 0))

The scale may stand between the two GEMMs, behind them, or be the ``alpha`` of the add; it may be left out. It is a
constant or a symbolic number (Dynamo's, of a float that changes). The operands of the add may stand in either order,
several adapters may be summed or subtracted, and reshapes, casts that change nothing and dropout in eval mode may stand
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.ir import Decline, Factor, LowRankPath, Projection, Reason, Select
from flora_fx.passes.context import Context

from .factors import Factors
from .modes import Regions
from .mutation import Effects
from .operations import (
    ACTIVATION_MODULES,
    ACTIVATIONS,
    ADDS,
    DROPOUTS,
    IN_PLACE,
    SUBTRACTS,
    is_number,
    operation,
    readers,
)
from .projections import Projections
from .refusals import Part, Refuser
from .selections import Masked, Selections
from .values import Values

__all__ = ["Paths", "find_paths", "is_low_rank", "operands"]


class _Unlike(Exception):  # noqa: N818 - carries a decline, is not an error
    def __init__(self, decline: Decline) -> None:
        self.decline = decline


def _unscalable(node: Node, factor: Node) -> _Unlike:
    detail = f"{factor.name} is not known to be one number, or one per token, of the path's dtype"
    return _Unlike(Decline(Reason.SCALE_NOT_SCALAR, node.name, detail))


def _unselectable(node: Node, masked: Masked, *, twice: bool) -> _Unlike:
    known = "keep or drop whole tokens" if masked.zero else "be zero where it does not"
    detail = f"{node.name} selects by {masked.select.mask.name}"
    detail += ", and what it gives is selected from again" if twice else f", and is not known to {known}"
    return _Unlike(Decline(Reason.NOT_BY_TOKEN, node.name, detail))


@dataclass(frozen=True)
class _Way:
    """What was met on the way from an add to a low-rank value."""

    scale: float
    factors: tuple[Factor, ...] = ()
    chain: tuple[Node, ...] = ()
    select: Select | None = None

    def times(self, number: float, factor: Factor | None = None) -> _Way:
        more = () if factor is None else (factor,)
        return replace(self, scale=self.scale * number, factors=(*self.factors, *more))


class Paths(tuple[LowRankPath, ...]):
    """All low-rank paths, in the order of their adds."""


def find_paths(context: Context) -> Paths:
    """Find the paths; decline those that must stay as they are."""
    program, values, by_node = context.program, context[Values], context[Projections].by_node()
    factors = Factors(program, values, by_node)
    selections = Selections(program, values)
    finder = _Finder(program, values, context[Projections].dense(), factors, selections)
    refuser = Refuser(program, values, context[Effects], by_node, context[Regions], factors, selections)
    paths: list[LowRankPath] = []
    declines: list[Decline] = []
    absorbed: set[Node] = set()
    # From the last add to the first, so that a sum of several adapters is met at its root.
    for node in reversed(program.graph.nodes):
        if node in absorbed:
            continue
        ways, unlike = finder.at_add(node)
        declines.extend(unlike)
        refusals: list[Decline] = []
        for onto, parts in ways:
            refused = refuser.refusal(node, onto, parts)
            if refused is None:
                absorbed.update(n for part in parts for n in part.chain)
                paths.extend(finder.path(part, onto, node) for part in parts)
                break
            refusals.append(refused)
        else:
            declines.extend(refusals)
    context.declines.extend(reversed(declines))
    return Paths(reversed(paths))


class _Finder:
    def __init__(
        self,
        program: Program,
        values: Values,
        by_node: dict[Node, Projection],
        factors: Factors,
        selections: Selections,
    ) -> None:
        self.program = program
        self.values = values
        self.by_node = by_node
        self.factors = factors
        self.selections = selections

    def path(self, part: Part, onto: Node, add: Node) -> LowRankPath:
        """A part as a path; its numbers that are known before anything is computed may be used anywhere."""
        given = [self.program.is_number(f.node) and self.values.is_given(f.node) for f in part.factors]
        numbers = tuple(f for f, ahead in zip(part.factors, given, strict=True) if ahead)
        factors = tuple(f for f, ahead in zip(part.factors, given, strict=True) if not ahead)
        return LowRankPath(part.down, part.up, part.low, part.scale, numbers, factors, onto, add, part.select)

    def at_add(self, node: Node) -> tuple[list[tuple[Node, list[Part]]], list[Decline]]:
        """The ways to see an add as low-rank paths added onto a value, and the declines of those that are no such.

        Where two low-rank paths are added to each other, either may be the value: the way in which what is added looks
        like an adapter comes first.
        """
        found: list[tuple[Node, list[Part]]] = []
        declines: list[Decline] = []
        for onto, added, sign, alpha in self.operands(node):
            try:
                parts = self.parts(added, _Way(sign, alpha))
            except _Unlike as refusal:
                declines.append(refusal.decline)
                continue
            if parts is not None:
                found.append((onto, parts))
        found.sort(key=lambda way: not all(is_low_rank(part.down, part.up) for part in way[1]))
        return found, declines

    def operands(self, node: Node) -> Iterator[tuple[Node, Node, float, tuple[Factor, ...]]]:
        """As the function `operands`, and also where the add multiplies by a symbolic ``alpha``."""
        alpha = node.kwargs.get("alpha")
        if isinstance(alpha, Node) and operation(node) in ADDS | SUBTRACTS and len(node.args) == 2:
            onto, added = node.args
            if isinstance(onto, Node) and isinstance(added, Node) and self.program.is_number(alpha):
                yield onto, added, -1.0 if operation(node) in SUBTRACTS else 1.0, (Factor(alpha),)
        for onto, added, sign in operands(node):
            yield onto, added, sign, ()

    def parts(self, node: Node, way: _Way) -> list[Part] | None:
        """The low-rank paths that a value is the (scaled) sum of; None if it is anything else."""
        way = replace(way, chain=(*way.chain, node))
        if node in self.by_node:
            part = self.below(self.by_node[node], way)
            return None if part is None else [part]
        # Where a no-op's value is changed in place the path is declined for it: that has to be found to be said.
        if (inner := self.values.inner(node) or self.values.no_op(node)) is not None:
            return self.parts(inner, way)
        if (product := self.factors.product(node)) is not None:
            inner, number, factor = product
            found = self.parts(inner, way.times(number, factor))
            if found is None or factor is None or self.factors.per_token(factor.node, inner):
                return found
            if all(is_low_rank(part.down, part.up) for part in found):
                raise _unscalable(node, factor.node)
            return None
        if (masked := self.selections.masked(node)) is not None:
            return self.selected(node, masked, way)
        if operation(node) in ADDS | SUBTRACTS and all(self.program.is_number(factor.node) for factor in way.factors):
            for first, second, sign, alpha in self.operands(node):
                # A value with many readers is a residual stream, with all layers behind it: look there last.
                signed = sorted(((first, 1.0, ()), (second, sign, alpha)), key=lambda operand: len(operand[0].users))
                (a, a_sign, a_alpha), (b, b_sign, b_alpha) = signed
                one = self.parts(a, replace(way.times(a_sign), factors=(*way.factors, *a_alpha)))
                two = one and self.parts(b, replace(way.times(b_sign), factors=(*way.factors, *b_alpha)))
                return one + two if one and two else None
        return None

    def selected(self, node: Node, masked: Masked, way: _Way) -> list[Part] | None:
        """The low-rank paths that a value is the sum of in some tokens, where it is zero in the others."""
        found = self.parts(masked.value, replace(way, select=masked.select))
        if found is None:
            return None
        if way.select is None and self.selections.per_token(node, masked):
            return found
        if all(is_low_rank(part.down, part.up) for part in found):
            raise _unselectable(node, masked, twice=way.select is not None)
        return None

    def below(self, up: Projection, way: _Way) -> Part | None:
        """The down-projection that an up-projection reads, through scales and a selection, then one activation."""
        node = up.operand
        while True:
            source = self.values.earliest_rows(node)
            if source in self.by_node:
                down = self.by_node[source]
                return self.part(down, up, source, way) if down.out_features == up.in_features else None
            if self.is_activation(source):
                below = self.by_node.get(self.values.earliest_rows(source.all_input_nodes[0]))
                fits = below is not None and below.out_features == up.in_features and is_low_rank(below, up)
                return self.part(below, up, source, way) if below and fits else None
            if (masked := self.selections.masked(source)) is not None:
                if way.select is None and up.bias is None and self.selections.per_token(source, masked):
                    way, node = replace(way, select=masked.select), masked.value
                    continue
                below = self.by_node.get(self.elementwise(masked.value))
                fits = below is not None and below.out_features == up.in_features and is_low_rank(below, up)
                return self.part(below, up, source, way) if below and fits else None
            product = self.factors.product(source)
            if product is None:
                return None
            node, number, factor = product
            if factor is not None:
                below = self.by_node.get(self.values.earliest_rows(node))
                if below is not None and not is_low_rank(below, up):
                    below = None
                if below is not None and below.out_features == up.in_features == self.factors.vector(factor.node):
                    return self.part(below, up, source, way.times(number))
                if up.bias is not None:
                    return None  # the factor does not reach the bias
                if not self.factors.per_token(factor.node, node):
                    if below is not None:
                        raise _unscalable(source, factor.node)
                    return None
            elif up.bias is not None and number != 1:
                return None
            way = way.times(number, factor)

    def part(self, down: Projection, up: Projection, low: Node, way: _Way) -> Part:
        """A path to be, and the dropout in front of it."""
        return Part(down, up, low, way.scale, way.factors, way.chain, self.active_dropout(down.reads), way.select)

    def elementwise(self, node: Node) -> Node:
        """What a value is an elementwise function of: products and activations are left out."""
        while True:
            node = self.values.earliest_rows(node)
            product = self.factors.product(node)
            if product is None and not self.is_activation(node):
                return node
            node = product[0] if product else node.all_input_nodes[0]

    def active_dropout(self, node: Node) -> Node | None:
        """The node itself where it is a dropout of the adapter's own; those that do nothing were seen through."""
        if operation(node) not in DROPOUTS and not self.is_dropout_module(node):
            return None
        return node if len(readers(node)) == 1 else None  # what others read too is one mask for all

    def is_activation(self, node: Node) -> bool:
        """An elementwise function of one value."""
        if node.op == "call_module":
            return type(self.program.attribute(str(node.target))) in ACTIVATION_MODULES
        return operation(node) in ACTIVATIONS and len(node.all_input_nodes) == 1

    def is_dropout_module(self, node: Node) -> bool:
        if node.op != "call_module":
            return False
        return isinstance(self.program.attribute(str(node.target)), nn.Dropout)


def is_low_rank(down: Projection, up: Projection) -> bool:
    """Whether two projections look like an adapter: a gated MLP, say, goes through more features, not fewer."""
    return down.out_features < min(down.in_features, up.out_features)


def operands(node: Node) -> Iterator[tuple[Node, Node, float]]:
    """The ways to read an add as (value added to, value added, constant factor of what is added)."""
    kind = operation(node)
    if kind not in ADDS | SUBTRACTS or len(node.args) != 2:
        return
    onto, added = node.args
    alpha: Any = node.kwargs.get("alpha", 1)
    if not isinstance(onto, Node) or not isinstance(added, Node) or not is_number(alpha):
        return
    sign = -float(alpha) if kind in SUBTRACTS else float(alpha)
    yield onto, added, sign
    if sign == 1 and kind not in IN_PLACE:
        yield added, onto, 1.0
