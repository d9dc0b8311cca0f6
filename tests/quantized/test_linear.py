"""A layer over a quantized weight: its values, its gradients, its graphs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import flora_fx
from flora_fx.quantized import QuantizedLinear, QuantizedWeight

from .weights import affine, codebook

WEIGHTS = {
    "4 bits": affine(6, 32)[0],
    "act-order": affine(6, 32, ordered=True)[0],
    "8 bits, symmetric": affine(6, 37, bits=8, block=37, zeros=False)[0],
    "nf4": codebook(6, 32),
}


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest) -> QuantizedWeight:
    return WEIGHTS[request.param]


def _plain(weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    n, k = weight.shape
    plain = nn.Linear(k, n, bias is not None, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(weight.dequantize(torch.float32))
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_it_computes_what_the_dequantized_layer_does(
    weight: QuantizedWeight, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    bias = torch.randn(6)
    x = torch.randn(*shape, weight.shape[1], dtype=dtype)
    assert torch.equal(QuantizedLinear(weight, bias)(x), _plain(weight, bias, dtype)(x))
    assert torch.equal(QuantizedLinear(weight)(x), _plain(weight, None, dtype)(x))


def test_its_gradients_are_the_dequantized_layers(weight: QuantizedWeight) -> None:
    bias = torch.randn(6, dtype=torch.float64)
    layer, plain = QuantizedLinear(weight, nn.Parameter(bias)), _plain(weight, bias, torch.float64)
    x = torch.randn(2, 5, weight.shape[1], dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 5, 6, dtype=torch.float64)
    assert layer.bias is not None
    found = torch.autograd.grad((layer(x) * pull).sum(), [x, layer.bias])
    wanted = torch.autograd.grad((plain(x) * pull).sum(), [x, plain.bias])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_its_gradients_are_those_of_numbers(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight)
    x = torch.randn(3, weight.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_its_operators_are_what_torch_asks_of_them(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight, torch.randn(6))
    x = torch.randn(2, 3, weight.shape[1], requires_grad=True)
    parts: tuple[Any, ...] = (layer.codes, layer.scales, layer.zeros, layer.order)
    how = (layer.kind, layer.bits, layer.block, 6)
    torch.library.opcheck(torch.ops.flora_fx.quantized_linear, (x, *parts, layer.bias, *how))
    torch.library.opcheck(torch.ops.flora_fx.dequantized, (*parts, *how, layer.in_features, torch.float32))


def test_it_is_one_node_of_a_capture_with_lengths_that_vary(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight)
    k = weight.shape[1]
    graph = flora_fx.capture(layer, torch.randn(2, 5, k), dynamic_shapes={"input": {1: torch.export.Dim.AUTO}})
    called = [node for node in graph.graph.nodes if node.target is torch.ops.flora_fx.quantized_linear.default]
    assert len(called) == 1
    x = torch.randn(2, 9, k)
    assert torch.equal(graph(x), layer(x))
    assert flora_fx.verify(layer, graph, x).max_abs == 0.0


def test_a_compiler_takes_it_forward_and_back(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight)
    x = torch.randn(4, weight.shape[1], requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, wanted = compiled(x), layer(x)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)))


def test_another_dtype_converts_the_bias_alone(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight, torch.randn(6))
    held = {name: value.clone() for name, value in layer.named_buffers()}
    moved = copy.deepcopy(layer).to(torch.bfloat16).double().half()
    assert moved.bias is not None
    assert moved.bias.dtype == torch.float16
    for name, value in moved.named_buffers():
        assert torch.equal(value, held[name])
    assert torch.equal(moved.quantized.dequantize(), weight.dequantize())


def test_autocast_computes_in_its_dtype(weight: QuantizedWeight) -> None:
    layer, x = QuantizedLinear(weight), torch.randn(4, weight.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, layer(x.bfloat16()))


def test_copies_pickles_and_state_dicts_hold_the_same(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight, torch.randn(6))
    x = torch.randn(4, weight.shape[1])
    other = QuantizedLinear(weight, torch.randn(6))
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(same(x), layer(x))


def test_dequantized_it_is_a_plain_layer(weight: QuantizedWeight) -> None:
    layer = QuantizedLinear(weight, torch.randn(6)).eval()
    plain = layer.dequantize(torch.float32)
    assert type(plain) is nn.Linear
    assert not plain.training
    x = torch.randn(4, weight.shape[1])
    assert torch.equal(plain(x), layer(x))
    assert layer.dequantize().weight.dtype == weight.dtype


def test_it_shows_its_source_and_takes_floating_point_alone() -> None:
    layer = QuantizedLinear(affine(6, 32)[0])
    assert "by hand, 4 bits" in repr(layer)
    with pytest.raises(TypeError, match=r"not torch\.uint8"):
        layer(torch.ones(2, 32, dtype=torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_puts_a_lora_beside_it_and_merges_nothing_into_it(bits: int) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(QuantizedLinear(affine(6, 32, bits=bits)[0]), nn.LayerNorm(6))
    held = {name: value.clone() for name, value in model[0].state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False))
    x = torch.randn(4, 32)
    layer = adapted.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = model[1](layer.base_layer(x) + layer.scaling["default"] * (x @ a.t() @ b.t()))
    torch.testing.assert_close(adapted(x), wanted)
    adapted(x).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    for safe in (True, False):
        with pytest.raises(RuntimeError):
            adapted.merge_adapter(safe_merge=safe)
    assert all(torch.equal(layer.base_layer.get_buffer(name), value) for name, value in held.items())
