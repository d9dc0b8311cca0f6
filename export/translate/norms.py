"""RMS norms in a program, as the one node that each of them is in ONNX Runtime.

w · (x · rsqrt(mean(x²) + ε))      ->      SimplifiedLayerNormalization(x, w)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph, Node

__all__ = ["Norm", "find_norms"]

aten = torch.ops.aten

_CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default}
_PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Norm:
    """An RMS norm over the last dimension.

    Attributes:
        end: the node whose value it is.
        x: what is normed, before it is cast.
        scale: what it is multiplied by, [dim].
        epsilon: added to the mean.
        precision: in which it is computed.
        inner: the nodes that nothing else reads, ``end`` among them.
    """

    end: Node
    x: Node
    scale: Node
    epsilon: float
    precision: torch.dtype
    inner: frozenset[Node]


def find_norms(graph: Graph) -> dict[Node, Norm]:
    """The RMS norms of a graph, by their last node."""
    found = (_norm_at(node) for node in graph.find_nodes(op="call_function", target=aten.rsqrt.default))
    return {norm.end: norm for norm in found if norm is not None}


def _norm_at(rsqrt: Node) -> Norm | None:
    added = rsqrt.args[0]
    if not _calls(added, aten.add.Tensor) or not isinstance(epsilon := added.args[1], float) or added.kwargs:
        return None
    mean = added.args[0]
    if not _calls(mean, aten.mean.dim) or [*mean.args[1:]] != [[-1], True] or mean.kwargs:
        return None
    square, normed = mean.args[0], _only_user(rsqrt)
    if not _calls(square, aten.pow.Tensor_Scalar) or square.args[1] != 2 or not _calls(normed, aten.mul.Tensor):
        return None
    if not all(_only_user(node) is not None for node in (square, mean, added)):
        return None
    wide: Any = square.args[0]
    also: Any = normed.args[1 if normed.args[0] is rsqrt else 0]
    if not _alike(wide, also) or rsqrt not in normed.args:
        return None
    inner: set[Any] = {square, mean, added, rsqrt, normed}
    inner |= {node for node in (wide, also) if {*node.users} <= inner}
    x = wide.all_input_nodes[0] if _casts(wide) else wide
    if x is wide:
        inner.discard(wide)
    last = normed
    user = _only_user(last)
    if _casts(user):
        inner.add(user)
        last, user = user, _only_user(user)
    if not _calls(user, aten.mul.Tensor) or len(user.all_input_nodes) != 2:
        return None
    (scale,) = (node for node in user.all_input_nodes if node is not last)
    inner.add(user)
    end = user
    narrow = scale.all_input_nodes[0] if _casts(scale) else scale
    if _value(narrow).dtype != _value(user).dtype:
        # Half a weight times float32 is float32: ONNX Runtime rounds at once to what it is cast to afterwards.
        cast = _only_user(user)
        if _casts(cast) and _value(cast).dtype == _value(narrow).dtype:
            scale, end = narrow, cast
            inner.add(cast)
    if _value(wide).dtype not in _PRECISE or _value(scale).dim() != 1 or _value(scale).dtype != _value(end).dtype:
        return None
    return Norm(end, x, scale, epsilon, _value(wide).dtype, frozenset(inner))


def _alike(one: Any, other: Any) -> TypeGuard[Node]:
    """Whether two nodes are one, or the same of the same."""
    if not isinstance(one, Node) or not isinstance(other, Node):
        return False
    same = one.op == "call_function" and (one.target, one.args, one.kwargs) == (other.target, other.args, other.kwargs)
    return one is other or same


def _calls(node: Any, target: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _casts(node: Any) -> TypeGuard[Node]:
    """Whether a node changes the dtype of a value, and nothing else."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and node.target in _CASTS
        and _value(node).dtype != _value(node.args[0]).dtype
    )


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _value(node: object) -> Tensor:
    assert isinstance(node, Node)
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value
