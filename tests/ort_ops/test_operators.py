"""The operators on ONNX Runtime's CPU, and their GPU's grid run here, against plain torch in float64."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.ort_ops.draws import ELEMENTS, OPERATORS, Drawn, draw, error, model
from tests.ort_ops.emulated import emulated, planned

CALLS = 40


def run(call: Drawn, options: Any) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model(call), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in call.inputs.items() if value is not None}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]


def calls(name: str) -> Iterator[Drawn]:
    return (draw(name, torch.float32, seed) for seed in range(CALLS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_against_the_oracle(name: str, dtype: torch.dtype, options: Any) -> None:
    for seed in range(CALLS):
        call = draw(name, dtype, seed)
        for found, expected in zip(run(call, options), call.expected(), strict=True):
            assert found.shape == expected.shape
            assert error(found, expected) < 1, (seed, call.attributes)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_grid_of_a_gpu_against_the_oracle(name: str, dtype: torch.dtype, code: ctypes.CDLL) -> None:
    plans: Counter[tuple[int, ...]] = Counter()
    for seed in range(2 * CALLS):
        call = draw(name, dtype, seed)
        plans[planned(call, code)] += 1
        for found, expected in zip(emulated(call, code), call.expected(), strict=True):
            assert error(found, expected) < 1, (seed, call.attributes)
    assert {plan[:3] for plan in plans} == {
        (wide, wide_z, tile) for wide, wide_z in ((0, 0), (1, 0), (1, 1)) for tile in (1, 4)
    }, "each kernel but those of wide norms was met"


@pytest.mark.parametrize(("columns", "keep"), [(2048, 1), (8 * 1024, 4), (16 * 1024, 4), (16 * 1024 + 8, 0)])
def test_wide_norms(columns: int, keep: int, code: ctypes.CDLL) -> None:
    numbers = torch.Generator().manual_seed(columns)
    p, b, gamma, skip = (
        torch.randn(sizes, generator=numbers).half()
        for sizes in ((3, columns + 8), (8, columns), (columns,), (3, columns))
    )
    attributes = {"start": 0, "width": columns, "group": columns, "epsilon": 1e-6}
    attributes |= {"blocks": [0, columns, 0, 8, 0], "z_start": columns}
    inputs: dict[str, Tensor | None] = {"p": p, "B": b, "gamma": gamma, "skip": skip, "bias": None, "z": None}
    call = Drawn("LoraSkipRMSNorm", inputs, attributes)
    assert planned(call, code) == (1, 1, 1, keep, 0)
    for found, expected in zip(emulated(call, code), call.expected(), strict=True):
        assert error(found, expected) < 1


def test_other_adapters_stay_apart(options: Any) -> None:
    """A low-rank value that overflowed is no number times another adapter's zeros."""
    inputs: dict[str, Tensor | None] = {"p": torch.tensor([[1.0, 2.0, torch.inf, 3.0]]), "B": torch.eye(2)}
    attributes = {"parts": [0, 2], "blocks": [0, 1, 0, 1, 0, 1, 2, 1, 2, 1], "z_start": 2}
    found = run(Drawn("LoraAdd", {**inputs, "bias": None, "z": None}, attributes), options)
    assert found[0].tolist() == [[torch.inf, 5.0]]


@pytest.mark.parametrize("name", OPERATORS)
def test_no_rows(name: str, options: Any) -> None:
    call = draw(name, torch.float32, 3, rows=(0, 2))
    assert run(call, options)[0].shape == (0, 2, call.width)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("LoraAdd", {"blocks": [0, 1, 0]}, "blocks has 3 numbers; it must have 5 each"),
        ("LoraAdd", {"blocks": [0, 1, 0, 1, 0] * 17}, "at most 16"),
        ("LoraAdd", {"blocks": [0, 2, 0, 1, 0, 1, 3, 0, 1, 0]}, "blocks overlap"),
        ("LoraAdd", {"blocks": [2, 1, 0, 1, 0]}, "a block ends before it begins"),
        ("LoraAdd", {"blocks": [0, 1, 0, 99, 0]}, "a block reaches beyond B"),
        ("LoraAdd", {"blocks": [0, 1, 0, 1, 9999]}, "a block reaches beyond B"),
        ("LoraAdd", {"blocks": [9998, 9999, 0, 1, 0]}, "a block reaches beyond p"),
        ("LoraAdd", {"blocks": [0, 1, -1, 1, 0]}, "out of range"),
        ("LoraAdd", {"parts": [9999, 1]}, "a part reaches beyond p"),
        ("LoraAdd", {"parts": [0, 0]}, "a part has no columns"),
        ("LoraAdd", {"parts": [0, 1] * 9}, "at most 8"),
        ("LoraAdd", {"z_start": 9999}, "z reaches beyond p"),
        ("LoraSwiGLU", {"up": 9999}, "a part reaches beyond p"),
        ("LoraSwiGLU", {"width": 0}, "width is 0"),
        ("LoraSwiGLU", {"activation": "relu"}, "silu, gelu or gelu_tanh"),
        ("LoraSkipRMSNorm", {"group": 9999}, "width is not a multiple of group"),
    ],
)
def test_attributes_that_cannot_be(name: str, change: dict[str, Any], said: str, options: Any) -> None:
    call = next(call for call in calls(name) if call.inputs["z"] is None and call.inputs["ids"] is None)
    call.attributes.update(change)
    with pytest.raises(Exception, match=said):
        run(call, options)


@pytest.mark.parametrize(
    ("name", "of", "said"),
    [
        ("LoraAdd", "z", "z does not have"),
        ("LoraAdd", "bias", "bias does not have"),
        ("LoraSkipRMSNorm", "gamma", "gamma does not have"),
        ("LoraSkipRMSNorm", "skip", "skip has another shape"),
    ],
)
def test_shapes_that_cannot_be(name: str, of: str, said: str, options: Any) -> None:
    call = next(call for call in calls(name) if call.inputs[of] is not None)
    value = call.inputs[of]
    assert value is not None
    call.inputs[of] = value[..., :-1].contiguous()
    with pytest.raises(Exception, match=said):
        run(call, options)
