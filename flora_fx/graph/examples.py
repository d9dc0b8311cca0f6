"""The example (fake) values that a graph's nodes carry: shapes and dtypes, without numbers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from flora_fx.internals import FakeTensor, FakeTensorMode, statically_known_true

__all__ = ["Examples", "SharedExamples", "same_sizes"]


class Examples:
    """The example values of a graph.

    Args:
        graph: the graph.
        key: where new nodes carry theirs in ``meta``: ``"val"``, or ``"example_value"`` in Dynamo's graphs.
    """

    def __init__(self, graph: fx.Graph, key: str = "val") -> None:
        self.graph = graph
        self.key = key

    def value(self, node: Node) -> Any:
        """The example value of a node, or None."""
        return node.meta.get("val", node.meta.get("example_value"))

    def give(self, node: Node, value: Any) -> None:
        """Let a node carry an example value."""
        node.meta[self.key] = value

    @cached_property
    def mode(self) -> FakeTensorMode | None:
        """The mode that the graph's example values were made in; None for a graph without."""
        values = (self.value(node) for node in self.graph.nodes)
        return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)

    def like(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """An example value for a new weight, with the dtype and device of ``like``; None in a graph without."""
        if self.mode is None:
            return None
        with self.mode:
            return torch.empty(shape, dtype=like.dtype, device=like.device)


class SharedExamples(Examples):
    """Those of an exported program, whose new weights of one shape share one value: nobody changes it.

    In a graph of Dynamo they would be taken for one weight.
    """

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self._known: dict[Hashable, Tensor | None] = {}

    def like(self, shape: Sequence[int], like: Tensor) -> Tensor | None:
        """See `Examples.like`."""
        key = (tuple(shape), like.dtype, like.device)
        if key not in self._known:
            self._known[key] = super().like(shape, like)
        return self._known[key]


def same_sizes(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether sizes are known to be equal, without a guard on those that are dynamic."""
    return len(first) == len(second) and all(
        a is b or bool(statically_known_true(a == b)) for a, b in zip(first, second, strict=True)
    )
