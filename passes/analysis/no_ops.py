"""Which nodes return an operand unchanged.

dropout(x, 0.1, False)   to(x, x.dtype)   clone(x)   expand(x, x.shape)   nn.Identity   nn.Dropout in eval mode
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from flora_fx.graph.program import Program

from .operations import CASTS, COPIES, DROPOUTS, EXPANDS, operation

__all__ = ["is_eval_dropout", "no_op_operand"]


def no_op_operand(program: Program, node: Node, earliest: Callable[[Node], Node]) -> Node | None:
    """The operand that a node returns unchanged, whatever happens to either afterwards; None for any other node.

    Args:
        program: the node's.
        node: what may be a no-op.
        earliest: gives the earliest node that equals one.
    """
    if node.op == "call_module":
        module = program.attribute(str(node.target))
        if type(module) is nn.Dropout and (not module.training or module.p == 0):
            return node.all_input_nodes[0]
        return node.all_input_nodes[0] if type(module) is nn.Identity else None
    if not node.all_input_nodes:
        return None
    kind, operand = operation(node), node.all_input_nodes[0]
    if kind in COPIES:
        return operand
    if kind in DROPOUTS:
        probability, training = _dropout_arguments(node)
        return operand if training is False or probability == 0 else None
    if kind in CASTS:
        before, after = program.value(operand), program.value(node)
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            same = before.dtype == after.dtype and before.device == after.device
            return operand if same else None
        return operand if _restates_dtype(program, node, operand, earliest) else None
    if kind in EXPANDS and program.same_shape(node, operand):
        return operand
    return None


def is_eval_dropout(program: Program, node: Node) -> bool:
    """Whether a node calls a dropout module that does nothing only because it is in eval mode."""
    if node.op != "call_module":
        return False
    module = program.attribute(str(node.target))
    return type(module) is nn.Dropout and module.p > 0 and not module.training


def _dropout_arguments(node: Node) -> tuple[Any, Any]:
    names = ("input", "p", "train" if node.target is not F.dropout else "training")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("p", 0.5), given.get(names[2], True)


def _restates_dtype(program: Program, node: Node, operand: Node, earliest: Callable[[Node], Node]) -> bool:
    """A graph without metadata: ``linear(…).to(torch.float32)`` where the linear's weight is float32."""
    wanted = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    return isinstance(wanted, torch.dtype) and _computed_dtype(program, operand, earliest) == wanted


def _computed_dtype(program: Program, node: Node, earliest: Callable[[Node], Node]) -> torch.dtype | None:
    node = earliest(node)
    if node.op == "call_module":
        module = program.attribute(str(node.target))
        return module.weight.dtype if type(module) is nn.Linear else None
    if operation(node) in (F.linear, torch.addmm) and isinstance(node.args[1], Node):
        weights = [program.weight(n) for n in node.all_input_nodes]
        known = {w.tensor.dtype for w in weights if w is not None}
        return known.pop() if len(known) == 1 else None
    if operation(node) in (operator.add, operator.mul, torch.add, torch.mul):
        found = {_computed_dtype(program, n, earliest) for n in node.all_input_nodes}
        return found.pop() if len(found) == 1 else None
    return None
