"""Name the adapters that are no low-rank path, so that readers of the report know why they stay.

    y = conv(x, W) + s·conv(conv(x, A), B)          y = linear(x, W) + s·linear(x, (A * E) @ B)
    y = linear(x, baddbmm(W, B, A))                 this one is added to the weight, at each call

What is added to the output of a layer, and depends on nothing but what that layer reads and on weights, may be an
adapter, or a branch of the network. PEFT's names tell: it keeps the layer as ``q_proj.base_layer`` and what is its own
beside that, in ``q_proj``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.internals import OpOverload
from flora_fx.ir import Decline, Reason
from flora_fx.passes.context import Context

from .operations import ADDS, MULTIPLIES, SUBTRACTS, WEIGHT_VIEWS, dependencies, operation
from .paths import Paths
from .projections import LINEARS, MATMULS, Projections
from .values import Values

__all__ = ["decline_unlike"]

aten = torch.ops.aten

LAYERS = {
    *(torch.conv1d, aten.conv1d.default, torch.conv2d, aten.conv2d.default, torch.conv3d, aten.conv3d.default),
    *(F.embedding, torch.embedding, aten.embedding.default),
    aten.convolution.default,
}
LAYER_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
BASE = "base_layer"
FARTHEST = 48
"""Operations; what is longer is not walked."""
SHOWN = 4
"""Operations that a decline names."""


def decline_unlike(context: Context) -> None:
    """Decline each adapter that is neither among the paths nor refused as one."""
    program = context.program
    known = {path.add.name for path in context[Paths]} | {decline.node for decline in context.declines}
    operands = {projection.node: projection.operand for projection in context[Projections]}
    finder = _Finder(program, context[Values], operands, known)
    added = [decline for node in program.graph.nodes if (decline := finder.at_add(node))]
    inside = [decline for node in program.graph.nodes if (decline := finder.at_layer(node))]
    context.declines.extend((*added, *dict.fromkeys(inside)))


class _Finder:
    def __init__(self, program: Program, values: Values, operands: dict[Node, Node], known: set[str]) -> None:
        self.program = program
        self.values = values
        self.operands = operands
        self.known = known
        self.told: set[Node] = set()
        self.of_weights = _of_weights(program)

    def at_add(self, node: Node) -> Decline | None:
        """A decline where one operand of an add is an adapter."""
        operands = [operand for operand in node.args[:2] if isinstance(operand, Node)]
        if operation(node) not in ADDS | SUBTRACTS or len(operands) != 2 or node.name in self.known:
            return None
        for onto, added in (operands, operands[::-1]):
            layer = self.layer(onto)
            steps = layer and self.between(added, self.values.earliest_rows(self.reads(layer)))
            if layer is None or not steps or not _is_adapter([layer, *steps], self.names):
                continue
            self.told.update(steps)
            if self.known.isdisjoint(step.name for step in steps):
                self.known.add(node.name)
                shown = [step for step in reversed(steps) if operation(step) not in WEIGHT_VIEWS]
                names = list(dict.fromkeys(map(_name, shown)))
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                detail = f"added to {layer.name}, it is made of {', '.join(names[:SHOWN])}{more}; it stays as it is"
                return Decline(Reason.NOT_LOW_RANK, node.name, detail)
        return None

    def at_layer(self, node: Node) -> Decline | None:
        """A decline where an adapter makes a layer's weight anew at each call, unless the layer is part of one told."""
        if operation(node) not in LINEARS | MATMULS or node in self.operands or node in self.told:
            return None
        read, matrix = (*node.args, None, None)[:2]
        if not isinstance(matrix, Node) or matrix not in self.of_weights or read in self.of_weights:
            return None
        while len(matrix.all_input_nodes) == 1:
            matrix = matrix.all_input_nodes[0]
        above = dependencies(matrix)
        if not _is_adapter(above, self.names) or not self.known.isdisjoint(step.name for step in above):
            return None
        detail = f"{matrix.name} makes a weight from several at each call; merge the adapter"
        return Decline(Reason.WEIGHT_COMPUTED, matrix.name, detail)

    def layer(self, node: Node) -> Node | None:
        """The layer that a value is the output of, through no-ops, weights that scale it and earlier adapters."""
        for _ in range(FARTHEST):
            node = self.values.earliest_rows(node)
            if node in self.operands or self.is_layer(node):
                return node
            if operation(node) in MULTIPLIES:
                scales = [n for n in node.all_input_nodes if n in self.of_weights or self.program.is_number(n)]
                computed = [operand for operand in node.all_input_nodes if operand not in scales]
            else:
                computed = node.all_input_nodes[:1] if operation(node) in ADDS else []
            if len(computed) != 1:
                return None
            node = computed[0]
        return None

    def is_layer(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.program.attribute(str(node.target)), LAYER_MODULES)
        return operation(node) in LAYERS

    def reads(self, layer: Node) -> Node:
        if layer in self.operands:
            return self.operands[layer]
        computed = [operand for operand in layer.all_input_nodes if operand not in self.of_weights]
        return computed[0] if computed else layer

    def between(self, node: Node, reads: Node) -> list[Node] | None:
        """The operations from a layer's read to a value, last first; None where it depends on more than that."""
        steps: list[Node] = []
        pending, seen = [node], {node}
        from_read = False
        while pending:
            current = pending.pop(0)
            if self.values.earliest_rows(current) is reads:
                from_read = True
            elif self.program.weight(current) is None and not self.program.is_number(current):
                if current.op in ("placeholder", "get_attr") or len(steps) == FARTHEST:
                    return None
                steps.append(current)
                new = [operand for operand in current.all_input_nodes if operand not in seen]
                seen.update(new)
                pending.extend(new)
        return steps if from_read else None

    def names(self, node: Node) -> list[str]:
        """The names of the weights that a node is, or reads."""
        if node.op == "call_module":
            module = self.program.attribute(str(node.target))
            return [f"{node.target}.{name}" for name, _ in module.named_parameters()]
        weights = [self.program.weight(found) for found in (node, *node.all_input_nodes)]
        return [weight.name for weight in weights if weight is not None]


def _is_adapter(nodes: Iterable[Node], names: Callable[[Node], list[str]]) -> bool:
    """Whether what the nodes read is a base layer's and what PEFT put beside it."""
    read = {tuple(name.split(".")) for node in nodes for name in names(node)}
    owners = {name[:index] for name in read for index, part in enumerate(name) if part == BASE}
    return any(name[: len(owner)] == owner and name[len(owner)] != BASE for name in read for owner in owners)


def _of_weights(program: Program) -> set[Node]:
    """The values that depend on nothing but weights, and the graphs that compute some of them."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        computed = node.op in ("call_function", "call_method") and found.issuperset(node.all_input_nodes)
        if computed or node.op == "get_attr" or program.weight(node) is not None:
            found.add(node)
    return found


def _name(node: Node) -> str:
    kind = operation(node)
    if isinstance(kind, OpOverload):
        return kind._schema.name.split("::")[-1]
    return kind if isinstance(kind, str) else str(getattr(kind, "__name__", node.target))
