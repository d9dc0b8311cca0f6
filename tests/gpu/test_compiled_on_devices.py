"""The backend on a GPU as on a CPU: training, A and B that change in place, also in CUDA graphs; autocast."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx.backend import flora, last_report
from tests.adapters import D_IN, Siblings
from tests.gpu.places import DEVICES, on_gpu

WAYS = [
    ("cpu", "aot_eager"),
    on_gpu("cuda", "aot_eager"),
    on_gpu("cuda", "inductor"),
    on_gpu("cuda", "reduce-overhead"),
]
"""Device, and what compiles the fused graph; ``reduce-overhead`` is Inductor with CUDA graphs."""


def compiled(module: nn.Module, way: str, backend: Any = flora) -> Callable[[Tensor], Tensor]:
    how = {"mode": way} if way == "reduce-overhead" else {"options": {"flora.inner": way}} if backend is flora else {}
    torch._dynamo.utils.counters.clear()
    found: Callable[[Tensor], Tensor] = torch.compile(module, backend=backend, fullgraph=True, **how)
    return found


def model_on(device: str) -> nn.Module:
    """Three adapters, in float64; all else is frozen."""
    model = Siblings().double().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_" in name)
    return model


def inputs(device: str) -> Tensor:
    return torch.randn(3, D_IN, dtype=torch.float64).to(device)


def assert_no_graph_was_skipped() -> None:
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize(("device", "way"), WAYS)
def test_training(device: str, way: str) -> None:
    model = model_on(device)
    twin, call = copy.deepcopy(model), compiled(model, way)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1) for m in (model, twin)]
    for _ in range(5):  # CUDA graphs are recorded in the second, and replayed from the third on
        x = inputs(device)
        torch.compiler.cudagraph_mark_step_begin()
        found, expected = call(x).square().mean(), twin(x).square().mean()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        found.backward()
        expected.backward()
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None) == ("_" not in name), name
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    report = last_report()
    assert report is not None
    assert len(report.fused) == 3
    assert_no_graph_was_skipped()


@pytest.mark.parametrize("form", ["backend", "captured"])
@pytest.mark.parametrize(("device", "way"), WAYS)
@torch.no_grad()
def test_adapters_that_change_in_place(device: str, way: str, form: str) -> None:
    model, x = model_on(device), inputs(device)
    if form == "backend":
        call = compiled(model, way)
    else:
        fused = flora_fx.fuse(flora_fx.capture(model, x))
        call = compiled(fused, way, backend="aot_eager" if way == "aot_eager" else "inductor")
    seen = []
    for step in range(5):
        if step:
            for name, parameter in model.named_parameters():
                if "_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        torch.compiler.cudagraph_mark_step_begin()
        found, expected = call(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        seen.append(expected)
    assert not any(torch.allclose(one, other) for one, other in itertools.pairwise(seen))
    assert_no_graph_was_skipped()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    """Judged by the distance to float64, since which roundings happen differs between the two."""
    exact = model_on(device)
    model, x = copy.deepcopy(exact).float(), inputs(device)
    twin, call = copy.deepcopy(model), compiled(model, "aot_eager")
    with torch.autocast(device, torch.bfloat16):
        found, expected = call(x.float()), twin(x.float())
    assert found.dtype == expected.dtype
    wanted = exact(x)

    def error(value: Tensor, of: Tensor) -> float:
        return float((value.detach().double() - of.detach()).norm() / of.detach().norm())

    for value in (found.float(), expected.float(), wanted):
        value.square().mean().backward()
    assert error(found, wanted) <= 2 * error(expected, wanted) + 1e-3
    for (name, ours), theirs, best in zip(model.named_parameters(), twin.parameters(), exact.parameters(), strict=True):
        if best.grad is not None:
            assert ours.grad is not None, name
            assert theirs.grad is not None, name
            assert error(ours.grad, best.grad) <= 2 * error(theirs.grad, best.grad) + 1e-3, name
    report = last_report()
    assert report is not None
    assert len(report.fused) == 3
