"""See through what only moves a value: views, transpositions, copies."""

from __future__ import annotations

import torch
from torch.fx import Node

from .evaluating import evaluate, sizes

__all__ = ["VIEWS", "before_views"]

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.alias.default,
}
"""Operators that may show the same elements in another shape; whether they do is tried."""


def before_views(sink: Node) -> Node:
    """The earliest value that is ``sink``, element by element."""
    best = node = sink
    chain: list[Node] = []
    while node.op == "call_function" and node.target in VIEWS:
        chain.insert(0, node)
        node = node.all_input_nodes[0]
        given = sizes(node)
        if (
            given is not None
            and given == sizes(sink)
            and _dtype(node) == _dtype(sink)
            and _is_identity(chain, node, given)
        ):
            best = node
    return best


def _is_identity(chain: list[Node], node: Node, shape: tuple[int, ...]) -> bool:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return torch.equal(evaluate(chain, {node: x}).double(), x)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
