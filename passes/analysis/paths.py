"""Find the low-rank paths: what an adapter adds to a value.

    z = down(x), or activation(down(x)), or v * down(x) with a vector v;  y' = onto + scale · up(z)

The scale may stand between the two GEMMs, behind them, or be the ``alpha`` of the add; it may be left out. It is a
constant or a symbolic number (Dynamo's, of a float that changes). The operands of the add may stand in either order,
several adapters may be summed or subtracted, and reshapes, casts that change nothing and dropout in eval mode may stand
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import Node

from flora_fx.graph.examples import same_sizes
from flora_fx.graph.program import Program
from flora_fx.ir import Decline, Factor, LowRankPath, Projection, Reason
from flora_fx.passes.context import Context

from .modes import Regions
from .mutation import Effects
from .operations import (
    ACTIVATION_MODULES,
    ACTIVATIONS,
    ADDS,
    DIVIDES,
    DROPOUTS,
    IN_PLACE,
    MULTIPLIES,
    NEGATES,
    SUBTRACTS,
    is_number,
    operation,
    readers,
)
from .projections import Projections
from .reshapes import leading_dimensions_given_by
from .values import Values

__all__ = ["Paths", "find_paths", "is_low_rank", "operands"]

CHANGED = "is changed in place, or may share memory with what is, or its memory layout is read"


@dataclass(frozen=True)
class _Part:
    """One up-projection on the way to an add, with the factors met so far."""

    down: Projection
    up: Projection
    low: Node
    scale: float
    factors: tuple[Factor, ...]
    chain: tuple[Node, ...]
    dropout: Node | None


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
    effects = context[Effects]
    finder = _Finder(context.program, context[Values], context[Projections].by_node(), context[Regions])
    paths: list[LowRankPath] = []
    declines: list[Decline] = []
    absorbed: set[Node] = set()
    # From the last add to the first, so that a sum of several adapters is met at its root.
    for node in reversed(context.program.graph.nodes):
        if node in absorbed:
            continue
        ways, unscalable = finder.at_add(node)
        declines.extend(unscalable)
        refusals: list[Decline] = []
        for onto, parts in ways:
            refused = finder.refuse(node, onto, parts, effects)
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
        self, program: Program, values: Values, by_node: dict[Node, Projection], regions: dict[Node, int]
    ) -> None:
        self.program = program
        self.values = values
        self.by_node = by_node
        self.regions = regions
        self.scaled = self.find_scaled()

    def find_scaled(self) -> set[Node]:
        """The values that are one projection's, times factors."""
        found = set(self.by_node)
        for node in self.program.graph.nodes:
            if operation(node) in MULTIPLIES | DIVIDES | NEGATES:
                operands = [n for n in node.all_input_nodes if self.values.earliest_rows(n) in found]
                if len(operands) == 1:
                    found.add(self.values.earliest_rows(node))
        return found

    def path(self, part: _Part, onto: Node, add: Node) -> LowRankPath:
        """A part as a path; its numbers that are known before anything is computed may be used anywhere."""
        given = [self.program.is_number(f.node) and self.values.is_given(f.node) for f in part.factors]
        numbers = tuple(f for f, ahead in zip(part.factors, given, strict=True) if ahead)
        factors = tuple(f for f, ahead in zip(part.factors, given, strict=True) if not ahead)
        return LowRankPath(part.down, part.up, part.low, part.scale, numbers, factors, onto, add)

    def at_add(self, node: Node) -> tuple[list[tuple[Node, list[_Part]]], list[Decline]]:
        """The ways to see an add as low-rank paths added onto a value, and the declines of paths with another scale.

        Where two low-rank paths are added to each other, either may be the value: the way in which what is added looks
        like an adapter comes first.
        """
        found: list[tuple[Node, list[_Part]]] = []
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
    ) -> list[_Part] | None:
        """The low-rank paths that a value is the (scaled) sum of; None if it is anything else."""
        chain = (*chain, node)
        if node in self.by_node:
            part = self.below(self.by_node[node], scale, factors, chain)
            return None if part is None else [part]
        # Where a no-op's value is changed in place the path is declined for it: that has to be found to be said.
        if (inner := self.values.inner(node) or self.values.no_op(node)) is not None:
            return self.parts(inner, scale, factors, chain)
        if (product := self.product(node)) is not None:
            inner, number, factor = product
            found = self.parts(inner, scale * number, (*factors, factor) if factor else factors, chain)
            if found is None or factor is None or self.per_token(factor.node, inner):
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

    def below(self, up: Projection, scale: float, factors: tuple[Factor, ...], chain: tuple[Node, ...]) -> _Part | None:
        """The down-projection that an up-projection reads, through scales, then through one activation."""
        node = up.operand
        while True:
            source = self.values.earliest_rows(node)
            if source in self.by_node:
                down = self.by_node[source]
                if down.out_features != up.in_features:
                    return None
                return _Part(down, up, source, scale, factors, chain, self.active_dropout(down.reads))
            if self.is_activation(source):
                below = self.by_node.get(self.values.earliest_rows(source.all_input_nodes[0]))
                if below is None or below.out_features != up.in_features or not is_low_rank(below, up):
                    return None
                return _Part(below, up, source, scale, factors, chain, self.active_dropout(below.reads))
            product = self.product(source)
            if product is None:
                return None
            node, number, factor = product
            scale *= number
            if factor is not None:
                below = self.by_node.get(self.values.earliest_rows(node))
                if below is not None and not is_low_rank(below, up):
                    below = None
                if below is not None and below.out_features == up.in_features == self.vector(factor.node):
                    return _Part(below, up, source, scale, factors, chain, self.active_dropout(below.reads))
                if up.bias is not None:
                    return None  # the factor does not reach the bias
                if not self.per_token(factor.node, node):
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
        leads = [self.values.earliest_rows(operand) in self.scaled for operand in (first, second)]
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

    def reaches_down(self, factor: Node, part: _Part) -> bool:
        """Whether a factor found behind the up-projection fits the down-projection's output as well."""
        if len(self.program.shape(factor) or ()) < 2:
            return True
        low, high = self.program.shape(part.down.node), self.program.shape(part.chain[0])
        return low is not None and high is not None and same_sizes(low[:-1], high[:-1])

    def refuse(self, add: Node, onto: Node, parts: list[_Part], effects: Effects) -> Decline | None:
        """Why the paths that end in an add must stay as they are; None if they need not."""
        for part in parts:
            if obstacle := part.down.obstacle or part.up.obstacle:
                return obstacle
            if len({self.regions[node] for node in (add, *part.chain, part.low, part.down.node)}) > 1:
                detail = f"{part.down.node.name} and {add.name} run in different modes"
                return Decline(Reason.OTHER_MODE, add.name, detail)
            if part.dropout is not None:
                detail = (
                    f"{part.down.weight.name} reads {part.dropout.name}, a random mask of its own; fuse in eval mode"
                )
                return Decline(Reason.DROPOUT_ACTIVE, add.name, detail)
            if not all(self.reaches_down(factor.node, part) for factor in part.factors):
                detail = f"a factor has one number per token, in another shape than {part.down.node.name}"
                return Decline(Reason.SCALE_NOT_SCALAR, add.name, detail)
            for inner in part.chain:
                names = [user.name for user in readers(inner)]
                if len(names) > 1:
                    detail = f"{inner.name} is also read elsewhere (readers: {', '.join(names)})"
                    return Decline(Reason.OTHER_READER, add.name, detail)
                if inner in effects.touched:
                    return Decline(Reason.MUTATED, add.name, f"{inner.name} {CHANGED}")
        for touched in (onto, add):
            if touched in effects.touched:
                return Decline(Reason.MUTATED, add.name, f"{touched.name} {CHANGED}")
        if not self.same_rows(onto, parts):
            shapes = self.program.shape(onto), self.program.shape(parts[0].chain[0])
            known = None not in shapes and all(isinstance(size, int) for shape in shapes for size in shape or ())
            has = "has another shape than" if known else "is not known to have the shape of"
            detail = f"{onto.name} {has} what is added to it"
            return Decline(Reason.SHAPE_UNKNOWN, add.name, detail)
        return None

    def same_rows(self, onto: Node, parts: list[_Part]) -> bool:
        """Whether the value that is added to has the paths' shape, so that neither operand is broadcast."""
        added = parts[0].chain[0]
        if self.program.shape(onto) is not None and self.program.shape(added) is not None:
            return self.program.same_shape(onto, added)
        if onto not in self.shapeless or added not in self.shapeless:
            return False
        (leading, features), (other, _) = self.shapeless[onto], self.shapeless[added]
        return leading is other and {features} == {part.up.out_features for part in parts}

    @cached_property
    def shapeless(self) -> dict[Node, tuple[Node, int | None]]:
        """For a graph without shapes: the earliest node with the same leading dimensions, and the last dimension.

        In graph order, each from its operands: a recursion would walk a residual stream once per path through it.
        """
        known: dict[Node, tuple[Node, int | None]] = {}
        for node in self.program.graph.nodes:
            source, rows = self.values.earliest(node), self.values.earliest_rows(node)
            leading, features = known.get(source, (source, None)), known.get(rows, (rows, None))[1]
            operands = [known[operand] for operand in node.all_input_nodes]
            product = self.product(node)
            if source in self.by_node:
                projection = self.by_node[source]
                leading, features = known[projection.operand], projection.out_features
            elif (restored := leading_dimensions_given_by(self.values, node)) is not None:
                leading = (restored, None)
            elif product is not None:
                features = known[product[0]][1]
                factor = product[2]
                if factor is None or self.program.shape(factor.node) in ((), (features,)):
                    leading = known[product[0]]
            elif operation(node) in ADDS and len({operand[0] for operand in operands}) == 1:
                leading = operands[0]
                features = operands[0][1] if len({operand[1] for operand in operands}) == 1 else None
            known[node] = (leading[0], features)
        return known


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
