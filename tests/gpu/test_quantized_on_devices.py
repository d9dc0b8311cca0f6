"""Quantized bases on a GPU as on a CPU: the same numbers from the same codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import flora_fx
from flora_fx.backend import flora
from flora_fx.quantized.formats.live import with_quantized_linears
from tests.gpu.places import DEVICES
from tests.quantized.test_fusing import Adapted, K, of_kind


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["act-order", "8 bits", "nf4"])
def test_codes_stand_for_the_same_numbers_and_fuse(device: str, kind: str) -> None:
    model = Adapted(of_kind(kind))
    x = torch.randn(2, 5, K, dtype=torch.float64)
    held, expected = [layer.quantized.dequantize() for layer in (model.q, model.k, model.v)], model.in_float64(x)
    moved = model.to(device)
    for layer, wanted in zip((moved.q, moved.k, moved.v), held, strict=True):
        assert layer.codes.device.type == device
        assert torch.equal(layer.quantized.dequantize().cpu(), wanted)
    graph = flora_fx.capture(moved.double(), x.to(device))
    fused = flora_fx.fuse(graph)
    assert flora_fx.report(fused).declines == ()
    torch.testing.assert_close(fused(x.to(device)).cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_the_adapters(device: str) -> None:
    model = Adapted(of_kind("nf4")).double().to(device)
    x = torch.randn(2, 5, K, dtype=torch.float64, device=device)
    names = [name for name, _ in model.named_parameters() if name[1:] in ("_a", "_b")]
    trained = [model.get_parameter(name).requires_grad_(True) for name in names]
    wanted = torch.autograd.grad(model(x).square().sum(), trained)
    compiled: Any = torch.compile(model, backend=flora, fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), trained)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("features", [128, 96])
def test_bitsandbytes_own_dequantization_is_met_bit_for_bit(device: str, kind: str, features: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(features, 64, bias=False, quant_type=kind, compress_statistics=True).to(device)
    found: Any = with_quantized_linears(torch.nn.Sequential(layer)).model[0]  # type: ignore[index]
    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size(
        [1, 64 * features]
    )  # where blocks go across rows, its CPU kernel needs them in one (0.50.2)
    wanted = bnb.functional.dequantize_4bit(layer.weight.data, state).reshape(64, features)
    assert torch.equal(found.quantized.dequantize(), wanted)
