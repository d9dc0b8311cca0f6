"""Write the GEMMs over a group's packs: several projections of one value as rows of one weight.

[q | k | z_q] = linear(x, [W_q; W_k; A_q])            and with columns beside the bases
[o]           = linear([u, s·z], [W_o, B])

Quantized bases are an operator of their own, with the down-projections beside it:

[q | k]       = quantized_linear(x, [codes_q; codes_k], [scales_q; scales_k], …)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import Pack, Projection, Weight
from flora_fx.ops import packed_projection
from flora_fx.passes.plan.layout import Columns, Layout, bias_pack, features_of, held_packs, offsets, ranges, rows_pack
from flora_fx.passes.plan.names import Names
from flora_fx.quantized.ops import OPERATOR

from .written import Written

__all__ = ["GroupValues", "RowWriter"]


@dataclass(frozen=True, eq=False)
class GroupValues:
    """The values that a group's GEMMs compute; None for what stays as it is.

    Attributes:
        bases: of all bases.
        low: of the down-projections whose columns the layout's blocks count.
        each_down: of each down-projection, in the layout's order.
    """

    bases: Node | None
    low: Node | None
    each_down: tuple[Node | None, ...]


class _Gemm(NamedTuple):
    """A GEMM's value, and how many rows its weight has: more than its projections have where it is filled up."""

    value: Node
    rows: int


class RowWriter:
    """Writes the GEMMs of groups.

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

    def write(self, reads: Node, layout: Layout, *, trains: bool) -> GroupValues:
        """Write the GEMMs of a group.

        Args:
            reads: the value that the group reads.
            layout: the group's.
            trains: whether gradients of its adapters are wanted.
        """
        bases, apart, among = layout.bases, layout.downs_apart, layout.downs_among
        several = len(bases) > 1 or bool(bases and among) or bool(layout.columns)
        together = several or len(layout.downs) > 1 or any(down.cast_to is not None for down in layout.downs)
        of_bases = of_apart = of_among = None
        quantized = bool(bases) and bases[0].held is not None
        if apart and together:
            of_apart = self._write_gemm(reads, (), apart).value
        if among and bases:
            both, rows = self._write_gemm(reads, bases, among, layout, of_apart)
            width = features_of(bases)
            of_bases, of_among = self.written.slice_last(both, rows, [(0, width), (width, width + features_of(among))])
            if trains:
                of_among = self.build.contiguous(of_among)  # the backward keeps z, and must not keep y with it
        elif among:
            of_among = self._write_gemm(reads, (), among).value
        elif quantized and several:
            of_bases = self._write_quantized(reads, bases)
        elif bases and several:
            of_bases = self._write_gemm(reads, bases, (), layout, of_apart).value
        each_down = (*self._slice_downs(of_apart, apart), *self._slice_downs(of_among, among))
        return GroupValues(of_bases, of_apart or of_among, each_down)

    def _slice_downs(self, value: Node | None, downs: Sequence[Projection]) -> Sequence[Node | None]:
        """The values of down-projections in that of all of them."""
        if value is None or not downs:
            return [None] * len(downs)
        return self.written.slice_last(value, features_of(downs), ranges(down.out_features for down in downs))

    def _write_gemm(
        self,
        x: Node,
        bases: Sequence[Projection],
        downs: Sequence[Projection],
        layout: Layout | None = None,
        of_apart: Node | None = None,
    ) -> _Gemm:
        """One GEMM over the rows of several projections.

        With a layout, its columns stand beside them; ``of_apart`` is the value of the down-projections it sets apart.
        """
        columns = layout.columns if layout else ()
        members = (*bases, *downs)
        name = self.names.of(bases or downs, "" if bases else "_down")
        pack = rows_pack(name, bases, downs, columns, self.config)
        bias = bias_pack(f"{name}_bias", pack, members)
        biases = [member.bias for member in members if member.bias is not None]
        weights = [*(member.weight for member in members), *biases]
        trains = self.program.trains(weights)
        like = members[0].stored_like.tensor
        weight_node = self.written.add_pack(pack, like, trains=trains)
        bias_node = self.written.add_pack(bias, like, trains=trains) if bias else None
        if trains:
            rows = [(*piece.rows, piece.transposed) for packed in (pack, bias) if packed for piece in packed.slices]
            trained = map(self.program.read_weight, weights)
            value = self.build.call(packed_projection, x, weight_node, bias_node, rows, *trained)
        elif layout and columns:
            others = [self._write_beside(x, found, layout, of_apart) for found in columns]
            value = self.build.widened_linear(x, others, weight_node, bias_node)
        else:
            value = self.build.linear(x, weight_node, bias_node)
        self.written.labels[value] = name
        return _Gemm(value, pack.shape[0])

    def _write_quantized(self, x: Node, bases: Sequence[Projection]) -> Node:
        """One operator over the codes of several quantized projections."""
        held = bases[0].held
        assert held is not None
        name = self.names.of(bases)
        packs = held_packs(name, bases)

        def read(pack: Pack | None, like: Weight | None) -> Node | None:
            return None if pack is None or like is None else self.written.add_pack(pack, like.tensor)

        codes, scales = read(packs.codes, bases[0].weight), read(packs.scales, held.scales)
        zeros = read(packs.zeros, held.zeros)
        bias = read(packs.bias, next((base.bias for base in bases if base.bias is not None), None))
        order = None if held.order is None else self.program.read_weight(held.order)
        of = (held.kind, held.bits, held.block, features_of(bases))
        value = self.build.call(OPERATOR, x, codes, scales, zeros, order, bias, *of)
        self.written.labels[value] = name
        return value

    def _write_beside(self, x: Node, columns: Columns, layout: Layout, of_apart: Node | None) -> Node:
        """``s·z``, in the shape to stand beside x."""
        if isinstance(columns.low, Node):
            low = self.written.successor(columns.low)
        else:
            assert of_apart is not None
            edges = offsets(down.out_features for down in layout.downs_apart)
            wanted = (edges[columns.low[0]], edges[columns.low[1]])
            low = self.written.slice_last(of_apart, edges[-1], [wanted])[0]
        low = self.written.multiply(low, columns.scale.numbers)
        if columns.scale.constant != 1.0:
            low = self.build.call(self.build.ops.mul, low, columns.scale.constant)
        return self.build.reshape_beside(low, x, columns.rank)
