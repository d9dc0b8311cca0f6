"""Packs that operators of our own read end where a line of a GPU's memory does.

    p = x W,  W [in, 3120]   ->   p = x W',  W' [in, 3136]: columns of zeros at the end, which nobody reads

Rows of W lie one after the other. Where one is no whole number of lines (128 bytes), all but the first begin within a
line, and a GEMM with a few rows, which does nothing but read W, reads more lines than W has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..directory.operators import DOMAIN
from .lora_sums import sizes

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["align_packs"]

_COLUMNS = 64  # of two bytes


def align_packs(model: onnx_ir.Model) -> int:
    """Widen the weights of products that only our operators read; how many.

    Args:
        model: in our operators already. They find their columns by number, and allow for others.
    """
    aligned = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
        product = node.outputs[0]
        if weight is None or not weight.is_initializer() or weight.is_graph_input() or len(list(weight.uses())) != 1:
            continue
        readers = list(product.uses())
        if not readers or product.is_graph_output():
            continue
        if any(use.node.domain != DOMAIN or use.idx != 0 or _has_bias(use.node) for use in readers):
            continue
        missing = -sizes(weight)[-1] % _COLUMNS
        if missing:
            _widen(weight, product, missing)
            aligned += 1
    return aligned


def _has_bias(node: onnx_ir.Node) -> bool:
    """Whether there is one over all columns of the pack."""
    place = 4 if node.op_type == "LoraSkipRMSNorm" else 2
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
