"""The part of a captured program that its outputs need."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import Node

__all__ = ["prune"]


def prune(program: ExportedProgram) -> None:
    """Erase, in place, what no output is computed from. Inputs and weights stay in the program's signature.

    Checks of what is left out go as well: assertions return nothing, so nothing is computed from them.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if str(node.target).startswith("aten._assert"):
            graph.erase_node(node)
    graph.eliminate_dead_code(_stays)
    program.graph_module.recompile()


def _stays(node: Node) -> bool:
    """Whether a node without users has an effect: it changes a value that someone else may read."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    return any(set(value.users) != {node} or _is_view(value) for value in node.all_input_nodes)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op != "call_function" or schema is None or any(a.alias_info is not None for a in schema.arguments)
