"""Count what a graph launches: GEMMs, elementwise kernels, the rest."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from flora_fx.ops import accumulate, accumulate_unrolled, matrix_vector, packed_projection
from flora_fx.quantized.ops import OPERATOR

from .program import Program

__all__ = ["count_ops", "kind_of"]

aten = torch.ops.aten

GEMMS: set[Any] = {
    F.linear,
    accumulate,
    matrix_vector,
    packed_projection,
    torch.addmm,
    torch.mm,
    torch.bmm,
    torch.matmul,
    operator.matmul,
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    OPERATOR,
    "matmul",
    "mm",
}
ELEMENTWISE: set[Any] = {
    accumulate_unrolled,
    operator.add,
    operator.iadd,
    operator.mul,
    operator.sub,
    operator.truediv,
    torch.add,
    torch.mul,
    torch.sub,
    torch.div,
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.mul.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    "add",
    "add_",
    "mul",
}


def kind_of(program: Program, node: Node) -> str | None:
    """``"gemm"``, ``"elementwise"`` or ``"other"``; None for a node that computes nothing.

    Elementwise are add, mul and their like on floating-point tensors.
    """
    if node.op in ("placeholder", "output", "get_attr"):
        return None
    if node.op == "call_module":
        return "gemm" if isinstance(program.root.get_submodule(str(node.target)), nn.Linear) else "other"
    if node.target in GEMMS:
        return "gemm"
    value = program.value(node)
    # Arithmetic on sizes launches nothing, and on positions and masks it is not the model's.
    computes = value is None or (isinstance(value, torch.Tensor) and value.is_floating_point())
    return "elementwise" if node.target in ELEMENTWISE and computes else "other"


def count_ops(program: Program) -> dict[str, int]:
    """How many operations of each kind a graph holds."""
    found = Counter(kind for node in program.graph.nodes if (kind := kind_of(program, node)))
    return {kind: found[kind] for kind in ("gemm", "elementwise", "other")}
