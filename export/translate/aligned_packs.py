"""Packs that operators of our own read end where a line of a GPU's memory does.

    p = x W,  W [in, 3120]   ->   p = x W',  W' [in, 3136]: columns of zeros at the end, which nobody reads

Rows of W lie one after the other. Where one is no whole number of lines (128 bytes), all but the first begin within a
line, and a GEMM with a few rows, which does nothing but read W, reads more lines than W has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .lora_sums import bias_place, readers_of_pack, sizes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["align_packs"]

_COLUMNS = 64  # of two bytes


def align_packs(model: onnx_ir.Model) -> None:
    """Widen the weights of products that only our operators read.

    Args:
        model: in our operators already. They find their columns by number, and allow for others.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
        if weight is None or not weight.is_initializer() or weight.is_graph_input() or len(list(weight.uses())) != 1:
            continue
        readers = readers_of_pack(node.outputs[0])
        missing = -sizes(weight)[-1] % _COLUMNS
        if readers and missing and not any(map(_has_bias, readers)):
            _widen(weight, node.outputs[0], missing)


def _has_bias(node: onnx_ir.Node) -> bool:
    """Whether there is one over all columns of the pack."""
    place = bias_place(node)
    return len(node.inputs) > place and node.inputs[place] is not None


def _widen(weight: onnx_ir.Value, product: onnx_ir.Value, columns: int) -> None:
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    narrow = weight.const_value
    assert narrow is not None
    rows, width = sizes(weight)

    def widened() -> TorchTensor:
        held = narrow.raw() if isinstance(narrow, onnx_ir.LazyTensor) else narrow
        raw = held.raw if isinstance(held.raw, torch.Tensor) else torch.from_numpy(held.numpy())
        return TorchTensor(torch.nn.functional.pad(raw.detach(), (0, columns)), name=weight.name)

    weight.const_value = onnx_ir.LazyTensor(
        widened, dtype=narrow.dtype, shape=onnx_ir.Shape((rows, width + columns)), name=weight.name
    )
    weight.shape = onnx_ir.Shape((rows, width + columns))
    if product.shape is not None:
        product.shape = onnx_ir.Shape((*list(product.shape)[:-1], width + columns))
