"""Write ``y' = y + scale · z @ Bᵀ``: what a group's blocks and single paths add to a base's value.

addmm       one accumulating GEMM
add         a GEMM, a product with the scale, an add
unrolled    a product and a sum over the rank, with B stored transposed
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import LowRankPath, Pack, Projection
from flora_fx.passes.plan.choosing import HIGHEST_RANK, unrolls
from flora_fx.passes.plan.layout import Block, Layout, features_of, offsets, up_pack, up_slice
from flora_fx.passes.plan.names import Names

from .gates import GateWriter
from .written import Unrolled, Written

__all__ = ["AccumulationWriter"]


class AccumulationWriter:
    """Writes accumulations.

    Args:
        program: whose graph is written into.
        config: the forms.
        names: gives packs their names.
        written: the record of what is written.
    """

    def __init__(self, program: Program, config: FuseConfig, names: Names, written: Written) -> None:
        self.program = program
        self.build = program.build
        self.config = config
        self.names = names
        self.written = written
        self.gates = GateWriter(program, written)

    def write_blocks(self, layout: Layout, segments: Sequence[Node], z: Node) -> list[Node]:
        """Accumulate a layout's blocks onto its segments.

        Args:
            layout: the layout.
            segments: the value of each of its segments.
            z: the value of the down-projections whose columns the blocks count.

        Returns:
            the segments' values with what is added to them.
        """
        values = list(segments)
        downs = layout.downs_of_blocks
        edges = offsets(down.out_features for down in downs)
        runs = {block: (edges[block.columns[0]], edges[block.columns[1]]) for block in layout.blocks}
        picked = [block for block in layout.blocks if self._picks(layout, block, z)]
        lows: dict[Block, Node] = {}
        gated = [block for block in layout.blocks if block.scale.gated and block not in picked]
        of_gated, width = z, edges[len(layout.gates)]
        if gated:
            of_gated = self.written.slice_last(z, edges[-1], [(0, width)])[0]
            of_gated = self.gates.write(self.gates.scale(of_gated, layout.gates), layout.gates)
        others = [block for block in layout.blocks if block not in gated]
        for value, size, wanted in ((of_gated, width, gated), (z, edges[-1], others)):
            if wanted:
                pieces = self.written.slice_last(value, size, [runs[block] for block in wanted])
                lows.update(zip(wanted, pieces, strict=True))
        for block, low in lows.items():
            low = self.written.multiply(low, block.scale.numbers)
            rank = features_of(downs[slice(*block.columns)])
            up = self._read_block(layout, block)
            if block in picked:
                gates = layout.gates[slice(*block.columns)]
                low, up = self.gates.pick(low, up, gates)
                rank = max(gate.rank for gate in gates)
            adapted = self.write_add(values[block.segment], low, up, block.scale.constant, rank)
            sources = [base.weight.name for base in layout.segments[block.segment]]
            self.written.labels[adapted] = f"{Names.joined(sources)}_adapted"
            values[block.segment] = adapted
        return values

    def _picks(self, layout: Layout, block: Block, z: Node) -> bool:
        """Whether a block's up-projections become a loop over those columns alone that a token has."""
        gates = layout.gates[slice(*block.columns)]
        if self.config.accumulate != "unrolled" or not block.scale.gated or not self.build.picks:
            return False
        return self.gates.may_pick(gates) and self._unrolls(z, max(gate.rank for gate in gates))

    def write_path(self, y: Node, path: LowRankPath) -> Node:
        """Accumulate one path, whatever it reads."""
        low = self.written.multiply(self.written.successor(path.low), (*path.numbers, *path.factors))
        if path.select is not None:
            low = self.build.reshape_beside(low, path.down.reads, path.down.out_features)
            low = self.gates.write_one(low, path.select)
        scale = 1.0 if self.config.fold_scale else path.scale
        y = self.write_add(y, low, self._read_up(path), scale, path.up.in_features)
        return self.write_bias(y, path)

    def write_add(self, y: Node, z: Node, up: Node, scale: float, rank: int) -> Node:
        """``y + scale · z @ upᵀ`` in the configured form."""
        if self.config.accumulate == "addmm":
            return self.build.accumulate(y, z, up, scale)
        if self.config.accumulate == "unrolled" and self._unrolls(z, rank):
            value = self.build.unrolled(y, z, up, scale)
            self.written.unrolled.append(Unrolled(value, y, z, up, scale, rank))
            return value
        delta = self.build.linear(z, up, None)
        if scale != 1.0:
            delta = self.build.call(self.build.ops.mul, delta, scale)
        return self.build.call(self.build.ops.add, y, self.build.reshape_to(delta, y))

    def _unrolls(self, z: Node, rank: int) -> bool:
        """Whether an up-projection of a low-rank value is worth being a product and a sum."""
        value, shape = self.program.value(z), self.program.shape(z)
        return unrolls(rank, shape and shape[:-1], "cpu" if value is None else value.device.type)

    def write_bias(self, y: Node, path: LowRankPath) -> Node:
        """``y + scale · factors · bias of the up-projection``, where it has one."""
        if path.up.bias is None:
            return y
        term = self.written.multiply(self.program.read_weight(path.up.bias), (*path.numbers, *path.factors))
        if path.select is not None:
            term = self.gates.write_one(term, path.select)
        return self.build.call(torch.ops.aten.add.Tensor, y, term, alpha=path.scale)

    def _read_block(self, layout: Layout, block: Block) -> Node:
        """The matrix of a block, [out, rank]: a parameter as it is where it is the only one, a pack otherwise."""
        alone = len(block.placements) == 1 and len(layout.segments[block.segment]) == 1
        if alone and block.columns[1] - block.columns[0] == 1:
            return self._read_up(block.placements[0].path)
        ups = [placement.path.up for placement in block.placements]
        return self._read_up_pack(up_pack(self.names.of(ups, "_up"), layout, block, self.config), ups)

    def _read_up(self, path: LowRankPath) -> Node:
        """The up-projection of one path, [out, rank]."""
        up, piece = path.up, up_slice(path, 0, 0, self.config)
        if piece.view and (up.weight.transposed or not self._stands_transposed([up])):
            node = self.program.read_weight(up.weight)
            return self.build.call(self.build.ops.transpose, node) if up.weight.transposed else node
        shape = (up.out_features, up.in_features)
        pack = Pack(self.names.of([up], "_up"), shape, (piece,), path.down.node.name, up.stored_like.source)
        return self._read_up_pack(pack, [up])

    def _read_up_pack(self, pack: Pack, ups: Sequence[Projection]) -> Node:
        """A node for a pack of up-projections, [out, rank]."""
        like = ups[0].stored_like.tensor
        if not self._stands_transposed(ups):
            return self.written.add_pack(pack, like)
        return self.build.call(self.build.ops.transpose, self.written.add_pack(pack.across(), like))

    def _stands_transposed(self, ups: Sequence[Projection]) -> bool:
        """Whether up-projections stand as [rank, out]: then the loop over the features reads neighbours.

        Not where one requires gradients: an optimizer finds it as it was made.
        """
        fits = all(up.in_features <= HIGHEST_RANK and not up.weight.tensor.requires_grad for up in ups)
        return self.config.accumulate == "unrolled" and fits
