"""`verify` finds an error, and finds none where there is none; in float64, whatever the model's dtype."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import flora_fx
from tests.adapters import D_IN, Siblings
from tests.architectures import example_inputs, lora_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_verifies_against_its_graph_and_against_the_model(dtype: torch.dtype) -> None:
    model = lora_model("llama").to(dtype)
    inputs = example_inputs("llama")
    pointers = [p.data_ptr() for p in model.parameters()]
    graph = flora_fx.capture(model, **inputs)
    fused = flora_fx.fuse(graph)
    for original in (graph, model):
        result = flora_fx.verify(original, fused, **inputs)
        assert result.max_rel < 1e-10
        assert result.outputs == 1 + 2 * 2  # logits, and keys and values of two layers
        assert "float64" in str(result)
    assert next(model.parameters()).dtype == dtype
    assert len(pointers) == len(list(model.parameters()))


def test_it_warns_of_nothing() -> None:
    graph = flora_fx.capture(Siblings().eval().requires_grad_(False), torch.randn(4, D_IN))
    fused = flora_fx.fuse(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flora_fx.verify(graph, fused, torch.randn(4, D_IN))


def test_an_error_is_found() -> None:
    model = Siblings().eval().requires_grad_(False)
    x = torch.randn(4, D_IN)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    wrong = copy.deepcopy(model)
    wrong.v_b.weight.mul_(1 + 1e-6)
    result = flora_fx.verify(wrong, fused, x)
    assert 1e-9 < result.max_rel < 1e-4
    assert result.max_abs > 0


def test_exported_programs_verify() -> None:
    model = Siblings().eval().requires_grad_(False)
    x = torch.randn(4, D_IN)
    program = torch.export.export(model, (x,))
    assert flora_fx.verify(program, flora_fx.fuse(program), x).max_rel < 1e-12


class Returning(nn.Module):
    def __init__(self, value: float, size: int = 2) -> None:
        super().__init__()
        self.value, self.size = value, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((self.size,), self.value) + 0 * x.sum()


def test_nan_on_one_side_is_a_difference_and_equal_infinities_are_none() -> None:
    x = torch.ones(1)
    assert flora_fx.verify(Returning(float("nan")), Returning(1.0), x).max_abs > 1e300
    assert flora_fx.verify(Returning(float("-inf")), Returning(float("-inf")), x).max_abs == 0
    assert flora_fx.verify(Returning(float("nan")), Returning(float("nan")), x).max_abs == 0


def test_what_cannot_be_compared_says_why() -> None:
    with pytest.raises(ValueError, match=r"different shapes: \[\[2\]\] and \[\[3\]\]"):
        flora_fx.verify(Returning(1.0), Returning(1.0, 3), torch.ones(1))
    with pytest.raises(ValueError, match=r"no floating-point tensor"):
        flora_fx.verify(nn.Flatten(0), nn.Flatten(0), torch.ones(2, dtype=torch.long))
