"""Which values are changed in place, or have their memory layout read: those are left as they are.

y = linear(x, W); y += z        the same as y + z where nothing else reads y and its memory is its own; but no node may
                                stand for y that equals it, since y changes
v = x.view(…); v.add_(1)        touches x, v and every other view of x
as_strided(y, …)                reads y's memory layout, which a slice of a pack does not have
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from flora_fx.internals import OpOverload
from flora_fx.ops import accumulate, accumulate_unrolled, matrix_vector, packed_projection
from flora_fx.passes.context import Context

from .operations import ASSERTS, IN_PLACE

__all__ = ["Effects", "changed_by", "find_effects", "may_alias"]

aten = torch.ops.aten

# Results that never share memory with an operand. Whatever is not known to be here is taken for a possible view.
FRESH = {
    accumulate,
    accumulate_unrolled,
    matrix_vector,
    packed_projection,
    F.cross_entropy,
    F.embedding,
    F.gelu,
    F.layer_norm,
    F.linear,
    F.relu,
    F.rms_norm,
    F.scaled_dot_product_attention,
    F.silu,
    F.softmax,
    torch.add,
    torch.addmm,
    torch.bmm,
    torch.cat,
    torch.empty_like,
    torch.full_like,
    torch.matmul,
    torch.mm,
    torch.mul,
    torch.ones_like,
    torch.rsqrt,
    torch.sigmoid,
    torch.softmax,
    torch.tanh,
    torch.zeros_like,
    operator.add,
    operator.matmul,
    operator.mul,
    operator.neg,
    operator.sub,
    operator.truediv,
    "add",
    "clone",
    "cos",
    "matmul",
    "mean",
    "mm",
    "mul",
    "new_empty",
    "new_full",
    "new_ones",
    "new_zeros",
    "pow",
    "sin",
    aten.clone.default,
}
SAME_VALUES = {
    *(aten.view.default, aten.reshape.default, torch.reshape, "view", "reshape"),
    *(aten.to.dtype, "to"),
}
"""What shows a value in another shape or dtype, be it a view of it or a copy."""
# What returns its operands or views of them, though its schema does not say so.
VIEWS_IN_SILENCE = {
    *(aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.feature_alpha_dropout),
    *(aten.atleast_1d, aten.atleast_2d, aten.atleast_3d, aten.broadcast_tensors, aten.cartesian_prod),
    *(aten.einsum, aten.meshgrid, aten.sum_to_size, aten.type_as),
}
# What gives its first operand the shape or dtype of another.
LIKE_ANOTHER = {
    *("expand_as", "reshape_as", "to", "type_as", "view_as"),
    *(aten.expand_as.default, aten.reshape_as.default, aten.to.other, aten.type_as.default, aten.view_as.default),
}
LAYOUT_READERS = {
    aten.as_strided.default,
    torch.as_strided,
    "as_strided",
    "stride",
    "is_contiguous",
    "data_ptr",
}


class Effects:
    """What has to be known of changes in place.

    Attributes:
        touched: nodes that a rewrite must not touch.
        alone: operations in place whose change nobody sees but through their result.
        changed: the values that these change: none of them may stand for an equal one.
    """

    def __init__(self, touched: set[Node], alone: dict[Node, list[Node]]) -> None:
        self.touched = frozenset(touched)
        self.alone = frozenset(alone)
        self.changed = frozenset(node for nodes in alone.values() for node in nodes)


def find_effects(context: Context) -> Effects:
    """Walk the graph once for changes and layout readers, and from each to all that may share its memory."""
    graph, root = context.program.graph, context.program.root
    seeds: set[Node] = set()
    alone: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if _kind(node) in LAYOUT_READERS:
            seeds.update(node.all_input_nodes[:1])
        elif changed := _changed_alone(node, root):
            alone[node] = changed
        else:
            seeds.update(changed_by(node, root))
    touched: set[Node] = set()
    pending = list(seeds)
    while pending:
        node = pending.pop()
        if node in touched:
            continue
        touched.add(node)
        pending.extend(_aliased(node, root))
        pending.extend(user for user in node.users if user.op != "output" and node in _aliased(user, root))
    return Effects(touched, alone)


def _changed_alone(node: Node, root: nn.Module) -> list[Node]:
    """What an in-place operation changes, where nobody else sees the change; nothing otherwise."""
    if _kind(node) not in IN_PLACE or not isinstance(node.args[0], Node):
        return []
    into, shown = node.args[0], []
    while _kind(into) in SAME_VALUES and len(_readers(into)) == 1:
        shown.append(into)
        into = into.all_input_nodes[0]
    computed = bool(into.all_input_nodes)  # what reads nothing may be a tensor that somebody keeps
    fresh = computed and (not _aliased(into, root) or bool(_changed_alone(into, root)))
    return [*shown, into] if fresh and len(_readers(into)) == 1 else []


def _readers(node: Node) -> list[Node]:
    return [user for user in node.users if _kind(user) not in ASSERTS]


def _kind(node: Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _is_fresh_operator(node: Node) -> bool:
    kind = node.target
    if not isinstance(kind, OpOverload) or kind._schema.is_mutable:
        return False
    silent = kind.overloadpacket in VIEWS_IN_SILENCE
    return not silent and all(result.alias_info is None for result in kind._schema.returns)


def changed_by(node: Node, root: nn.Module) -> list[Node]:
    """The nodes whose values a node changes."""
    out = node.kwargs.get("out")
    changed = [out] if isinstance(out, Node) else []
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return changed + (node.all_input_nodes if getattr(module, "inplace", False) else [])
    kind = _kind(node)
    if isinstance(kind, OpOverload):
        if kind._schema.is_mutable:
            for position, argument in enumerate(kind._schema.arguments):
                value = node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else None)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                    changed.append(value)
        return changed
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    of_operator = getattr(kind, "__module__", "") == "_operator"
    in_place_name = name.endswith("_") and not name.endswith("__") and not of_operator  # operator.and_ is none
    in_place_operator = of_operator and name.startswith("i") and name[1:] in _INPLACE
    in_place_flag = node.kwargs.get("inplace") is True or (kind is F.dropout and node.args[3:4] == (True,))
    if in_place_name or in_place_operator or in_place_flag or kind is operator.setitem:
        changed.extend(node.all_input_nodes[:1])
    return changed


_INPLACE = {
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
}


def may_alias(node: Node, root: nn.Module) -> bool:
    """Whether a node's result may share memory with an operand."""
    return bool(_aliased(node, root))


def _aliased(node: Node, root: nn.Module) -> list[Node]:
    """The operands that a node's result may share memory with."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if changed := changed_by(node, root):
        return changed  # it returns what it has changed, or nothing
    if node.op == "call_module":
        fresh = isinstance(root.get_submodule(str(node.target)), nn.Linear | nn.LayerNorm | nn.Conv1d | nn.Conv2d)
        return [] if fresh else node.all_input_nodes
    if _kind(node) in FRESH or _is_fresh_operator(node):
        return []
    return node.all_input_nodes[:1] if _kind(node) in LIKE_ANOTHER else node.all_input_nodes
