"""Which values are changed in place, or have their memory layout read: those are left as they are.

y = linear(x, W); y += z        harmless where y is fresh and read by nothing else: the same as y + z
v = x.view(…); v.add_(1)        touches x, v and every other view of x
as_strided(y, …)                reads y's layout, which a slice of a pack does not have
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from flora_fx.ops import accumulate, matrix_vector, packed_projection

__all__ = ["Effects", "find_effects", "is_in_place_add", "may_alias", "written"]

aten = torch.ops.aten

IN_PLACE_ADDS = {operator.iadd, aten.add_.Tensor, "add_"}
# Results that never share memory with an operand. Whatever is not known to be here is taken for a possible view.
FRESH = {
    accumulate,
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
    torch.matmul,
    torch.mm,
    torch.mul,
    torch.rsqrt,
    torch.sigmoid,
    torch.softmax,
    torch.tanh,
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
    "pow",
    "sin",
    aten.clone.default,
}
RESHAPES = {aten.view.default, aten.reshape.default, torch.reshape, "view", "reshape"}
LAYOUT_READERS = {
    aten.as_strided.default,
    torch.as_strided,
    "as_strided",
    "stride",
    "is_contiguous",
    "data_ptr",
}


class Effects:
    """The nodes that a rewrite must not touch."""

    def __init__(self, touched: frozenset[Node]) -> None:
        self.touched = touched


def find_effects(graph: Graph, root: nn.Module) -> Effects:
    """Walk the graph once for writes and layout readers, and from each to all that may share its memory."""
    seeds: set[Node] = set()
    for node in graph.nodes:
        if _kind(node) in LAYOUT_READERS:
            seeds.update(node.all_input_nodes[:1])
        elif not is_in_place_add(node, root):
            seeds.update(written(node, root))
    touched: set[Node] = set()
    pending = list(seeds)
    while pending:
        node = pending.pop()
        if node in touched:
            continue
        touched.add(node)
        pending.extend(_aliased(node, root))
        pending.extend(user for user in node.users if user.op != "output" and node in _aliased(user, root))
    return Effects(frozenset(touched))


def is_in_place_add(node: Node, root: nn.Module) -> bool:
    """An in-place add into a fresh value, or a reshape of one, that nothing else reads."""
    if _kind(node) not in IN_PLACE_ADDS or not isinstance(node.args[0], Node):
        return False
    into = node.args[0]
    while _kind(into) in RESHAPES and len(into.users) == 1:
        into = into.all_input_nodes[0]
    fresh = _kind(into) in FRESH or _is_fresh_operator(into) or is_in_place_add(into, root)
    if into.op == "call_module":
        fresh = isinstance(root.get_submodule(str(into.target)), nn.Linear)
    return fresh and len(into.users) == 1


def _kind(node: Node) -> Any:
    return node.target if node.op in ("call_function", "call_method") else None


def _is_fresh_operator(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    # Dropout returns its operand itself in eval mode, whatever its schema says.
    named = target.overloadpacket in (aten.dropout, aten.feature_dropout)
    return not named and all(result.alias_info is None for result in target._schema.returns)


def written(node: Node, root: nn.Module) -> list[Node]:
    """The nodes whose values a node changes."""
    out = node.kwargs.get("out")
    changed = [out] if isinstance(out, Node) else []
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return changed + (node.all_input_nodes if getattr(module, "inplace", False) else [])
    kind = _kind(node)
    if isinstance(kind, torch._ops.OpOverload):
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
    if node.op == "call_module":
        fresh = isinstance(root.get_submodule(str(node.target)), nn.Linear | nn.LayerNorm | nn.Conv1d | nn.Conv2d)
        return [] if fresh else node.all_input_nodes
    if _kind(node) in FRESH or _is_fresh_operator(node):
        return []
    return written(node, root) or node.all_input_nodes
