"""Random calls of SkinnyMatMul."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from onnx import helper
from torch import Tensor

from flora_ort.reference import skinny_matmul
from tests.ort_ops.draws import ELEMENTS

__all__ = ["Product", "draw_product", "product_model"]


@dataclass(frozen=True)
class Product:
    """A call: x [..., k], W [n, k], and A [r, k] or None."""

    x: Tensor
    w: Tensor
    a: Tensor | None

    def given(self) -> dict[str, Tensor]:
        """Inputs that are there, by name."""
        return {"x": self.x, "W": self.w} | ({} if self.a is None else {"A": self.a})

    def expected(self) -> list[Tensor]:
        """What the oracle gives in float64."""
        a = None if self.a is None else self.a.double()
        return [value for value in skinny_matmul(self.x.double(), self.w.double(), a) if value is not None]


def draw_product(dtype: torch.dtype, seed: int, *, kernel: bool = False) -> Product:
    """Any sizes, W's rows mostly no whole number of tiles.

    Args:
        dtype: of all.
        seed: of the draw.
        kernel: only sizes that the GPU's kernel takes.
    """
    sizes, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = sizes.randint(1, 8 if kernel else 20)
    shape = (rows,) if sizes.random() < 0.5 or rows % 2 else (2, rows // 2)
    k = 32 * sizes.choice([1, 3, sizes.randint(1, 40), 128]) - (0 if kernel else sizes.choice([0, 0, 5]))
    n, r = sizes.choice([1, 16, sizes.randint(1, 200)]), sizes.choice([1, 8, sizes.randint(1, 70)])
    drawn = [torch.randn(*size, k, generator=numbers) for size in (shape, (n,), (r,))]
    x, w, a = (value.to(dtype) for value in (drawn[0], drawn[1] / k**0.5, drawn[2] / k**0.5))
    return Product(x, w, a if sizes.random() < 0.6 else None)


def product_model(product: Product) -> bytes:
    """An ONNX model of that one node; outputs are named ``y`` and ``z``."""
    element, given = ELEMENTS[product.x.dtype], product.given()
    outputs = ["y", "z"][: len(given) - 1]
    node = helper.make_node("SkinnyMatMul", [*given], outputs, domain="flora_ort")
    inputs = [helper.make_tensor_value_info(name, element, list(value.shape)) for name, value in given.items()]
    graph = helper.make_graph(
        [node], "one", inputs, [helper.make_tensor_value_info(name, element, None) for name in outputs]
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("flora_ort", 1)]
    made: bytes = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return made
