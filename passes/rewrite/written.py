"""What has been written into the graph so far, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.ir import Factor, Pack
from flora_fx.reporting.sketch import Sketch

__all__ = ["Unrolled", "Written"]


@dataclass(frozen=True)
class Unrolled:
    """``node = y + scale · z @ upᵀ``, written as a product and a sum."""

    node: Node
    y: Node
    z: Node
    up: Node
    scale: float
    rank: int


class Written:
    """A record that grows while groups and single paths are written.

    Attributes:
        packs: the packs that the new nodes read.
        slices: new nodes that are strided slices of a packed value.
        replaced: old nodes that nothing should read any more.
        labels: names for new nodes, to be given when the old ones are gone.
        sketches: what the report draws.
        unrolled: the up-projections that were written as a product and a sum.
    """

    def __init__(self, program: Program) -> None:
        self.packs: list[Pack] = []
        self.slices: list[Node] = []
        self.replaced: list[Node] = []
        self.labels: dict[Node, str] = {}
        self.sketches: list[Sketch] = []
        self.unrolled: list[Unrolled] = []
        self._program = program
        self._successors: dict[Node, Node] = {}

    def successor(self, node: Node) -> Node:
        """The node that stands for an old node by now; itself where nothing has replaced it."""
        while node in self._successors:
            node = self._successors[node]
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let everything that reads the old node read the new one."""
        old.replace_all_uses_with(new)
        self._successors[old] = new
        self.replaced.append(old)

    def add_pack(self, pack: Pack, like: Tensor, *, trains: bool = False) -> Node:
        """Add a pack, with the dtype and device of ``like``, and a node that reads it."""
        self.packs.append(replace(pack, trains=trains))
        return self._program.read_pack(pack, like)

    def slice_last(self, value: Node, width: int, ranges: Sequence[tuple[int, int]]) -> list[Node]:
        """Add slices of a value's last dimension, of size ``width``; the value itself where a range is all of it."""
        nodes = self._program.build.slice_last(value, width, ranges)
        self.slices.extend(node for node in nodes if node is not value)
        return nodes

    def multiply(self, value: Node, factors: Iterable[Factor]) -> Node:
        """Multiply a value by factors; in front of a GEMM they cost as much as its columns are."""
        build = self._program.build
        for factor in factors:
            operation = build.ops.div if factor.divides else build.ops.mul
            value = build.call(operation, value, self.successor(factor.node))
        return value
