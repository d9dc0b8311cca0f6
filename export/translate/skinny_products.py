"""Products with a weight in the operator for few rows, ``SkinnyMatMul`` of ``flora_ort``.

    MatMul(x, W.T)                  ->  SkinnyMatMul(x, W),  W [out, in] as a model has it
    MatMul(x, Transpose(W))         ->  the same: a tied embedding is there once
    MatMul(x, W.T), MatMul(x, A.T)  ->  SkinnyMatMul(x, W, A), where A may be replaced and z is read beside x W.T

A decode step reads every weight once and does nothing else that takes as long. cuBLAS reads them one GEMM after the
other; this kernel has its part of W under way while what gives x is still running. Prompts have many rows, and are
multiplied by ONNX Runtime as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flora_fx.errors import require

from ..directory.operators import DOMAIN
from .lora_sums import attribute, bias_place, readers_of_pack, sizes

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

    products = [found for node in model.graph if (found := _product(model, node)) is not None]
    lows = _low_ranks(products)
    for product in products:
        if product not in lows.values():
            _write(model, product, lows.get(product))
    RemoveUnusedNodesPass()(model)
    return len(products) - len(lows)


@dataclass(frozen=True, eq=False)
class _Product:
    """``x W.T``, as it was found."""

    node: onnx_ir.Node
    x: onnx_ir.Value
    weight: onnx_ir.Value


def _product(model: onnx_ir.Model, node: onnx_ir.Node) -> _Product | None:
    if node.op_type != "MatMul" or node.domain != "" or None in node.inputs:
        return None
    x, turned = node.inputs
    assert x is not None
    assert turned is not None
    weight = _weight(model, turned)
    return None if weight is None or sizes(weight)[-1] % _CHUNK else _Product(node, x, weight)


def _low_ranks(products: Sequence[_Product]) -> dict[_Product, _Product]:
    """By a product that an operator takes as its pack, the one that the same operator takes as z, if x is the same."""
    found: dict[_Product, _Product] = {}
    by_output = {product.node.outputs[0]: product for product in products}
    for product in products:
        for reader in readers_of_pack(product.node.outputs[0]):
            place = bias_place(reader) + 1
            low = by_output.get(value) if len(reader.inputs) > place and (value := reader.inputs[place]) else None
            if low is not None and low.x is product.x and low not in found.values():
                found[product] = low
    return found


def _write(model: onnx_ir.Model, product: _Product, low: _Product | None) -> None:
    import onnx_ir

    taken = [product] if low is None else [product, low]
    old = [one.node.outputs[0] for one in taken]
    new = [onnx_ir.Value(name=value.name, shape=value.shape, type=value.type) for value in old]
    inputs = [product.x, *(one.weight for one in taken)]
    made = onnx_ir.node("SkinnyMatMul", inputs, {}, domain=DOMAIN, outputs=new)
    made.name = product.node.name
    first = next(node for node in model.graph if any(node is one.node for one in taken))
    model.graph.insert_before(first, made)
    for before, after in zip(old, new, strict=True):
        before.name = f"{before.name}_replaced"
        onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    model.graph.remove([one.node for one in taken], safe=True)


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
