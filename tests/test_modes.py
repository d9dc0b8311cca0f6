"""What stands in different modes is never packed together: autocast, recording of gradients, detached values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import Reason
from flora_fx.backend import flora, last_report
from flora_fx.graph.program import open_program
from flora_fx.passes.analysis.modes import find_regions
from flora_fx.passes.analysis.mutation import find_effects
from flora_fx.passes.context import Context
from tests.adapters import D_IN, FORMS, Adapted

Form = Callable[[Adapted, Tensor], Tensor]


def compiled(model: nn.Module, inner: str = "aot_eager") -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=flora, fullgraph=True, options={"flora.inner": inner})


def results(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of the input and of all parameters."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = function(x)
    y.double().sin().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **gradients}


def base_outside_of_no_grad(m: Adapted, x: Tensor) -> Tensor:
    with torch.no_grad():
        delta = m.b(m.a(x))
    return m.w(x) + delta * 0.3


def adapter_outside_of_no_grad(m: Adapted, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.w(x)
    return y + m.b(m.a(x)) * 0.3


def detached_read(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + m.b(m.a(x.detach())) * 0.3


def detached_weight(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + m.b(torch.nn.functional.linear(x, m.a.weight.detach())) * 0.3


@pytest.mark.parametrize(
    "form", [base_outside_of_no_grad, adapter_outside_of_no_grad, detached_read, detached_weight, FORMS["peft"]]
)
def test_gradients_stop_where_they_stopped(form: Form) -> None:
    model = Adapted(form).double().eval()
    x = torch.randn(3, D_IN, dtype=torch.float64)
    expected = results(model, model, x)
    found = results(compiled(model), model, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert all(not value.any() for name, value in found.items() if name not in expected)


def test_a_path_across_a_switch_is_declined() -> None:
    model = Adapted(base_outside_of_no_grad).double().eval()
    compiled(model)(torch.randn(3, D_IN, dtype=torch.float64))
    report = last_report()
    assert report is not None
    assert [decline.reason for decline in report.declines] == [Reason.OTHER_MODE]
    assert not report.packs


def autocast_inside(m: Adapted, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.w(x) + m.b(m.a(x.float())) * 0.3


def autocast_for_the_base(m: Adapted, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.w(x)
    return y + (m.b(m.a(x.float())) * 0.3)


@pytest.mark.parametrize(("form", "fused"), [(autocast_inside, True), (autocast_for_the_base, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner"), [(1, "aot_eager"), (3, "aot_eager"), (1, "inductor")])
def test_autocast_computes_what_it_computed(form: Form, fused: bool, dtype: torch.dtype, rows: int, inner: str) -> None:
    model = Adapted(form).eval()
    x = torch.randn(rows, D_IN, dtype=dtype)
    with torch.no_grad():
        expected, found = model(x), compiled(model, inner)(x)
    assert found.dtype == expected.dtype
    reference = model.double()
    wide = reference.w(x.double()) + reference.b(reference.a(x.double())) * 0.3
    assert (found - wide).abs().max() <= 1.5 * (expected - wide).abs().max() + 1e-2
    report = last_report()
    assert report is not None
    assert bool(report.fused) == fused, str(report)


def test_autocast_around_the_call_is_seen() -> None:
    model = Adapted(FORMS["peft"]).eval()
    x = torch.randn(3, D_IN)
    function = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(function, model, x)
        expected = results(model, model, x)
    report = last_report()
    assert report is not None
    assert report.fused
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert (found[name] - value).abs().max() <= 3e-2 * value.abs().max(), name


def test_a_mask_that_base_and_adapter_share_is_one_read() -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        x = m.drop(x)
        return m.w(x) + m.b(m.a(x)) * 0.3

    model = Adapted(form).double().train()
    x = torch.randn(30, D_IN, dtype=torch.float64)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    assert flora_fx.report(fused).fused == ("b.weight",)
    torch.manual_seed(3)
    expected = results(model, model, x)
    torch.manual_seed(3)
    for name, value in results(fused, model, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_regions_are_counted_and_and_is_no_switch_nor_a_write() -> None:
    def function(x: Tensor, mask: Tensor) -> Tensor:
        both = mask & (x > 0)
        with torch.no_grad():
            y = x * 2
        return torch.where(both, x, y)

    seen: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        seen.append(graph)
        return graph

    torch.compile(function, backend=backend, fullgraph=True)(torch.ones(2, requires_grad=True), torch.ones(2) > 0)
    context = Context(open_program(seen[0]), flora_fx.FuseConfig())
    regions = find_regions(context)
    assert sorted(set(regions.values())) == [0, 1, 2]
    assert not find_effects(context).touched
