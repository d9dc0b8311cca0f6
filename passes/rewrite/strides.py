"""Make readers of a packed value independent of its strides.

q = split(p)[0]            a slice of p: not contiguous
view(q, …)                 -> reshape(q, …)            a view may be impossible, a reshape never is
output(q), custom_op(q)    -> clone(q, contiguous)     whoever receives it may count on the layout it had
q += v                     -> clone(q, contiguous)     autograd lets no part of a split be changed in place
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from flora_fx.graph.program import Program
from flora_fx.internals import HigherOrderOperator, OpOverload
from flora_fx.passes.analysis.mutation import changed_by, may_alias
from flora_fx.passes.analysis.operations import TORCHS_OWN, operation
from flora_fx.passes.context import Context

from .written import Written

__all__ = ["soften"]

aten = torch.ops.aten

WITHOUT_STRIDES: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    "view": "reshape",
    "view_as": "reshape_as",
}
STRICT = {aten.view_as_complex.default, torch.view_as_complex, aten.view.dtype}


def soften(context: Context) -> None:
    """Make every reader of a slice, and of a view of it, independent of its strides."""
    program = context.program
    there = set(program.graph.nodes)
    for slice_ in context[Written].slices:
        if slice_ not in there:
            continue
        pending, seen, strict = [slice_], {slice_}, False
        while pending:
            node = pending.pop()
            for user in list(node.users):
                strict = strict or _counts_on_layout(program, user) or node in changed_by(user, program.root)
                if operation(user) in WITHOUT_STRIDES and not (user.op == "call_method" and _views_dtype(user)):
                    user.target = WITHOUT_STRIDES[operation(user)]
                if user not in seen and user.op != "output" and may_alias(user, program.root):
                    seen.add(user)
                    pending.append(user)
        if strict:
            program.build.origin = slice_
            users = list(slice_.users)
            with program.graph.inserting_after(slice_):
                dense = program.build.contiguous(slice_)
            for user in users:
                user.replace_input_with(slice_, dense)


def _views_dtype(node: Node) -> bool:
    return len(node.args) > 1 and isinstance(node.args[1], torch.dtype)


def _counts_on_layout(program: Program, user: Node) -> bool:
    kind = operation(user)
    if user.op == "call_method":
        return user.target == "view" and _views_dtype(user)
    if user.op == "call_module":
        return not type(program.attribute(str(user.target))).__module__.startswith("torch.nn")
    if isinstance(kind, OpOverload):
        return kind in STRICT or kind.namespace not in TORCHS_OWN
    known = ("torch", "_operator", "builtins", "math", "flora_fx")
    written_here = (getattr(kind, "__module__", None) or "torch").split(".")[0] not in known
    return user.op == "output" or kind in STRICT or isinstance(kind, HigherOrderOperator) or written_here
