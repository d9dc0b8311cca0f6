"""Find the low-rank paths: what an adapter adds to a value.

    z = down(x), or activation(down(x)), or v * down(x) with a vector v;  y' = onto + scale · up(z)

The scale may stand between the two GEMMs, behind them, or be the ``alpha`` of the add; it may be left out. It is a
constant or a symbolic number (Dynamo's, of a float that changes). The operands of the add may stand in either order,
several adapters may be summed or subtracted, and reshapes, casts that change nothing and dropout in eval mode may stand
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.ir import Decline, Factor, LowRankPath, Projection, Reason
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
from .values import Values

__all__ = ["Paths", "find_paths", "is_low_rank", "operands"]


class _Unscalable(Exception):  # noqa: N818 - carries a decline, is not an error
    def __init__(self, node: Node, factor: Node) -> None:
        self.decline = Decline(
            Reason.SCALE_NOT_SCALAR,
            node.name,
            f"{factor.name} is not known to be one number, or one per token, of the path's dtype",
        )


class Paths(tuple[LowRankPath, ...]):
    """All low-rank paths, in the order of their adds."""


def find_paths(context: Context) -> Paths:
    """Find the paths; decline those that must stay as they are."""
    program, values, by_node = context.program, context[Values], context[Projections].by_node()
    factors = Factors(program, values, by_node)
    finder = _Finder(program, values, context[Projections].dense(), factors)
    refuser = Refuser(program, values, context[Effects], by_node, context[Regions], factors)
    paths: list[LowRankPath] = []
    declines: list[Decline] = []
    absorbed: set[Node] = set()
    # From the last add to the first, so that a sum of several adapters is met at its root.
    for node in reversed(program.graph.nodes):
        if node in absorbed:
            continue
        ways, unscalable = finder.at_add(node)
        declines.extend(unscalable)
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
    def __init__(self, program: Program, values: Values, by_node: dict[Node, Projection], factors: Factors) -> None:
        self.program = program
        self.values = values
        self.by_node = by_node
        self.factors = factors

    def path(self, part: Part, onto: Node, add: Node) -> LowRankPath:
        """A part as a path; its numbers that are known before anything is computed may be used anywhere."""
        given = [self.program.is_number(f.node) and self.values.is_given(f.node) for f in part.factors]
        numbers = tuple(f for f, ahead in zip(part.factors, given, strict=True) if ahead)
        factors = tuple(f for f, ahead in zip(part.factors, given, strict=True) if not ahead)
        return LowRankPath(part.down, part.up, part.low, part.scale, numbers, factors, onto, add)

    def at_add(self, node: Node) -> tuple[list[tuple[Node, list[Part]]], list[Decline]]:
        """The ways to see an add as low-rank paths added onto a value, and the declines of paths with another scale.

        Where two low-rank paths are added to each other, either may be the value: the way in which what is added looks
        like an adapter comes first.
        """
        found: list[tuple[Node, list[Part]]] = []
        declines: list[Decline] = []
        for onto, added, sign, alpha in self.operands(node):
            try:
                parts = self.parts(added, sign, alpha, ())
            except _Unscalable as refusal:
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

    def parts(
        self, node: Node, scale: float, factors: tuple[Factor, ...], chain: tuple[Node, ...]
    ) -> list[Part] | None:
        """The low-rank paths that a value is the (scaled) sum of; None if it is anything else."""
        chain = (*chain, node)
        if node in self.by_node:
            part = self.below(self.by_node[node], scale, factors, chain)
            return None if part is None else [part]
        # Where a no-op's value is changed in place the path is declined for it: that has to be found to be said.
        if (inner := self.values.inner(node) or self.values.no_op(node)) is not None:
            return self.parts(inner, scale, factors, chain)
        if (product := self.factors.product(node)) is not None:
            inner, number, factor = product
            found = self.parts(inner, scale * number, (*factors, factor) if factor else factors, chain)
            if found is None or factor is None or self.factors.per_token(factor.node, inner):
                return found
            if all(is_low_rank(part.down, part.up) for part in found):
                raise _Unscalable(node, factor.node)
            return None
        if operation(node) in ADDS | SUBTRACTS and all(self.program.is_number(factor.node) for factor in factors):
            for first, second, sign, alpha in self.operands(node):
                # A value with many readers is a residual stream, with all layers behind it: look there last.
                signed = sorted(((first, 1.0, ()), (second, sign, alpha)), key=lambda operand: len(operand[0].users))
                (a, a_sign, a_alpha), (b, b_sign, b_alpha) = signed
                one = self.parts(a, scale * a_sign, (*factors, *a_alpha), chain)
                two = None if one is None else self.parts(b, scale * b_sign, (*factors, *b_alpha), chain)
                return None if one is None or two is None else one + two
        return None

    def below(self, up: Projection, scale: float, factors: tuple[Factor, ...], chain: tuple[Node, ...]) -> Part | None:
        """The down-projection that an up-projection reads, through scales, then through one activation."""
        node = up.operand
        while True:
            source = self.values.earliest_rows(node)
            if source in self.by_node:
                down = self.by_node[source]
                if down.out_features != up.in_features:
                    return None
                return Part(down, up, source, scale, factors, chain, self.active_dropout(down.reads))
            if self.is_activation(source):
                below = self.by_node.get(self.values.earliest_rows(source.all_input_nodes[0]))
                if below is None or below.out_features != up.in_features or not is_low_rank(below, up):
                    return None
                return Part(below, up, source, scale, factors, chain, self.active_dropout(below.reads))
            product = self.factors.product(source)
            if product is None:
                return None
            node, number, factor = product
            scale *= number
            if factor is not None:
                below = self.by_node.get(self.values.earliest_rows(node))
                if below is not None and not is_low_rank(below, up):
                    below = None
                if below is not None and below.out_features == up.in_features == self.factors.vector(factor.node):
                    return Part(below, up, source, scale, factors, chain, self.active_dropout(below.reads))
                if up.bias is not None:
                    return None  # the factor does not reach the bias
                if not self.factors.per_token(factor.node, node):
                    if below is not None:
                        raise _Unscalable(source, factor.node)
                    return None
                factors = (*factors, factor)
            elif up.bias is not None and number != 1:
                return None

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
