"""Remove what a rewrite left without readers, and nothing else: a user's dead code may draw random numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch.fx import Graph, Node

from flora_fx.passes.analysis.mutation import Effects
from flora_fx.passes.analysis.operations import ASSERTS
from flora_fx.passes.context import Context

from .rotary import Rotations
from .written import Written

__all__ = ["clean", "erase_unread"]


def clean(context: Context) -> None:
    """Erase what the rewrites replaced, and slices that nothing reads."""
    written, rotations = context[Written], context[Rotations]
    replaced = [*written.replaced, *(rotation.node for rotation in rotations), *written.slices]
    erase_unread(context.program.graph, replaced, context[Effects].alone)


def erase_unread(graph: Graph, nodes: Iterable[Node], alone: Collection[Node]) -> None:
    """Erase the given nodes if nothing reads them, then their operands likewise, unless those have effects.

    Args:
        nodes: where to begin.
        alone: operations in place whose effects nobody sees but through their result.
    """
    given = set(nodes)
    pending = list(given)
    erased: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in erased or node.op in ("placeholder", "output") or any(u.target not in ASSERTS for u in node.users):
            continue
        if node not in given and node not in alone and node.is_impure():
            continue
        for assertion in list(node.users):
            graph.erase_node(assertion)
            erased.add(assertion)
        operands = node.all_input_nodes
        graph.erase_node(node)
        erased.add(node)
        pending.extend(operands)
