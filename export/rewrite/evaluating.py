"""Nodes of a captured program: what they compute, seen by running them, and new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

__all__ = ["between", "call", "evaluate", "sizes"]


def between(first: Node, last: Node) -> list[Node]:
    """The nodes that ``last`` needs and that need ``first``, in order, ``last`` last; empty if there are none."""
    needing = {first: None}  # in order
    for node in _from(first):
        if not needing.keys().isdisjoint(node.all_input_nodes):
            needing[node] = None
        if node is last:
            break
    if last not in needing:
        return []
    wanted = {last}
    for node in reversed(needing):
        if node in wanted:
            wanted.update(operand for operand in node.all_input_nodes if operand in needing)
    return [node for node in needing if node in wanted and node is not first]


def _from(node: Node) -> Iterable[Node]:
    while node.op != "root":
        yield node
        node = node.next


def sizes(node: Node) -> tuple[int, ...] | None:
    """The shape that a node's value had while it was captured; None for what is no tensor."""
    value = node.meta.get("val")
    return tuple(map(_number, value.shape)) if isinstance(value, Tensor) else None


def _number(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def evaluate(nodes: Iterable[Node], values: Mapping[Node, Any]) -> Any:
    """The value of the last of some nodes.

    Args:
        nodes: in order.
        values: of what they need; sizes are taken from the capture.

    Raises:
        Exception: whatever the nodes raise, and `KeyError` for a value that is not given.
    """
    known = dict(values)
    result: Any = None

    def value(node: Node) -> Any:
        size = node.meta.get("val")
        return _number(size) if node not in known and isinstance(size, int | torch.SymInt) else known[node]

    for node in nodes:
        target: Any = node.target
        result = known[node] = target(*map_arg(node.args, value), **map_arg(node.kwargs, value))
    return result


def call(graph: Graph, target: object, *args: object) -> Node:
    """A new node, with the value that it had while the program was captured."""
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    node.meta["val"] = target(*values)  # type: ignore[operator]
    return node
