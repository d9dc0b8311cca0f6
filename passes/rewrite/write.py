"""Write groups and single paths into the graph: the only pass that changes it.

before                                            after (joined, block-diagonal)
q = linear(x, W_q)                                p = linear(x, [W_q; W_k; A_q; A_k])
k = linear(x, W_k)                                y, z = split(p)
z_q = linear(x, A_q)   u_q = linear(z_q, B_q)     y' = accumulate(y, z, [B_q 0; 0 B_k], s)
z_k = linear(x, A_k)   u_k = linear(z_k, B_k)     q', k' = split(y')
q' = q + s·u_q         k' = k + s·u_k

o = linear(u, W_o)                                o' = linear([u, s·z], [W_o, B])
o' = o + s·linear(z, B)

"ahead" does the same with the group's own z: q', k' = split(linear([x, s·z], [W_q B_q 0; W_k 0 B_k])).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate as running
from itertools import groupby, pairwise

import torch
from torch.fx import Node

from flora_fx.config import FuseConfig
from flora_fx.graph.program import Program
from flora_fx.ir import Factor, LowRankPath, Pack, Projection, Weight
from flora_fx.ops import packed_projection
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.plan.choosing import HIGHEST_RANK, unrolls
from flora_fx.passes.plan.group import Group, Grouping, Write
from flora_fx.passes.plan.layout import Block, Columns, Layout, bias_pack, lay_out, rows_pack, up_pack, up_slice
from flora_fx.passes.plan.names import Names
from flora_fx.reporting.sketch import Sketch, SketchWrite

from .rotary import Unrolled

__all__ = ["Writer"]


class Writer:
    """Writes what was decided, and remembers what it made.

    Attributes:
        packs: the packs that the new nodes read.
        slices: new nodes that are strided slices of a packed value.
        replaced: old nodes that nothing should read any more.
        labels: names for new nodes, to be given when the old ones are gone.
        sketches: what the report draws.
        unrolled: the up-projections that were written as a product and a sum.
    """

    def __init__(self, program: Program, values: Values, config: FuseConfig) -> None:
        self.program = program
        self.values = values
        self.graph = program.graph
        self.config = config
        self.names = Names()
        self.packs: list[Pack] = []
        self.slices: list[Node] = []
        self.replaced: list[Node] = []
        self.labels: dict[Node, str] = {}
        self.sketches: list[Sketch] = []
        self.unrolled: list[Unrolled] = []
        self._now: dict[Node, Node] = {}
        self._order: dict[Node, float] = {node: index for index, node in enumerate(self.graph.nodes)}

    def write(self, grouping: Grouping) -> None:
        """Rewrite the graph: groups first, then, in graph order, the paths that stand alone."""
        singles = list(grouping.singles)
        for group in grouping.groups:
            if not self.group(group):
                singles.extend(write.path for write in group.writes)
        singles.sort(key=lambda path: self._order[path.write])
        for _, paths in groupby(singles, key=lambda path: path.write):
            self.singles(tuple(paths))

    def group(self, group: Group) -> bool:
        """Write a group's packs; returns whether its paths were written with them."""
        trains = self.program.trains(self.adapters(group))
        layout = lay_out(group, self.config, stack=not trains and not self.unrolls_all(group))
        bases, downs = layout.bases, layout.downs
        first = min((*bases, *downs), key=lambda member: self._order[member.node]).node
        self.program.origin = first
        self.fetch((number for write in (*group.writes, *group.widenings) for number in write.path.numbers), first)
        with self.graph.inserting_before(first):
            y, z, lows = self.gemms(self.now(group.reads), layout, trains=trains)
            together = y is not None and z is not None
            plain, written = self.accumulated(layout, y, z if together else None)
        for base, value in plain.items():
            self.replace(base.node, self.shaped(base, group.reads, value))
        for down, low in zip(downs, lows, strict=True):
            if low is not None:
                self.replace(down.node, self.shaped(down, group.reads, low))
        for write in group.widenings:  # the base's value holds it already
            self.program.origin = write.path.write
            with self.graph.inserting_before(write.path.write):
                value = self.cast_back(write.path, self.now(write.path.target))
            self.replace(write.path.write, value)
        of_bases = len(bases) if y is None else 1
        of_downs = len(downs) if z is None else int(not bases or layout.apart > 0)
        ups = len(layout.blocks) if together else len(group.writes)
        self.sketches.append(_sketch(group, layout, of_bases + of_downs + ups))
        if together:
            for base, value in written.items():
                self.finish(group, [write for write in group.writes if write.base is base], value)
        return together

    def unrolls_all(self, group: Group) -> bool:
        """Whether every up-projection is a product and a sum: joined with its own reader, not with its siblings."""
        pays = all(unrolls(write.path.up.in_features, None) for write in group.writes)
        return self.config.accumulate == "unrolled" and pays

    @staticmethod
    def adapters(group: Group) -> list[Weight]:
        """The weights of a group's low-rank paths."""
        return [down.weight for down in group.downs] + [write.path.up.weight for write in group.writes]

    def gemms(self, reads: Node, layout: Layout, *, trains: bool) -> tuple[Node | None, Node | None, list[Node | None]]:
        """The values of all bases, of what the group's own paths read, and of each down-projection.

        None for what stays as it is.
        """
        bases, apart, among = layout.bases, layout.downs[: layout.apart], layout.downs[layout.apart :]
        several = len(bases) > 1 or bool(bases and among) or bool(layout.columns)
        together = several or len(layout.downs) > 1 or any(down.like is not None for down in layout.downs)
        y = ahead = inside = None
        if apart and together:
            ahead = self.packed(reads, (), apart)[0]
        if among and bases:
            both, height = self.packed(reads, bases, among, layout, ahead)
            width, total = _width(bases), _width(bases) + _width(among)
            y, inside = self.cut(both, height, [(0, width), (width, total)])
            if trains:
                inside = self.program.contiguous(inside)  # the backward keeps z, and must not keep y with it
        elif among:
            inside = self.packed(reads, (), among)[0]
        elif bases and several:
            y = self.packed(reads, bases, (), layout, ahead)[0]
        return y, ahead or inside, [*self.lows(ahead, apart), *self.lows(inside, among)]

    def lows(self, z: Node | None, downs: Sequence[Projection]) -> list[Node | None]:
        """The values of down-projections in one."""
        if z is None or not downs:
            return [None] * len(downs)
        return [*self.cut(z, _width(downs), _ranges(down.out_features for down in downs))]

    def packed(
        self,
        x: Node,
        bases: Sequence[Projection],
        downs: Sequence[Projection],
        layout: Layout | None = None,
        ahead: Node | None = None,
    ) -> tuple[Node, int]:
        """One GEMM over the rows of several projections; how many rows these are.

        With a layout, its columns stand beside them, for which ``ahead`` is the value of what it sets apart.
        """
        columns = layout.columns if layout else ()
        members = (*bases, *downs)
        name = self.names.of(bases or downs, "" if bases else "_down")
        pack = rows_pack(name, bases, downs, columns, self.config)
        bias = bias_pack(f"{name}_bias", pack, members)
        biases = [member.bias for member in members if member.bias is not None]
        weights = [*(member.weight for member in members), *biases]
        trains = self.program.trains(weights)
        weight_node = self.read(pack, members[0], trains=trains)
        bias_node = self.read(bias, members[0], trains=trains) if bias else None
        if trains:
            rows = [(*piece.rows, piece.transposed) for packed in (pack, bias) if packed for piece in packed.slices]
            trained = map(self.program.weight_node, weights)
            node = self.program.call(packed_projection, x, weight_node, bias_node, rows, *trained)
        else:
            others = [self.beside(x, found, layout, ahead) for found in columns] if layout else []
            given = (weight_node, bias_node)
            node = self.program.widened(x, others, *given) if others else self.program.linear(x, *given)
        self.labels[node] = name
        return node, pack.shape[0]

    def beside(self, x: Node, columns: Columns, layout: Layout, ahead: Node | None) -> Node:
        """``s·z``, in the shape to stand beside a read."""
        if isinstance(columns.low, Node):
            low = self.now(columns.low)
        else:
            assert ahead is not None
            apart = layout.downs[: layout.apart]
            edges = list(running((down.out_features for down in apart), initial=0))
            low = self.cut(ahead, edges[-1], [(edges[columns.low[0]], edges[columns.low[1]])])[0]
        low = self.times(low, columns.scale.numbers)
        if columns.scale.constant != 1.0:
            low = self.program.call(self.program.ops.mul, low, columns.scale.constant)
        return self.program.shaped_beside(low, x, columns.rank)

    def read(self, pack: Pack, like: Projection, *, trains: bool = False) -> Node:
        """A node for a pack."""
        self.packs.append(replace(pack, trains=trains))
        return self.program.packed_weight(pack, (like.like or like.weight).tensor)

    def accumulated(
        self, layout: Layout, y: Node | None, z: Node | None
    ) -> tuple[dict[Projection, Node], dict[Projection, Node]]:
        """The bases' values without and with what is written onto them."""
        if y is None:
            return {}, {}
        before = self.cut(y, _width(layout.bases), _ranges(_width(segment) for segment in layout.segments))
        after = list(before)
        if z is not None:
            read = layout.downs[: layout.apart] or layout.downs
            edges = list(running((down.out_features for down in read), initial=0))
            runs = [(edges[block.columns[0]], edges[block.columns[1]]) for block in layout.blocks]
            for block, low in zip(layout.blocks, self.cut(z, edges[-1], runs) if runs else [], strict=True):
                low = self.times(low, block.scale.numbers)
                rank = sum(down.out_features for down in read[slice(*block.columns)])
                adapted = self.add(after[block.segment], low, self.block(layout, block), block.scale.constant, rank)
                sources = [base.weight.name for base in layout.segments[block.segment]]
                self.labels[adapted] = f"{Names.joined(sources)}_adapted"
                after[block.segment] = adapted
        return self.parts(layout, before), self.parts(layout, after)

    def parts(self, layout: Layout, values: list[Node]) -> dict[Projection, Node]:
        """The bases' slices of their segments."""
        found: dict[Projection, Node] = {}
        for segment, value in zip(layout.segments, values, strict=True):
            slices = self.cut(value, _width(segment), _ranges(base.out_features for base in segment))
            found.update(zip(segment, slices, strict=True))
        return found

    def block(self, layout: Layout, block: Block) -> Node:
        """The matrix of a block, [out, rank]: a parameter as it is where it is the only one, a pack otherwise."""
        alone = len(block.writes) == 1 and len(layout.segments[block.segment]) == 1
        if alone and block.columns[1] - block.columns[0] == 1:
            return self.up(block.writes[0].path)
        ups = [write.path.up for write in block.writes]
        return self.up_read(up_pack(self.names.of(ups, "_up"), layout, block, self.config), ups)

    def up(self, path: LowRankPath) -> Node:
        """The up-projection of one path, [out, rank]."""
        piece = up_slice(path, 0, 0, self.config)
        if piece.view and (path.up.weight.transposed or not self.across([path.up])):
            node = self.program.weight_node(path.up.weight)
            return self.program.call(self.program.ops.transpose, node) if path.up.weight.transposed else node
        like: Weight = path.up.like or path.up.weight
        shape = (path.up.out_features, path.up.in_features)
        pack = Pack(self.names.of([path.up], "_up"), shape, (piece,), path.down.node.name, like.source)
        return self.up_read(pack, [path.up])

    def up_read(self, pack: Pack, ups: Sequence[Projection]) -> Node:
        """A node for a pack of up-projections, [out, rank]."""
        if not self.across(ups):
            return self.read(pack, ups[0])
        return self.program.call(self.program.ops.transpose, self.read(pack.across(), ups[0]))

    def across(self, ups: Sequence[Projection]) -> bool:
        """Whether up-projections stand as [rank, out]: then the loop over the features reads neighbours.

        Not where one requires gradients: an optimizer finds it as it was made.
        """
        fits = all(up.in_features <= HIGHEST_RANK and not up.weight.tensor.requires_grad for up in ups)
        return self.config.accumulate == "unrolled" and fits

    def add(self, y: Node, z: Node, up: Node, scale: float, rank: int) -> Node:
        """``y + scale · z @ upᵀ`` in the configured form."""
        if self.config.accumulate == "addmm":
            return self.program.accumulate(y, z, up, scale)
        shape = self.values.shape(z)
        if self.config.accumulate == "unrolled" and unrolls(rank, shape and shape[:-1]):
            value = self.program.unrolled(y, z, up, scale)
            self.unrolled.append(Unrolled(value, y, z, up, scale, rank))
            return value
        delta = self.program.linear(z, up, None)
        if scale != 1.0:
            delta = self.program.call(self.program.ops.mul, delta, scale)
        return self.program.call(self.program.ops.add, y, self.program.shaped_like(delta, y))

    def add_bias(self, y: Node, path: LowRankPath) -> Node:
        """``y + scale · factors · bias of the up-projection``, where it has one."""
        if path.up.bias is None:
            return y
        term = self.times(self.program.weight_node(path.up.bias), (*path.numbers, *path.factors))
        return self.program.call(torch.ops.aten.add.Tensor, y, term, alpha=path.scale)

    def times(self, value: Node, factors: Iterable[Factor]) -> Node:
        """A value times factors; in front of a GEMM they cost as much as its columns are."""
        for factor in factors:
            operation = self.program.ops.div if factor.divides else self.program.ops.mul
            value = self.program.call(operation, value, self.now(factor.node))
        return value

    def fetch(self, numbers: Iterable[Factor], before: Node) -> None:
        """Let symbolic numbers, and what they are made of, stand in front of a node."""
        for number in numbers:
            self._fetch(number.node, before)

    def _fetch(self, node: Node, before: Node) -> None:
        if self._order[node] > self._order[before]:
            for operand in node.all_input_nodes:
                self._fetch(operand, before)
            before.prepend(node)
            self._order[node] = self._order[before] - 0.5

    def finish(self, group: Group, writes: list[Write], value: Node) -> None:
        """Put the value of a base with all its paths where the last of its adds stands."""
        if not writes:
            return
        last = max(writes, key=lambda write: self._order[write.path.write])
        add = last.path.write
        self.program.origin = add
        with self.graph.inserting_before(add):
            for write in writes:
                value = self.add_bias(value, write.path)
        value = self.shaped(last.base, group.reads, value, before=add)
        with self.graph.inserting_before(add):
            for node in last.chain:
                first = node.all_input_nodes[0]
                value = self.graph.node_copy(node, lambda n, a=first, b=value: b if n is a else n)  # type: ignore[misc]
                self.program.annotate(value)
            value = self.cast_back(last.path, value)
        self.replaced.extend(write.path.write for write in writes)
        self.replace(add, value)

    def singles(self, paths: tuple[LowRankPath, ...]) -> None:
        """Write the paths that end in one add, where it stands."""
        add = paths[0].write
        self.program.origin = add
        value = self.now(paths[0].target)
        with self.graph.inserting_before(add):
            for path in paths:
                low = self.times(self.now(path.low), (*path.numbers, *path.factors))
                scale = 1.0 if self.config.fold_scale else path.scale
                value = self.add(value, low, self.up(path), scale, path.up.in_features)
                value = self.add_bias(value, path)
            value = self.cast_back(paths[-1], value)
        self.replace(add, value)

    def cast_back(self, path: LowRankPath, value: Node) -> Node:
        """Where the user allowed a cast, the result still has the dtype it had."""
        wanted = self.values.dtype(path.write)
        if path.up.like is None or wanted in (None, self.values.dtype(value)):
            return value
        return self.program.cast(value, wanted)

    def shaped(self, member: Projection, reads: Node, value: Node, before: Node | None = None) -> Node:
        """A slice in the shape of the node it stands for, which may have read its value flattened."""
        if self.values.source(member.operand) is self.values.source(reads) or member.like is not None:
            return value
        self.program.origin = member.node
        with self.graph.inserting_before(before or member.node):
            self.slices.append(self.program.shaped_rows(value, member.operand, member.out_features))
        return self.slices[-1]

    def cut(self, value: Node, width: int, ranges: Sequence[tuple[int, int]]) -> list[Node]:
        """Slices of a value's last dimension."""
        nodes = self.program.slices(value, width, ranges)
        self.slices.extend(node for node in nodes if node is not value)
        return nodes

    def now(self, node: Node) -> Node:
        """What stands for an old node by now."""
        while node in self._now:
            node = self._now[node]
        return node

    def replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self._now[old] = new
        self.replaced.append(old)


def _sketch(group: Group, layout: Layout, gemms: int) -> Sketch:
    bases, downs = layout.bases, layout.downs
    row = {base.node: index for index, base in enumerate(bases)}
    low = {down.node: index for index, down in enumerate(downs)}

    def drawn(writes: Iterable[Write]) -> tuple[SketchWrite, ...]:
        return tuple(
            SketchWrite(row[w.base.node], low.get(w.path.down.node), w.path.up.weight.name, w.path.scale)
            for w in writes
        )

    return Sketch(
        Names.joined([member.weight.name for member in bases or downs]),
        group.reads.name,
        tuple((base.weight.name, base.out_features) for base in bases),
        tuple((down.weight.name, down.out_features) for down in downs),
        drawn(group.writes),
        drawn(group.widenings),
        gemms,
        layout.apart,
    )


def _width(members: Sequence[Projection]) -> int:
    return sum(member.out_features for member in members)


def _ranges(sizes: Iterable[int]) -> list[tuple[int, int]]:
    edges = list(running(sizes, initial=0))
    return list(pairwise(edges))
