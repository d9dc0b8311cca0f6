"""The GPU's kernel for many rows, its grid run here, against plain torch in float64."""

from __future__ import annotations

import ctypes
from collections import Counter

import pytest
import torch

from tests.ort_ops.draws import draw, error
from tests.ort_ops.emulated import emulated, planned

CALLS = 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["LoraAdd", "LoraSwiGLU"])
def test_against_the_oracle(name: str, dtype: torch.dtype, code: ctypes.CDLL) -> None:
    products: Counter[int] = Counter()
    for seed in range(CALLS):
        call = draw(name, dtype, seed, rows=((67,), (5, 8), (1, 211))[seed % 3], aligned=True)
        products[planned(call, code)[4]] += 1
        for found, expected in zip(emulated(call, code), call.expected(), strict=True):
            assert error(found, expected) < 1, (seed, call.attributes)
    assert products.keys() == {1, 2, 4}


@pytest.mark.parametrize("rows", [(1,), (31,)])
def test_few_rows_are_not_its(rows: tuple[int, ...], code: ctypes.CDLL) -> None:
    assert planned(draw("LoraAdd", torch.float16, 1, rows=rows, aligned=True), code)[4] == 0


def test_float32_and_norms_are_not_its(code: ctypes.CDLL) -> None:
    assert planned(draw("LoraAdd", torch.float32, 1, rows=(64,), aligned=True), code)[4] == 0
    assert planned(draw("LoraSkipRMSNorm", torch.float16, 1, rows=(64,), aligned=True), code)[4] == 0
