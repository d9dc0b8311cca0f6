"""Write groups and single paths into the graph.

before                                            after (joined, block-diagonal)
q = linear(x, W_q)                                p = linear(x, [W_q; W_k; A_q; A_k])
k = linear(x, W_k)                                y, z = split(p)
z_q = linear(x, A_q)   u_q = linear(z_q, B_q)     y' = accumulate(y, z, [B_q 0; 0 B_k], s)
z_k = linear(x, A_k)   u_k = linear(z_k, B_k)     q', k' = split(y')
q' = q + s·u_q         k' = k + s·u_k

o = linear(u, W_o)                                o' = linear([u, s·z], [W_o, B])
o' = o + s·linear(z, B)

"ahead" does the same with the group's own z: q', k' = split(linear([x, s·z], [W_q B_q 0; W_k 0 B_k])).

`rows` writes the GEMMs over packs, `accumulations` what is added to them; here is where in the graph they stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.ir import LowRankPath, Projection, Weight
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.context import Context
from flora_fx.passes.plan.choosing import unrolls
from flora_fx.passes.plan.forms import Forms
from flora_fx.passes.plan.group import Group, Grouping, Placement
from flora_fx.passes.plan.layout import Layout, features_of, lay_out, ranges
from flora_fx.passes.plan.names import Names

from .accumulations import AccumulationWriter
from .drawing import sketch_group
from .rows import RowWriter
from .written import Written

__all__ = ["write"]


def write(context: Context) -> Written:
    """Write groups first, then, in graph order, the paths that stand alone."""
    grouping = context[Grouping]
    writer = _Writer(context.program, context[Values], context[Forms])
    singles = list(grouping.singles)
    for group in sorted(grouping.groups, key=writer.start):  # what several share is written where the first needs it
        if not writer.write_group(group):
            singles.extend(placement.path for placement in group.accumulated)
    singles.sort(key=lambda path: writer.position(path.add))
    for _, paths in groupby(singles, key=lambda path: path.add):
        writer.write_singles(tuple(paths))
    return writer.written


class _Writer:
    def __init__(self, program: Program, values: Values, forms: Forms) -> None:
        self.program = program
        self.build = program.build
        self.values = values
        self.graph = program.graph
        self.config = forms.config
        self.written = Written(program)
        names = Names()
        self.rows = RowWriter(program, self.config, names, self.written)
        self.accumulations = AccumulationWriter(program, self.config, names, self.written)
        self._order: dict[Node, float] = {node: index for index, node in enumerate(self.graph.nodes)}

    def position(self, node: Node) -> float:
        """Where a node stands that was there before anything was written: a greater one stands further down."""
        return self._order[node]

    def start(self, group: Group) -> float:
        """Where the first member of a group stands."""
        return min(self.position(member.node) for member in (*group.bases, *group.downs))

    def write_group(self, group: Group) -> bool:
        """Write a group's packs; returns whether the paths that are accumulated were written with them."""
        trains = self.program.trains(_adapters(group))
        layout = lay_out(group, self.config, stack=not trains and not self._unrolls_all(group))
        bases, downs = layout.bases, layout.downs
        first = min((*bases, *downs), key=lambda member: self.position(member.node)).node
        self.build.origin = first
        placements = (*group.accumulated, *group.widened)
        paths = [placement.path for placement in placements]
        self._move_ahead((number.node for path in paths for number in path.numbers), first)
        self._move_ahead((path.select.mask for path in paths if path.select is not None), first)
        plain: dict[Projection, Node] = {}
        adapted: dict[Projection, Node] = {}
        with self.graph.inserting_before(first):
            values = self.rows.write(self.written.successor(group.reads), layout, trains=trains)
            together = values.bases is not None and values.low is not None
            if values.bases is not None:
                widths = [features_of(segment) for segment in layout.segments]
                segments = self.written.slice_last(values.bases, features_of(bases), ranges(widths))
                after = segments
                if values.low is not None:
                    after = self.accumulations.write_blocks(layout, segments, values.low)
                plain, adapted = self._slice_bases(layout, segments), self._slice_bases(layout, after)
        for base, value in plain.items():
            self.written.replace(base.node, self._reshape_as(base, group.reads, value))
        for down, low in zip(downs, values.each_down, strict=True):
            if low is not None:
                self.written.replace(down.node, self._reshape_as(down, group.reads, low))
        for placement in group.widened:
            self._replace_add(placement.path)
        self.written.sketches.append(sketch_group(group, layout, values))
        if together:
            for base, value in adapted.items():
                self._replace_adds(group, [place for place in group.accumulated if place.base is base], value)
        return together

    def write_singles(self, paths: tuple[LowRankPath, ...]) -> None:
        """Write the paths that end in one add, where it stands."""
        add = paths[0].add
        self.build.origin = add
        value = self.written.successor(paths[0].onto)
        with self.graph.inserting_before(add):
            for path in paths:
                value = self.accumulations.write_path(value, path)
            value = self._cast_back(paths[-1], value)
        self.written.replace(add, value)

    def _unrolls_all(self, group: Group) -> bool:
        """Whether every up-projection is a product and a sum: joined with its own reader, not with its siblings."""
        ups = [placement.path.up for placement in group.accumulated]
        pays = all(unrolls(up.in_features, None, up.weight.tensor.device.type) for up in ups)
        return self.config.accumulate == "unrolled" and pays

    def _slice_bases(self, layout: Layout, segments: Sequence[Node]) -> dict[Projection, Node]:
        """The bases' slices of their segments' values."""
        found: dict[Projection, Node] = {}
        for segment, value in zip(layout.segments, segments, strict=True):
            pieces = ranges(base.out_features for base in segment)
            found.update(zip(segment, self.written.slice_last(value, features_of(segment), pieces), strict=True))
        return found

    def _move_ahead(self, nodes: Iterable[Node], before: Node) -> None:
        """Move symbolic numbers and masks, and what they are made of, in front of a node."""
        for node in nodes:
            self._move_node_ahead(node, before)

    def _move_node_ahead(self, node: Node, before: Node) -> None:
        if self._order[node] > self._order[before]:
            for operand in node.all_input_nodes:
                self._move_node_ahead(operand, before)
            before.prepend(node)
            self._order[node] = self._order[before] - 0.5

    def _replace_add(self, path: LowRankPath) -> None:
        """Replace the add of a path that widens its group: the base's value holds it already."""
        self.build.origin = path.add
        with self.graph.inserting_before(path.add):
            value = self._cast_back(path, self.written.successor(path.onto))
        self.written.replace(path.add, value)

    def _replace_adds(self, group: Group, placements: list[Placement], value: Node) -> None:
        """Let the value of a base with all its paths stand where the last of its adds stands."""
        if not placements:
            return
        last = max(placements, key=lambda placement: self.position(placement.path.add))
        add = last.path.add
        self.build.origin = add
        with self.graph.inserting_before(add):
            for placement in placements:
                value = self.accumulations.write_bias(value, placement.path)
        value = self._reshape_as(last.base, group.reads, value, before=add)
        with self.graph.inserting_before(add):
            for node in last.chain:
                first = node.all_input_nodes[0]
                value = self.graph.node_copy(node, lambda n, a=first, b=value: b if n is a else n)  # type: ignore[misc]
                self.build.annotate(value)
            value = self._cast_back(last.path, value)
        self.written.replaced.extend(placement.path.add for placement in placements)
        self.written.replace(add, value)

    def _cast_back(self, path: LowRankPath, value: Node) -> Node:
        """Where the user allowed a cast, give the result the dtype it had."""
        wanted = self.program.dtype(path.add)
        if path.up.cast_to is None or wanted in (None, self.program.dtype(value)):
            return value
        return self.build.cast(value, wanted)

    def _reshape_as(self, member: Projection, reads: Node, value: Node, before: Node | None = None) -> Node:
        """Give a slice the shape of the projection it stands for, which may have read its value flattened."""
        if self.values.earliest(member.operand) is self.values.earliest(reads) or member.cast_to is not None:
            return value
        self.build.origin = member.node
        with self.graph.inserting_before(before or member.node):
            reshaped = self.build.reshape_rows(value, member.operand, member.out_features)
        self.written.slices.append(reshaped)
        return reshaped


def _adapters(group: Group) -> list[Weight]:
    """The weights of a group's low-rank paths."""
    return [down.weight for down in group.downs] + [placement.path.up.weight for placement in group.accumulated]
