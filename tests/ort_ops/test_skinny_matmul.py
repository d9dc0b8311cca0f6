"""SkinnyMatMul on ONNX Runtime's CPU, and its GPU's grid run here, against plain torch in float64."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from flora_ort.reference import skinny_matmul
from tests.ort_ops.draws import ELEMENTS, error
from tests.ort_ops.emulated import aligned
from tests.ort_ops.products import Product, draw_product, product_model

CALLS = 24


def run(product: Product, options: Any) -> list[Tensor]:
    session = onnxruntime.InferenceSession(product_model(product), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in product.given().items()}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_against_the_oracle(dtype: torch.dtype, options: Any) -> None:
    seen = set()
    for seed in range(CALLS):
        product = draw_product(dtype, seed)
        seen.add((product.x[..., 0].numel() > 8, product.a is None))
        for found, expected in zip(run(product, options), product.expected(), strict=True):
            assert found.shape == expected.shape
            assert error(found, expected) < 1, seed
    assert len(seen) == 4, "few rows and many, with A and without"


class _Call(ctypes.Structure):
    """As ``csrc/skinny.h`` has it."""

    _fields_ = [
        ("element", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "w", "a", "y", "z")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("k", "n", "r")),
    ]


def emulated(product: Product, code: ctypes.CDLL, processors: int) -> list[Tensor]:
    x, w, a = (aligned(value) for value in (product.x, product.w, product.a))
    assert x is not None
    assert w is not None
    outputs = [aligned(torch.full(value.shape, torch.nan, dtype=x.dtype)) for value in product.expected()]
    places = [
        None if value is None else value.data_ptr() for value in (x, w, a, *outputs, *[None] * (2 - len(outputs)))
    ]
    rows = x[..., 0].numel()
    call = _Call([*ELEMENTS].index(x.dtype), *places, rows, x.shape[-1], len(w), 0 if a is None else len(a))
    code.flora_ort_emulate_skinny(ctypes.byref(call), processors)
    for output in outputs:
        assert output is not None
        beyond = output.as_strided((1,), (1,), output.storage_offset() + output.numel())
        assert beyond.isnan().all(), "nothing is written behind it"
    return [output for output in outputs if output is not None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processors", [1, 132])
def test_the_grid_of_a_gpu_against_the_oracle(processors: int, dtype: torch.dtype, code: ctypes.CDLL) -> None:
    """Both numbers of warps."""
    for seed in range(CALLS):
        product = draw_product(dtype, seed, kernel=True)
        for found, expected in zip(emulated(product, code, processors), product.expected(), strict=True):
            assert error(found, expected) < 1, seed


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (((1, 64), (5, 32), None), "columns of x"),
        (((1, 64), (5, 64), (3, 32)), "columns of x"),
    ],
)
def test_refusals(sizes: tuple[Any, ...], said: str, options: Any) -> None:
    x, w, a = (None if size is None else torch.ones(size, dtype=torch.float16) for size in sizes)
    assert x is not None
    assert w is not None
    with pytest.raises(Exception, match=said):
        run(Product(x, w, a), options)


def test_the_oracle() -> None:
    x, w, a = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(2, 8)
    y, z = skinny_matmul(x, w, a)
    assert torch.equal(y, torch.nn.functional.linear(x, w))
    assert z is not None
    assert torch.equal(z, torch.nn.functional.linear(x, a))
