"""What nodes do: the function or method that each calls, and those that are alike."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from flora_fx.internals import GELU, OpOverloadPacket

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_MODULES",
    "ADDS",
    "ASSERTS",
    "CASTS",
    "COPIES",
    "DIVIDES",
    "DROPOUTS",
    "EQUALS",
    "EXPANDS",
    "FILLS",
    "IN_PLACE",
    "IN_PLACE_ADDS",
    "MERGEABLE",
    "MULTIPLIES",
    "NEGATES",
    "RESHAPES",
    "SIZES",
    "SUBTRACTS",
    "TORCHS_OWN",
    "TRANSPOSES",
    "UNSQUEEZES",
    "WEIGHT_VIEWS",
    "WHERES",
    "dependencies",
    "is_number",
    "operation",
    "readers",
    "swaps_last_two",
]

aten = torch.ops.aten

IN_PLACE_ADDS = {operator.iadd, aten.add_.Tensor, "add_"}
IN_PLACE_SUBTRACTS = {operator.isub, aten.sub_.Tensor, "sub_"}
IN_PLACE_MULTIPLIES = {operator.imul, aten.mul_.Tensor, "mul_"}
IN_PLACE_DIVIDES = {operator.itruediv, aten.div_.Tensor, "div_"}
IN_PLACE = IN_PLACE_ADDS | IN_PLACE_SUBTRACTS | IN_PLACE_MULTIPLIES | IN_PLACE_DIVIDES
ADDS = {operator.add, torch.add, aten.add.Tensor, "add", "__add__"} | IN_PLACE_ADDS
SUBTRACTS = {operator.sub, torch.sub, aten.sub.Tensor, "sub", "__sub__"} | IN_PLACE_SUBTRACTS
MULTIPLIES = {operator.mul, torch.mul, aten.mul.Tensor, aten.mul.Scalar, "mul", "__mul__"} | IN_PLACE_MULTIPLIES
DIVIDES = {operator.truediv, torch.div, aten.div.Tensor, aten.div.Scalar, "div", "__truediv__"} | IN_PLACE_DIVIDES
NEGATES = {operator.neg, torch.neg, aten.neg.default, "neg", "__neg__"}
ACTIVATIONS = {
    *(torch.relu, F.relu, aten.relu.default, "relu"),
    *(F.silu, aten.silu.default),
    *(F.gelu, GELU, aten.gelu.default),
    *(torch.tanh, F.tanh, aten.tanh.default, "tanh"),
    *(torch.sigmoid, F.sigmoid, aten.sigmoid.default, "sigmoid"),
}
ACTIVATION_MODULES = {nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    torch.reshape,
    "view",
    "reshape",
}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "type",
    "type_as",
}
COPIES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    torch.clone,
    "clone",
    "contiguous",
}
EXPANDS = {aten.expand.default, "expand"}
TRANSPOSES = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
    torch.t,
    torch.transpose,
    torch.permute,
    "t",
    "transpose",
    "permute",
    "T",
    "mT",
}
WHERES = {torch.where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, "where"}
FILLS = {torch.masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor, "masked_fill"}
EQUALS = {operator.eq, torch.eq, aten.eq.Scalar, "eq", "__eq__"}
UNSQUEEZES = {torch.unsqueeze, aten.unsqueeze.default, "unsqueeze"}
SIZES = {"size", "shape"}
DROPOUTS = {aten.dropout.default, F.dropout, torch.dropout}
WEIGHT_VIEWS = TRANSPOSES | EXPANDS | RESHAPES | CASTS | COPIES
"""What only shows a weight in another shape, order or dtype."""
MERGEABLE = RESHAPES | CASTS | TRANSPOSES | EXPANDS | SIZES | EQUALS | UNSQUEEZES
"""Torch functions and methods that give equal values when they are called twice with equal ones."""
TORCHS_OWN = ("aten", "prims")
"""The namespaces of torch's own operators, whose schemas can be believed."""
ASSERTS = {aten._assert_tensor_metadata.default}
"""What asks for a value's metadata alone: it counts as no reader."""


def operation(node: Node) -> Any:
    """What a node does: the function, or the name of the method or tensor attribute."""
    if node.op == "call_function":
        if node.target is getattr and isinstance(node.args[1], str):
            return node.args[1]
        if isinstance(node.target, OpOverloadPacket) and "default" in node.target.overloads():
            # A tensor's attribute in Dynamo's graphs (torch 2.14): x.T is aten.numpy_T(x), its overload unnamed.
            return node.target.default if len(node.args) == 1 and not node.kwargs else node.target
        return node.target
    return node.target if node.op == "call_method" else None


def dependencies(node: Node) -> set[Node]:
    """A node and all that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = [operand for operand in pending.pop().all_input_nodes if operand not in found]
        found.update(new)
        pending.extend(new)
    return found


def swaps_last_two(node: Node) -> bool:
    """Whether a node among `TRANSPOSES` swaps the last two dimensions of a matrix."""
    kind, dims = operation(node), node.args[1:]
    if kind in ("T", "mT", "t", aten.t.default, aten.numpy_T.default, aten.mT.default, torch.t):
        return True
    if kind in (aten.permute.default, torch.permute, "permute"):
        order = dims[0] if dims and isinstance(dims[0], tuple | list) else dims
        return tuple(order) in ((1, 0), (-1, -2))
    return tuple(dims) in ((0, 1), (1, 0), (-1, -2), (-2, -1))


def readers(node: Node) -> list[Node]:
    """The users that read a value."""
    return [user for user in node.users if operation(user) not in ASSERTS]


def is_number(value: Any) -> bool:
    """Whether an argument is a number, not a node."""
    return isinstance(value, Real) and not isinstance(value, bool)
