"""Which reshapes only regroup rows: those that keep the last dimension, with and without known shapes.

x.view(-1, x.size(-1))                  as transformers' Conv1D begins
y.view(x.size()[:-1] + (features,))     as it ends
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from flora_fx.graph.examples import same_sizes

from .operations import RESHAPES, SIZES, operation

if TYPE_CHECKING:
    from .values import Values

__all__ = ["keeps_last_dimension", "leading_dimensions_given_by"]


def keeps_last_dimension(values: Values, node: Node) -> bool:
    """Whether a reshape is known to leave the last dimension as it is."""
    program, operand = values.program, node.all_input_nodes[0]
    before, after = program.shape(operand), program.shape(node)
    if before is not None and after is not None:
        return bool(before) and bool(after) and same_sizes(before[-1:], after[-1:])
    if leading_dimensions_given_by(values, node) is not None:
        (features,) = node.args[1].args[1]  # type: ignore[union-attr,misc]
        return _out_features(values, operand) == features
    sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    if len(sizes) != 2 or not isinstance(last := sizes[-1], Node):
        return False
    kind, operand = operation(last), values.earliest(operand)
    if kind == "size" and last.args[1:] == (-1,):
        return values.earliest(last.all_input_nodes[0]) is operand
    if kind is operator.getitem and last.args[1] == -1:
        whole = last.all_input_nodes[0]
        return operation(whole) in SIZES and values.earliest(whole.all_input_nodes[0]) is operand
    return False


def leading_dimensions_given_by(values: Values, node: Node) -> Node | None:
    """x, for ``view(…, x.size()[:-1] + (features,))``; None for anything else."""
    sizes = node.args[1] if operation(node) in RESHAPES and len(node.args) == 2 else None
    if not isinstance(sizes, Node) or operation(sizes) is not operator.add:
        return None
    leading, features = sizes.args
    if not isinstance(leading, Node) or not isinstance(features, tuple) or len(features) != 1:
        return None
    if operation(leading) is not operator.getitem or leading.args[1] != slice(None, -1, None):
        return None
    whole = leading.all_input_nodes[0]
    return values.earliest(whole.all_input_nodes[0]) if operation(whole) in SIZES and len(whole.args) == 1 else None


def _out_features(values: Values, node: Node) -> int | None:
    weight = values.weight(node.args[2]) if operation(node) is torch.addmm else None  # type: ignore[arg-type]
    return int(weight.matrix.shape[1]) if weight else None
