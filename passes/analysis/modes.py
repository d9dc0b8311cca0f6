"""Where a graph switches a mode that operations run in: autocast, whether gradients are recorded.

    enter_autocast(…)   q = linear(x, W_q)   exit_autocast(…)   z = linear(x, A)

q and z read one value, but they don't compute in one dtype: what is packed or accumulated together must stand in one
region, between the same two switches. Dynamo writes such switches into its graphs.
"""

from __future__ import annotations

from torch.fx import Node

from flora_fx.passes.context import Context

__all__ = ["Regions", "find_regions"]

SWITCHES = ("_enter_", "_exit_", "_set_", "set_", "_saved_tensors_hooks_")


class Regions(dict[Node, int]):
    """For each node, how many switches stand before it."""


def find_regions(context: Context) -> Regions:
    """Count the switches."""
    regions = Regions()
    current = 0
    for node in context.program.graph.nodes:
        current += _is_switch(node)
        regions[node] = current
    return regions


def _is_switch(node: Node) -> bool:
    """A function of torch's that only sets a state: ``_enter_autocast``, ``_set_grad_enabled``."""
    if node.op != "call_function":
        return False
    kind = node.target
    ours = (getattr(kind, "__module__", None) or "torch").split(".")[0] == "torch"
    return ours and getattr(kind, "__name__", "").startswith(SWITCHES)
