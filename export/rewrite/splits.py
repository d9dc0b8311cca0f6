"""Take the parts of a packed value by one split, and give q, k and v to attention as the one value that they are.

q, k, v, z = parts of parts of p      ->      q, k, v, z = split(p)
attention(q, k, v)                            qkv, z = split(p);  attention(qkv)
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from .evaluating import call, sizes
from .rotary import ATTENTION, QUERY, VALUE
from .views import before_views

__all__ = ["join_heads", "split_once"]

aten = torch.ops.aten
SPLIT = aten.split_with_sizes.default


def split_once(program: ExportedProgram) -> None:
    """Rewrite a program in place: parts of parts of a value are taken from it by one split."""
    graph = program.graph_module.graph
    parts: dict[Node, list[tuple[Node, _Part]]] = defaultdict(list)
    for node in graph.nodes:
        part = _part_of(node)
        if part is None:
            continue
        while (outer := _part_of(part.whole)) is not None:
            part = _Part(outer.whole, outer.start + part.start, outer.start + part.stop)
        if any(_part_of(user) is None and user.target is not SPLIT for user in node.users):
            parts[part.whole].append((node, part))
    for whole, leaves in parts.items():
        leaves.sort(key=lambda leaf: leaf[1].start)
        spans = [(part.start, part.stop) for _, part in leaves]
        if len(leaves) < 2 or any(one[1] > other[0] for one, other in itertools.pairwise(spans)):
            continue
        edges = sorted({0, sizes(whole)[-1], *itertools.chain.from_iterable(spans)})  # type: ignore[index]
        with graph.inserting_after(whole):
            split = call(graph, SPLIT, whole, [b - a for a, b in itertools.pairwise(edges)], -1)
        with graph.inserting_after(split):
            for node, part in leaves:
                node.replace_all_uses_with(call(graph, operator.getitem, split, edges.index(part.start)))
    _finish(program)


def join_heads(program: ExportedProgram) -> int:
    """Rewrite a program in place: where q, k and v are neighbours in one value, attention takes that one.

    Returns:
        how many attentions do now.
    """
    graph = program.graph_module.graph
    joined = 0
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        parts = [_part(operand) for operand in node.args[QUERY : VALUE + 1] if isinstance(operand, Node)]
        pieces = [part for part in parts if part is not None]
        if len(pieces) != 3 or any(part.whole is not pieces[0].whole for part in pieces):
            continue
        if any(one.stop != other.start for one, other in itertools.pairwise(pieces)):
            continue
        whole, start, stop = pieces[0].whole, pieces[0].start, pieces[-1].stop
        with graph.inserting_before(node):
            packed = _range(graph, whole, start, stop)
        node.args = (packed, None, None, *node.args[VALUE + 1 :])
        joined += 1
    _finish(program)
    return joined


def _finish(program: ExportedProgram) -> None:
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.graph.lint()
    program.graph_module.recompile()


@dataclass(frozen=True)
class _Part:
    """A range of a value's last dimension."""

    whole: Node
    start: int
    stop: int


def _part(node: Node) -> _Part | None:
    """Which range of which other value this one is, seen through views."""
    return _part_of(before_views(node))


def _part_of(node: Node) -> _Part | None:
    """Which range of which other value this one is; None if it is no range."""
    if node.target is operator.getitem and isinstance(split := node.args[0], Node):
        if split.target is not SPLIT or not _is_last(split, 2):
            return None
        whole, edges = split.args[0], list(itertools.accumulate(split.args[1], initial=0))  # type: ignore[arg-type]
        index = node.args[1]
        assert isinstance(whole, Node)
        assert isinstance(index, int)
        return _Part(whole, edges[index], edges[index + 1])
    if node.target is aten.slice.Tensor and _is_last(node, 1) and len(node.args) < 5:
        whole = node.args[0]
        assert isinstance(whole, Node)
        width = sizes(whole)[-1]  # type: ignore[index]
        start, stop = (node.args[2] if len(node.args) > 2 else 0), (node.args[3] if len(node.args) > 3 else width)
        if isinstance(start, int) and isinstance(stop, int) and 0 <= start < min(stop, width):  # none that is empty
            return _Part(whole, start, min(stop, width))
    return None


def _is_last(node: Node, position: int) -> bool:
    dim = node.args[position] if len(node.args) > position else 0
    shape = sizes(node.all_input_nodes[0])
    return shape is not None and dim in (-1, len(shape) - 1)


def _range(graph: Graph, whole: Node, start: int, stop: int) -> Node:
    """A range of a value. Other parts of a split that begins with it are taken from the same, coarser split."""
    width = sizes(whole)[-1]  # type: ignore[index]
    if (start, stop) == (0, width):
        return whole
    for split in [user for user in whole.users if user.target is SPLIT and _is_last(user, 2)]:
        edges = list(itertools.accumulate(split.args[1], initial=0))  # type: ignore[arg-type]
        if start == 0 and stop in edges:
            rest = [b - a for a, b in itertools.pairwise(edges[edges.index(stop) :])]
            coarse = call(graph, SPLIT, whole, [stop, *rest], -1)
            parts = [call(graph, operator.getitem, coarse, index) for index in range(1 + len(rest))]
            for user in list(split.users):
                index = user.args[1]
                assert isinstance(index, int)
                if index >= edges.index(stop):
                    user.replace_all_uses_with(parts[index - edges.index(stop) + 1])
            return parts[0]
    return call(graph, aten.slice.Tensor, whole, -1, start, stop)
