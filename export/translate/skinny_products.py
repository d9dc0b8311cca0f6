"""Products with a weight in the operator for few rows, ``SkinnyMatMul`` of ``flora_ort``.

    MatMul(x, W.T)                  ->  SkinnyMatMul(x, W),  W [out, in] as a model has it
    MatMul(x, Transpose(W))         ->  the same: a tied embedding is there once

A decode step reads every weight once and does nothing else that takes as long. cuBLAS reads them one GEMM after the
other; this kernel has its part of W under way while what gives x is still running. Prompts, of many rows, are multiplied
by ONNX Runtime as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flora_fx.errors import require

from ..directory.operators import DOMAIN
from .lora_sums import attribute, sizes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["use_skinny_products"]

_CHUNK = 32
"""Columns of W that the kernel reads at once."""


def use_skinny_products(model: onnx_ir.Model) -> int:
    """Rewrite a decoder's graph in place, where its weights are float16 or bfloat16.

    Returns:
        how many products it has in that operator.
    """
    require("onnx_ir.passes.common", "onnx")
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    written = sum(_rewrite(model, node) for node in list(model.graph))
    RemoveUnusedNodesPass()(model)
    return written


def _rewrite(model: onnx_ir.Model, node: onnx_ir.Node) -> bool:
    import onnx_ir

    if node.op_type != "MatMul" or node.domain != "" or None in node.inputs:
        return False
    x, turned = node.inputs
    assert turned is not None
    weight = _weight(model, turned)
    if weight is None or sizes(weight)[-1] % _CHUNK:
        return False
    (old,) = node.outputs
    product = onnx_ir.Value(name=old.name, shape=old.shape, type=old.type)
    made = onnx_ir.node("SkinnyMatMul", [x, weight], {}, domain=DOMAIN, outputs=[product])
    made.name = node.name
    model.graph.insert_before(node, made)
    old.name = f"{old.name}_replaced"
    onnx_ir.convenience.replace_all_uses_with(old, product, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    return True


def _weight(model: onnx_ir.Model, turned: onnx_ir.Value) -> onnx_ir.Value | None:
    """The constant W [out, in] that a value is the transposed of, if there is one that can be read as it is."""
    from onnx_ir import DataType

    from .nodes import as_it_was

    if turned.dtype not in (DataType.FLOAT16, DataType.BFLOAT16) or len(sizes(turned)) != 2 or turned.is_graph_input():
        return None
    made = turned.producer()
    if made is not None and made.op_type == "Transpose" and attribute(made, "perm", None) is not None:
        found = made.inputs[0]
        return found if found is not None and found.is_initializer() and not found.is_graph_input() else None
    return as_it_was(model.graph, turned) if turned.is_initializer() else None
