"""Call torch's own functions instead of overloads, where a graph runs op by op: the same kernel, a microsecond sooner.

torch.ops.aten.mul.Tensor(x, y)       ->    torch.mul(x, y)
torch.ops.aten.expand.default(x, s)   ->    x.expand(s)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.passes.context import Context

__all__ = ["call_directly", "directly"]

aten = torch.ops.aten

FUNCTIONS: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.div,
    aten.embedding.default: torch.embedding,
    aten.linear.default: F.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.sin.default: torch.sin,
    aten.softmax.int: torch.softmax,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.sub.Tensor: torch.sub,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
}
"""Functions whose arguments are the overload's, in its order, and which are bound to C++ without a line of Python."""

METHODS: dict[Any, str] = {
    aten.add_.Tensor: "add_",
    aten.clone.default: "clone",
    aten.copy_.default: "copy_",
    aten.expand.default: "expand",
    aten.index_copy_.default: "index_copy_",
    aten.mul_.Tensor: "mul_",
    aten.to.dtype: "to",
    aten.view.default: "view",
}
"""The same, of tensors."""

BY_PLACE: dict[Any, int] = {aten.to.dtype: 4}
"""How many arguments are given by place, where that is not all of them: the method takes the others by name."""


def call_directly(context: Context) -> None:
    """Rewrite what there is a function or a method for."""
    program = context.program
    for node in program.graph.nodes if program.settles else ():
        if node.op != "call_function":
            continue
        if node.target is aten.slice.Tensor:
            _narrow(program, node)
        else:
            directly(node)


def directly(node: Node) -> None:
    """Rewrite one call of an overload, if there is a function or a method for it."""
    if node.target in BY_PLACE:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        count = BY_PLACE[node.target]
        node.kwargs = {**node.kwargs, **dict(zip(names[count:], node.args[count:], strict=False))}
        node.args = node.args[:count]
    if node.target in METHODS:
        node.op, node.target = "call_method", METHODS[node.target]
    else:
        node.target = FUNCTIONS.get(node.target, node.target)


def _narrow(program: Program, node: Node) -> None:
    """A slice of neighbours, where it is known how many."""
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    operand, dim, start, stop, step = given
    whole = program.value(operand)
    if node.kwargs or not isinstance(whole, Tensor) or not isinstance(whole.shape[dim], int):
        return
    if all(edge is None or isinstance(edge, int) for edge in (start, stop)) and step == 1:
        taken = range(*slice(start, stop).indices(whole.shape[dim]))
        node.target, node.args = torch.narrow, (operand, dim, taken.start, len(taken))
