"""The bodies of checkpointed regions, which Dynamo writes as graphs of their own.

    before   y = tag_activation_checkpoint(body, x, W, A, B)          body(x, W, A, B) = linear(x, W) + s·…
    after    y = tag_activation_checkpoint(body, x, W, A, B, pack)    body(…, pack)    = packed_projection(x, pack, …)

A body's weights are inputs of the graph around it, and so are its packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx import Node

from flora_fx.graph.program import GraphModuleView
from flora_fx.ir import Pack, Weight
from flora_fx.storage.module import Fusion

from .lifting import LiftedView

__all__ = ["BodyView", "bodies"]


def bodies(outer: LiftedView) -> Iterator[BodyView]:
    """A view of each checkpointed body that one call in a graph runs."""
    for call in outer.graph.nodes:
        if call.op != "call_function" or call.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        body = outer.attribute(str(call.args[0].target))
        if isinstance(body, fx.GraphModule) and len(call.args[0].users) == 1:
            yield BodyView(body, call, outer)


class BodyView(GraphModuleView):
    """A body for the passes.

    Args:
        body: the graph module, which `finish` changes.
        call: the node in the outer graph that runs it, on its arguments but the first.
        outer: the graph around it.
    """

    derives = False

    def __init__(self, body: fx.GraphModule, call: Node, outer: LiftedView) -> None:
        super().__init__(body)
        self._call, self._outer = call, outer
        self._lifted: list[tuple[Node, Node]] = []

    def weight(self, node: Node) -> Weight | None:
        if node not in self._inputs:
            return None
        operand = self._call.args[1 + self._inputs[node]]
        if not isinstance(operand, Node) or len(operand.users) > 1 or self._call.args.count(operand) > 1:
            return None  # what is read outside too must not move into a pack
        weight = self._outer.weight(operand)
        return weight and replace(weight, node=node)

    def read_pack(self, pack: Pack, like: Tensor) -> Node:
        last = [*self._inputs, *(inside for inside, _ in self._lifted)][-1]
        outside = self._outer.read_pack(pack, like)
        with self.graph.inserting_after(last):
            inside = self.graph.placeholder(outside.name)
        self.examples.give(inside, self._outer.value(outside))
        self._lifted.append((inside, outside))
        return inside

    def finish(self, fusion: Fusion) -> fx.GraphModule:
        """The body, rewritten; its call in the outer graph passes the packs."""
        self.graph.lint()
        self.root.graph = self.graph
        self._call.args = (*self._call.args, *(outside for _, outside in self._lifted))
        return self.root
