"""Take out of a captured graph what does nothing, and check once what says that it does nothing.

    before                                              after
    _assert_tensor_metadata(y, dtype, device)           hold([x, W, …], kinds)
    v = to(y, dtype)           y is of it               v = y
    d = dropout(v, p, False)                            d = v

torch.export checks each value that was cast for the dtype that it had. All of these follow from the dtypes of the
inputs and the weights, so one check of those in front stands for them. Op by op such a check costs as much as a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.ops import Kind, hold
from flora_fx.passes.analysis.operations import ASSERTS, DROPOUTS, dependencies
from flora_fx.passes.analysis.values import Values
from flora_fx.passes.context import Context

__all__ = ["settle"]

aten = torch.ops.aten

CASTS: dict[Any, tuple[int, frozenset[str]]] = {
    aten.to.dtype: (2, frozenset()),
    aten.to.device: (3, frozenset()),
    aten.to.dtype_layout: (1, frozenset({"dtype", "layout", "device"})),
}
"""How many operands each has, and which others, where it may return what it is given."""


def settle(context: Context) -> None:
    """Rewrite a graph whose values have the dtypes that they had when it was captured."""
    program, values = context.program, context[Values]
    if not program.settles:
        return
    checks = [node for node in program.graph.nodes if node.target in ASSERTS and _is_real(program, node.args[0])]
    checked = {node.args[0] for node in checks}
    idle = [node for node in program.graph.nodes if _is_cast(program, node, checked)]
    dropouts = [node for node in program.graph.nodes if node.target in DROPOUTS and values.no_op(node) is not None]
    held = _sources(program, checked)
    if held is None:
        checks, idle = [], []
    for node in (*idle, *dropouts):
        node.replace_all_uses_with(node.args[0])
    for node in (*checks, *reversed(idle), *dropouts):
        program.graph.erase_node(node)
    for node in program.graph.find_nodes(op="get_attr"):
        if not node.users:
            program.graph.erase_node(node)
    if checks and held:
        _write(program, held)


def _is_real(program: Program, node: object) -> bool:
    """Whether a value follows arithmetic's promotion: integers are only told from these."""
    value = program.value(node) if isinstance(node, Node) else None
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _is_cast(program: Program, node: Node, checked: set[Node]) -> bool:
    """Whether a node returns what it is given, as long as that is what it was."""
    operands, named = CASTS.get(node.target, (0, frozenset()))
    if not operands or len(node.args) != operands or not named.issuperset(node.kwargs) or node.args[0] not in checked:
        return False
    before, after = program.value(node.args[0]), program.value(node)  # type: ignore[arg-type]
    return (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)


def _sources(program: Program, checked: Iterable[Node]) -> list[Node] | None:
    """The inputs and weights that the checked values' dtypes follow from; None where one has no known dtype."""
    above = {source for node in checked for source in dependencies(node) if source.op in ("placeholder", "get_attr")}
    found = [node for node in program.graph.nodes if node in above]
    tensors = [node for node in found if isinstance(program.value(node), Tensor)]
    others = [program.attribute(str(node.target)) for node in found if node.op == "get_attr" and node not in tensors]
    return tensors if all(isinstance(other, nn.Module) for other in others) else None  # bodies: of `no_grad`, say


def _write(program: Program, held: list[Node]) -> None:
    """The one check, behind the inputs and the weights."""
    placeholders = program.graph.find_nodes(op="placeholder")
    first = placeholders[-1].next if placeholders else next(iter(program.graph.nodes))
    real = [node for node in held if _is_real(program, node)]
    inputs = [node for node in real if node.op == "placeholder"]
    weights = [node for node in real if node not in inputs]
    kinds: list[Kind] = [(value.dtype, value.dim() == 0) for value in map(program.value, inputs)]
    dtypes = [program.value(node).dtype for node in weights]
    others = [node for node in held if node not in real]
    with program.graph.inserting_before(first):
        check = program.graph.call_function(hold, (inputs, kinds, weights, dtypes, others, torch.get_default_dtype()))
    for node in held:
        if node.op == "get_attr":
            check.prepend(node)
