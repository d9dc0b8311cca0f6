"""Write weight-decomposed adapters (DoRA) as LoRAs whose sum is scaled by one stored vector.

before                                                  after
n = norm(W + s·B A)   m = v / n                         m is a stored vector, computed from v, W, A and B
y = linear(x, W, b)   u = linear(linear(x, A), B)       y = linear(x, W)   u = linear(linear(x, A), B)
y' = y + ((m - 1)·(y - b) + m·u·s)                      y' = b + m·(y + s·u)

A sum is taken in whatever order it is written, if its terms come to m·(W x) + s·m·(B A x) + b. Where no weight trains,
m is the same at each call: the norm over all of W leaves the graph, and m is computed again only when a weight has
changed. This pass runs before the paths are looked for, so that they find a LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.internals import OpOverload
from flora_fx.ir import Derived, Projection, Weight
from flora_fx.passes.analysis.modes import Regions
from flora_fx.passes.analysis.mutation import Effects
from flora_fx.passes.analysis.operations import (
    ADDS,
    DIVIDES,
    IN_PLACE_ADDS,
    MULTIPLIES,
    NEGATES,
    SUBTRACTS,
    TORCHS_OWN,
    dependencies,
    is_number,
    operation,
    readers,
)
from flora_fx.passes.analysis.paths import is_low_rank, operands
from flora_fx.passes.analysis.projections import ADDMMS, LINEARS, Projections
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.context import Context
from flora_fx.passes.plan.names import Names

from .clean import erase_unread

__all__ = ["Magnitudes", "rewrite_magnitudes"]

aten = torch.ops.aten

Factor = tuple[float, float]
"""``a + b·m``."""
ONE, MAGNITUDE = (1.0, 0.0), (0.0, 1.0)
FARTHEST = 32
"""Operations from one such sum to its terms."""


class Magnitudes(tuple[Derived, ...]):
    """The vectors that are stored: the m of each sum that was rewritten."""


def rewrite_magnitudes(context: Context) -> Magnitudes:
    """Rewrite what there is."""
    program, effects = context.program, context[Effects]
    if not program.derives:
        return Magnitudes()
    finder = _Finder(program, context[Values], effects, context[Projections].by_node(), context[Regions])
    names = Names()
    found: list[Derived] = []
    alive = set(program.graph.nodes)
    for node in reversed(list(program.graph.nodes)):
        if node not in alive or operation(node) not in ADDS - IN_PLACE_ADDS or not (parts := finder.at_add(node)):
            continue
        derived = finder.derived(parts, names)
        if derived is not None:
            found.append(derived)
            _write(program, parts, derived, effects)
            alive = set(program.graph.nodes)
    if found:
        context.forget(Effects, Regions, Values, Projections)
    return Magnitudes(found)


@dataclass(eq=False)
class _Sum:
    """A sum, taken apart.

    Attributes:
        top: the add that it ends in.
        terms: what is summed up, each with its factor.
        entries: for each term, the node that enters the sum: the term itself, or a no-op or reshape of it.
        magnitude: m, once it is met.
        inner: the nodes between the terms and the sum.
        steps: those that compute.
    """

    top: Node
    terms: dict[Node, Factor] = field(default_factory=dict)
    entries: dict[Node, Node] = field(default_factory=dict)
    magnitude: Node | None = None
    inner: set[Node] = field(default_factory=set)
    steps: set[Node] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class _Parts:
    """``top = [bias +] m·(y + scale·delta)``; ``bias`` where m does not reach the base's own.

    y is the value of ``base`` and delta that of an up-projection, both in the shape of ``top``.
    """

    top: Node
    base: Projection
    y: Node
    delta: Node
    scale: float
    magnitude: Node
    bias: Weight | None


class _Finder:
    def __init__(
        self,
        program: Program,
        values: Values,
        effects: Effects,
        by_node: dict[Node, Projection],
        regions: dict[Node, int],
    ) -> None:
        self.program = program
        self.values = values
        self.effects = effects
        self.by_node = by_node
        self.regions = regions
        self.constant = _constants(program, regions)

    def at_add(self, node: Node) -> _Parts | None:
        """The parts of a sum that ends in an add; None if it is no weight-decomposed adapter."""
        total = _Sum(node)
        if not self.expand(node, ONE, total) or total.magnitude is None:
            return None
        met = [self.by_node[term] for term in total.terms if term in self.by_node]
        downs = {p: self.by_node.get(self.values.earliest_rows(p.operand)) for p in met}
        ups = [up for up, down in downs.items() if down is not None and is_low_rank(down, up) and up.held is None]
        if len(met) != 2 or len(ups) != 1:
            return None
        (up,) = ups
        base = next(p for p in met if p is not up)
        constant, scale = total.terms[up.node]
        biases = [term for term in total.terms if term not in self.by_node]
        weights = [self.program.weight(term) for term in biases]
        if total.terms[base.node] != MAGNITUDE or constant != 0 or up.bias is not None or len(biases) > 1:
            return None
        own = base.bias is not None and all(w is not None and w.tensor is base.bias.tensor for w in weights)
        if biases and not (own and total.terms[biases[0]] == (1.0, -1.0)):
            return None
        y, delta = total.entries[base.node], total.entries[up.node]
        parts = _Parts(node, base, y, delta, scale, total.magnitude, base.bias if biases else None)
        return parts if self.may_rewrite(parts, total) else None

    def expand(self, node: Node, factor: Factor, total: _Sum) -> bool:
        """Add a value, times a factor, to the terms; False where it is no sum of few terms."""
        entry = node
        while node not in self.by_node and (operand := self.values.inner(node)) is not None:
            total.inner.add(node)
            node = operand
        if len(total.inner) > FARTHEST:
            return False
        if node in self.by_node or self.program.weight(node) is not None:
            first, second = total.terms.get(node, (0.0, 0.0))
            total.terms[node] = (first + factor[0], second + factor[1])
            total.entries[node] = entry
            return True
        total.inner.add(node)
        total.steps.add(node)
        kind, args = operation(node), node.args
        if kind in ADDS | SUBTRACTS:
            onto, added, sign = next(operands(node), (None, None, 1.0))
            if onto is None or added is None:
                return False
            scaled = (factor[0] * sign, factor[1] * sign)
            return self.expand(onto, factor, total) and self.expand(added, scaled, total)
        if kind in NEGATES:
            return self.expand(node.all_input_nodes[0], (-factor[0], -factor[1]), total)
        if kind in MULTIPLIES | DIVIDES and len(args) == 2 and not node.kwargs:
            for value, other in ((args[0], args[1]), (args[1], args[0])):
                by = self.factor(other, total)
                product = by and _product(factor, by, divided=kind in DIVIDES)
                if isinstance(value, Node) and value not in self.constant and product:
                    return self.expand(value, product, total)
        return False

    def factor(self, value: object, total: _Sum) -> Factor | None:
        """A number, or an expression ``a + b·m``."""
        if is_number(value):
            return float(value), 0.0  # type: ignore[arg-type]
        if not isinstance(value, Node) or value not in self.constant:
            return None
        kind, args = operation(value), value.args
        if kind in ADDS | SUBTRACTS and len(args) == 2 and isinstance(args[0], Node) and is_number(args[1]):
            inner = None if value.kwargs else self.factor(args[0], total)
            sign = 1.0 if kind in ADDS else -1.0
            return inner and (inner[0] + sign * float(args[1]), inner[1])  # type: ignore[arg-type]
        value = self.values.earliest(value)
        if total.magnitude not in (None, value):
            return None
        total.magnitude = value
        return MAGNITUDE

    def may_rewrite(self, parts: _Parts, total: _Sum) -> bool:
        """Whether nothing else reads what is rewritten, and shapes, dtypes and modes agree."""
        base, nodes = parts.base.node, {parts.y, parts.delta, *total.inner}
        reading = {user for node in (base, *total.inner - {parts.top}) for user in readers(node)}
        same = {self.program.dtype(node) for node in (*nodes, parts.magnitude)}
        return (
            reading <= total.inner
            and (parts.bias is None or (operation(base) in LINEARS | ADDMMS and not base.kwargs))
            and self.effects.touched.isdisjoint({*nodes, parts.magnitude})
            and len(same) == 1
            and None not in same
            and len({self.regions[node] for node in nodes}) == 1
            and all(self.program.same_shape(node, parts.top) for node in (parts.y, parts.delta, *total.steps))
            and math.prod(self.program.shape(parts.magnitude) or ()) == parts.base.out_features
        )

    def derived(self, parts: _Parts, names: Names) -> Derived | None:
        """The magnitudes as a stored value; None where a parameter that they depend on trains."""
        nodes, weights = self.recipe(parts.magnitude)
        if self.program.trains(weights.values()) or not all(isinstance(w.source, str) for w in weights.values()):
            return None
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"weight_{index}") for index, node in enumerate(weights)}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[parts.magnitude])
        value = self.program.value(parts.magnitude)
        return Derived(
            names.of([parts.base], "_features"),
            tuple(value.shape),
            tuple(str(weight.source) for weight in weights.values()),
            tuple((weight.tensor.dtype, weight.tensor.device) for weight in weights.values()),
            fx.GraphModule(nn.Module(), graph),
            str(parts.base.weight.source),
        )

    def recipe(self, magnitude: Node) -> tuple[list[Node], dict[Node, Weight]]:
        """The operations that compute a value, in order, and the weights that they read."""
        needed = dependencies(magnitude)
        ordered = [node for node in self.program.graph.nodes if node in needed]
        weights = {node: weight for node in ordered if (weight := self.program.weight(node)) is not None}
        return [node for node in ordered if node not in weights], weights


def _product(one: Factor, other: Factor, *, divided: bool) -> Factor | None:
    if divided:
        return None if other[1] or not other[0] else (one[0] / other[0], one[1] / other[0])
    if one[1] and other[1]:
        return None  # a square
    return one[0] * other[0], one[0] * other[1] + one[1] * other[0]


def _constants(program: Program, regions: dict[Node, int]) -> set[Node]:
    """The values that torch's own operators compute from weights alone, alike at each call."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        kind = node.target
        pure = (
            isinstance(kind, OpOverload)
            and kind.namespace in TORCHS_OWN
            and not kind._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in kind.tags
            and regions[node] == 0
            and found.issuperset(node.all_input_nodes)
        )
        if pure or program.weight(node) is not None:
            found.add(node)
    return found


def _write(program: Program, parts: _Parts, derived: Derived, effects: Effects) -> None:
    build, top, base = program.build, parts.top, parts.base
    build.origin = top
    with program.graph.inserting_before(top):
        magnitude = program.read_derived(derived, base.weight.tensor)
        y, delta = parts.y, parts.delta
        if parts.bias is not None:
            y = build.reshape_to(_without_bias(program, base), delta)
        if parts.scale != 1.0:
            delta = build.call(aten.mul.Tensor, delta, parts.scale)
        y = build.call(aten.add.Tensor, y, delta)
        result = build.call(aten.mul.Tensor, y, magnitude)
        if parts.bias is not None:
            result = build.call(aten.add.Tensor, result, program.read_weight(parts.bias))
    top.replace_all_uses_with(result)
    erase_unread(program.graph, [top], effects.alone)


def _without_bias(program: Program, base: Projection) -> Node:
    if operation(base.node) in LINEARS:
        return program.build.call(base.node.target, *base.node.args[:2])
    return program.build.call(aten.mm.default, *base.node.args[1:3])
