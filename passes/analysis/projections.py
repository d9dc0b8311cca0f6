"""Find the linear nodes.

    nn.Linear called as a module     linear(x, W, b)     addmm(b, x, Wᵀ)     x @ Wᵀ     mm(x, Wᵀ)     bmm(x, expand(Wᵀ))
    quantized_linear(x, codes, scales, …)

become one thing: ``Projection(reads=x, weight=W [out, in] or its transpose, bias=b)``. What is linear but may not be
rewritten (a tensor subclass, changed in place) carries the obstacle.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.internals import FakeTensor
from flora_fx.ir import Decline, Held, Projection, Reason, Weight
from flora_fx.passes.context import Context
from flora_fx.quantized.ops import OPERATOR
from flora_fx.storage.casting import is_cast_later

from .mutation import Effects
from .operations import CASTS, operation
from .values import Values

__all__ = ["ADDMMS", "LINEARS", "MATMULS", "Projections", "find_projections"]

aten = torch.ops.aten

LINEARS = {F.linear, aten.linear.default}
ADDMMS = {torch.addmm, aten.addmm.default}
MATMULS = {
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    torch.mm,
    torch.bmm,
    torch.matmul,
    operator.matmul,
    "mm",
    "matmul",
    "__matmul__",
}


class Projections(tuple[Projection, ...]):
    """All linear nodes whose weights are parameters, in graph order."""

    def by_node(self) -> dict[Node, Projection]:
        """The projections, each under its node."""
        return {projection.node: projection for projection in self}

    def dense(self) -> dict[Node, Projection]:
        """Those whose weights are numbers, each under its node: what an adapter may be made of."""
        return {projection.node: projection for projection in self if projection.held is None}


def find_projections(context: Context) -> Projections:
    """Look at every node of the graph."""
    program, values, effects = context.program, context[Values], context[Effects]
    found = []
    for node in program.graph.nodes:
        if (held := _quantized(program, values, effects, node)) is not None:
            found.append(held)
            continue
        parts = _parts(program, values, node)
        if parts is not None:
            operand, weight, bias = parts
            operand = _before_autocast(program, values, node, operand)
            obstacle = _obstacle(node, operand, weight, bias, effects)
            reads = values.earliest_rows(operand)
            found.append(Projection(node, reads, operand, weight, bias, obstacle=obstacle))
    return Projections(found)


def _before_autocast(program: Program, values: Values, node: Node, operand: Node) -> Node:
    """Autocast undoes a widening: ``linear(to(x, float32), W)`` in bfloat16 reads x, if that is bfloat16."""
    source = values.earliest(operand)
    if operation(source) in CASTS and program.dtype(source) != program.dtype(node):
        narrow = source.all_input_nodes[0]
        dtypes = [program.dtype(found) for found in (narrow, node, source)]
        if None not in dtypes and dtypes[0] == dtypes[1] and torch.promote_types(dtypes[0], dtypes[2]) == dtypes[2]:  # type: ignore[arg-type]
            return narrow
    return operand


def _obstacle(node: Node, operand: Node, weight: Weight, bias: Weight | None, effects: Effects) -> Decline | None:
    dense = [weight.tensor] if bias is None else [weight.tensor, bias.tensor]
    if not all(_is_dense(tensor) for tensor in dense):
        detail = f"{weight.name} is a {type(weight.tensor).__name__} of {weight.tensor.dtype}; it stays where it is"
        return Decline(Reason.WEIGHT_NOT_DENSE, node.name, detail)
    return _touched(node, operand, [weight, *([] if bias is None else [bias])], effects)


def _touched(node: Node, operand: Node, weights: Sequence[Weight], effects: Effects) -> Decline | None:
    for managed in (found for found in weights if found.manager):
        detail = f"{managed.name} is {managed.manager}'s, which fills it anew for each forward; it stays where it is"
        return Decline(Reason.MEMORY_MANAGED, node.name, detail)
    if {node, operand, *(weight.node for weight in weights)} & effects.touched:
        detail = f"what {node.name} reads or computes is changed in place, or its memory layout is read"
        return Decline(Reason.MUTATED, node.name, detail)
    return None


_OPERANDS = ("x", "codes", "scales", "zeros", "order", "bias", "kind", "bits", "block", "out_features")


def _quantized(program: Program, values: Values, effects: Effects, node: Node) -> Projection | None:
    """A projection over a quantized weight; None for any other node, and where a part of it is no weight."""
    if node.op != "call_function" or node.target is not OPERATOR:
        return None
    arguments: dict[str, Any] = {**dict(zip(_OPERANDS, node.args, strict=False)), **node.kwargs}
    x, *given, kind, bits, block, out_features = (arguments[name] for name in _OPERANDS)
    parts = [program.weight(values.earliest(part)) if isinstance(part, Node) else None for part in given]
    codes, scales, zeros, order, bias = parts
    shape, dtype = program.shape(x), program.dtype(node)
    lost = any(isinstance(part, Node) and found is None for part, found in zip(given, parts, strict=True))
    if lost or codes is None or scales is None or shape is None or dtype is None:
        return None
    held = Held(scales, zeros, order, kind, bits, block, (out_features, int(shape[-1])), dtype)
    obstacle = _touched(node, x, [found for found in parts if found is not None], effects)
    return Projection(node, values.earliest_rows(x), x, codes, bias, obstacle=obstacle, held=held)


def _parts(program: Program, values: Values, node: Node) -> tuple[Node, Weight, Weight | None] | None:
    """(operand, weight, bias) of a linear node; None for any other."""
    if node.op == "call_module":
        return _module_parts(program, node)
    kind = operation(node)
    if kind in LINEARS:
        x, w, b = _arguments(node, ("input", "weight", "bias"))
        weight = values.weight(w) if isinstance(w, Node) else None
        return _with_bias(program, values, x, weight, b)
    if kind in ADDMMS:
        b, x, w = _arguments(node, ("input", "mat1", "mat2"))
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1 or len(node.args) > 3:
            return None
        weight = _flip(values.weight(w)) if isinstance(w, Node) else None
        return _with_bias(program, values, x, weight, b)
    if kind in MATMULS and len(node.args) == 2:
        x, w = node.args
        if isinstance(x, Node) and isinstance(w, Node) and values.weight(x) is None:
            weight = _flip(values.weight(w))
            return None if weight is None else (x, weight, None)
    return None


def _module_parts(program: Program, node: Node) -> tuple[Node, Weight, Weight | None] | None:
    module = program.attribute(str(node.target))
    hooked = isinstance(module, nn.Module) and (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or hooked:
        return None
    if "forward" in module.__dict__ or len(node.args) != 1 or not isinstance(node.args[0], Node):
        return None
    weight = Weight(f"{node.target}.weight", module.weight, None)
    bias = None if module.bias is None else Weight(f"{node.target}.bias", module.bias, None)
    return node.args[0], weight, bias


def _with_bias(
    program: Program, values: Values, x: Any, weight: Weight | None, b: Any
) -> tuple[Node, Weight, Weight | None] | None:
    if weight is None or not isinstance(x, Node):
        return None
    if b is None:
        return x, weight, None
    bias = program.weight(values.earliest(b)) if isinstance(b, Node) else None
    if bias is None or tuple(bias.tensor.shape) != (weight.matrix.shape[0],):
        return None
    return x, weight, bias


def _flip(weight: Weight | None) -> Weight | None:
    """From the operand of ``x @ w`` ([in, out]) to the weight of a projection ([out, in])."""
    return weight and replace(weight, transposed=not weight.transposed)


def _arguments(node: Node, names: tuple[str, str, str]) -> tuple[Any, Any, Any]:
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get(names[0]), given.get(names[1]), given.get(names[2])


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) or _is_fake(tensor) or is_cast_later(tensor)
    return plain and tensor.layout is torch.strided and tensor.is_floating_point()


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)
