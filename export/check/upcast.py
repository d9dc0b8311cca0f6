"""An ONNX graph with float32 in place of bfloat16: to run it where there are no bfloat16 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flora_fx.errors import require

__all__ = ["save_in_float32"]


def save_in_float32(graph: Path, copy: Path, *, data: str) -> None:
    """Write a copy of a graph in which every bfloat16 is a float32, casts included.

    Args:
        graph: the graph.
        copy: the copy.
        data: name of the copy's file of weights, beside it.
    """
    ir = require("onnx_ir", "onnx")
    model = ir.load(graph)
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype") and attribute.value == narrow:
                node.attributes[name] = ir.AttrInt64(name, wide.value)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == narrow:
                node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value, ir))
        for value in node.outputs:
            if value.dtype == narrow:
                value.dtype = wide
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype == narrow:
            value.dtype = wide
        if value.const_value is not None and value.const_value.dtype == narrow:
            value.const_value = _wide(value.const_value, ir)
    ir.save(model, copy, external_data=data)


def _wide(tensor: Any, ir: Any) -> Any:
    # Read when it is written: one weight at a time in memory.
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype("float32"), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=tensor.shape,
        name=tensor.name,
    )
