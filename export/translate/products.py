"""How the products of a graph in the operators of ``flora_ort`` have their weights, by provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .aligned_packs import align_packs
from .skinny_products import use_skinny_products

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["arrange_products"]


def arrange_products(model: onnx_ir.Model, provider: str) -> None:
    """On CUDA in the operator for few rows, where there is one for their dtype; others end at a line of memory.

    Args:
        model: in our operators already; changed in place.
        provider: what it will run on.
    """
    if provider == "CUDAExecutionProvider":
        use_skinny_products(model)
    align_packs(model)
