"""Name the new nodes, now that the old ones are gone whose names they may take."""

from __future__ import annotations

from flora_fx.passes.context import Context

from .written import Written

__all__ = ["name_new_nodes"]


def name_new_nodes(context: Context) -> None:
    """Give each new node that is still there the name that was chosen for it."""
    there = set(context.program.graph.nodes)
    for node, label in context[Written].labels.items():
        if node in there:
            context.program.rename(node, label)
