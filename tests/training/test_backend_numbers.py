"""Fused training computes what unfused training computes: losses, gradients, optimizer steps, masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import flora_fx
from tests.adapters import Siblings
from tests.architectures import example_inputs
from tests.training.tuned import (
    assert_same_gradients,
    assert_trains_as,
    backward,
    compiled,
    family,
    fused_report,
    inputs,
    loss,
    net,
    twin,
)

FAMILIES = {"llama": 14, "qwen3": 14, "gpt2": 8, "bert": 13}
"""Their adapters that are run: 7, 4 or 6 a layer, two layers, and BERT's pooler."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compiled_model_trains_as_the_unfused_one(name: str) -> None:
    model = family(name)
    reference, call = twin(model), compiled(model)
    for shift in range(2):  # the second time nothing is compiled or tied
        arguments = example_inputs(name)
        arguments["input_ids"] = (arguments["input_ids"] + shift) % 97
        assert_trains_as(call, model, reference, **arguments)
    assert not fused_report(FAMILIES[name]).declines


@pytest.mark.parametrize("name", FAMILIES)
def test_a_captured_graph_trains_as_the_unfused_one(name: str) -> None:
    model, arguments = family(name), example_inputs(name)
    reference = twin(model)
    fused = flora_fx.fuse(flora_fx.capture(model, **arguments))
    assert len(flora_fx.report(fused).fused) == FAMILIES[name]
    assert_trains_as(fused, model, reference, **arguments)
    assert_trains_as(fused, model, reference, **arguments)


def test_a_symbolic_trace_trains_as_the_unfused_one() -> None:
    model = Siblings().double()  # PEFT's own layers do not trace symbolically
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("_" in key)
    reference, x = twin(model), inputs()
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    assert len(flora_fx.report(fused).fused) == 3
    assert_trains_as(fused, model, reference, x)


def test_gradients_of_the_input_flow_beside_those_of_the_adapters() -> None:
    model = net()
    reference, call = twin(model), compiled(model)
    x, y = (inputs(2, 5).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    loss(call(x)).backward()
    loss(reference(y)).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    assert_same_gradients(model, reference)


def test_inductor_trains_as_the_unfused_one() -> None:
    model, x = net(), inputs()
    reference, call = twin(model), torch.compile(model, backend="flora", fullgraph=True)
    assert_trains_as(call, model, reference, x)
    assert_trains_as(call, model, reference, inputs())
    fused_report(3)


def test_inductor_trains_a_transformer() -> None:
    """Its norms and rotations are float32 inside, where Inductor alone differs from eager by 3e-7 too (torch 2.13)."""
    model, arguments = family("llama"), example_inputs("llama")
    reference, call = twin(model), torch.compile(model, backend="flora", fullgraph=True)
    found, expected = backward(call, **arguments), backward(reference, **arguments)
    assert abs(found - expected) <= 1e-5 * abs(expected)
    assert_same_gradients(model, reference, rtol=1e-5)
    fused_report(14)


@pytest.mark.parametrize(
    ("up", "accumulate"), [("block_diagonal", "addmm"), ("per_projection", "addmm"), ("per_projection", "unrolled")]
)
@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_every_form_trains_as_the_unfused_one(layout: str, up: str, accumulate: str) -> None:
    model = net()
    options = {"flora.layout": layout, "flora.up": up, "flora.accumulate": accumulate}
    assert_trains_as(compiled(model, **options), model, twin(model), inputs())
    fused_report(3)


@pytest.mark.parametrize(("name", "option"), [("llama", "fused"), ("gpt2", "fused"), ("gpt2", "foreach")])
def test_ten_steps_of_adamw_leave_the_base_bitwise_alone(name: str, option: str) -> None:
    model = family(name).float()
    reference, call = twin(model), compiled(model)
    before = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    modules: list[tuple[Any, Any]] = [(model, call), (reference, reference)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, **{option: True}) for m, _ in modules]
    for _ in range(10):
        arguments = example_inputs(name)
        for (_, run), optimizer in zip(modules, optimizers, strict=True):
            loss(run(**arguments)).div(arguments["input_ids"].numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if key in before:
            assert torch.equal(parameter, before[key]), key
            assert parameter.grad is None, key
            assert parameter not in optimizers[0].state, key
        else:
            torch.testing.assert_close(parameter, expected[key], rtol=0, atol=1e-6, msg=key)


def _bias_all(model: Any) -> None:
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key or key.endswith("bias"))


def _freeze_a(model: Any) -> None:
    model.base_model.model.q.lora_A["default"].requires_grad_(False)
    model.base_model.model.v.lora_B["default"].requires_grad_(False)


def _train_one_base(model: Any) -> None:
    model.base_model.model.q.base_layer.weight.requires_grad_(True)
    model.base_model.model.k.bias.requires_grad_(True)


def _train_k_alone(model: Any) -> None:
    model.requires_grad_(False)
    model.base_model.model.k.requires_grad_(True)


MASKS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "bias='all'": ({"bias": "all"}, lambda model: None),
    "bias='lora_only'": ({"bias": "lora_only"}, lambda model: None),
    "every bias by hand": ({}, _bias_all),
    "a frozen A and a frozen B": ({}, _freeze_a),
    "modules_to_save": ({"modules_to_save": ["head"]}, lambda model: None),
    "a base weight and a bias": ({}, _train_one_base),
    "all": ({}, lambda model: model.requires_grad_(True)),
    "only what is not adapted": (
        {},
        lambda model: [model.requires_grad_(False), model.base_model.model.k.requires_grad_()],
    ),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_requires_grad_alone(mask: str) -> None:
    options, change = MASKS[mask]
    model = net(**options)
    change(model)
    reference, x = twin(model), inputs()
    assert_trains_as(compiled(model), model, reference, x)
    fused_report(3)
    assert_trains_as(flora_fx.fuse(flora_fx.capture(model, x)), model, reference, x)


def test_a_mask_that_changes_is_followed() -> None:
    model = net()
    call, x = compiled(model), inputs()
    for change in (_freeze_a, _train_one_base, _bias_all, lambda model: model.base_model.model.o.requires_grad_(False)):
        model.zero_grad()
        change(model)
        assert_trains_as(call, model, twin(model), x)


def test_a_captured_graph_fused_for_inference_refuses_to_train_its_packs() -> None:
    model, x = net().requires_grad_(False), inputs()
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    model.requires_grad_(True)
    with pytest.raises(flora_fx.TieError, match=r"fuse the graph again now"):
        fused(x)


class Conv(nn.Module):
    """Conv1D of GPT-2: [in, out] weights, that pack transposed."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c = Conv1D(10, 12)
        self.a, self.b = nn.Linear(12, 3, bias=False), nn.Linear(3, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(x) + 0.7 * self.b(self.a(x))


def test_a_trained_conv1d_gets_its_gradient_transposed() -> None:
    model = Conv().double()
    assert_trains_as(compiled(model), model, twin(model), inputs())
