"""Scales that Dynamo hands over as symbols: with ``dynamic=True``, and where a float or a size has changed once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.backend import last_report
from tests.adapters import D_IN
from tests.training.tuned import (
    assert_equal,
    assert_right,
    backward,
    compilations,
    compiled,
    fused_report,
    inputs,
    net,
    no_compilation,
    twin,
)

Form = Callable[["Two", Tensor, Any, Any], Tensor]

SCALES: dict[str, Form] = {
    "after": lambda m, x, s, t: m.w(x) + m.b(m.a(x)) * s,
    "before, operands swapped": lambda m, x, s, t: s * m.b(m.a(x)) + m.w(x),
    "between": lambda m, x, s, t: m.w(x) + m.b(m.a(x) * s),
    "divided": lambda m, x, s, t: m.w(x) + m.b(m.a(x)) / s,
    "divided between": lambda m, x, s, t: m.w(x) + m.b(torch.div(m.a(x), s)),
    "alpha by rank": lambda m, x, s, t: m.w(x) + m.b(m.a(x)) * (s / t),
    "alpha of add": lambda m, x, s, t: torch.add(m.w(x), m.b(m.a(x)), alpha=s),
    "alpha of sub": lambda m, x, s, t: m.w(x).sub(m.b(m.a(x)), alpha=s),
    "subtracted, negated": lambda m, x, s, t: m.w(x) - -(m.b(m.a(x)) * s),
    "with a constant": lambda m, x, s, t: m.w(x) + 0.3 * m.b(m.a(x)) * s,
    "with another": lambda m, x, s, t: m.w(x) + m.b(m.a(x) * t) * s,
    "with a scale per token": lambda m, x, s, t: m.w(x) + m.b(m.a(x)) * s * x[..., :1],
    "two adapters": lambda m, x, s, t: m.w(x) + m.b(m.a(x)) * s + m.b2(m.a2(x)) * t,
    "two adapters, one of a constant": lambda m, x, s, t: m.w(x) + m.b(m.a(x)) * 0.3 + m.b2(m.a2(x)) * s,
    "two adapters added first": lambda m, x, s, t: m.w(x) + (m.b(m.a(x)) * s + m.b2(m.a2(x)) * t),
    "two adapters scaled together": lambda m, x, s, t: m.w(x) + (m.b(m.a(x)) * t - m.b2(m.a2(x))) / s,
    "two adapters, alpha inside": lambda m, x, s, t: m.w(x) + torch.add(m.b(m.a(x)), m.b2(m.a2(x)), alpha=s) * t,
}


class Two(nn.Module):
    """One projection, and one adapter or two with biases at their ends; the scales come with each call."""

    def __init__(self, form: Form, bias: bool = False) -> None:
        super().__init__()
        self.form = form
        self.w = nn.Linear(D_IN, 10)
        self.a, self.b = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10, bias=bias)
        self.a2, self.b2 = nn.Linear(D_IN, 5, bias=False), nn.Linear(5, 10, bias=bias)

    def forward(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return self.form(self, x, s, t)


def dynamic(model: nn.Module, **options: str) -> Any:
    """The model under our backend, with symbols for all that may change."""
    given = {"flora.inner": "aot_eager", **options}
    return torch.compile(model, backend="flora", options=given, fullgraph=True, dynamic=True)


def assert_follows(call: Any, model: nn.Module, adapters: int, kinds: type = float, graphs: int = 1) -> None:
    """All values of the scales, with gradients where the model has any, from one graph."""
    x, plain = inputs(), twin(model)
    for s, t in [(0.3, 2.5), (-1.5, 0.7), (8.25, 3.5)] if kinds is float else [(3, 7), (16, 8), (5, 2)]:
        assert_equal(call(x, s, t), plain(x, s, t))
        fused_report(adapters)
        if any(p.requires_grad for p in model.parameters()):
            model.zero_grad(), plain.zero_grad()
            backward(call, x, s, t), backward(plain, x, s, t)
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if q.grad is not None and p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert compilations() == graphs


@pytest.mark.parametrize("name", SCALES)
def test_a_symbolic_scale_fuses_as_a_constant_does(name: str) -> None:
    model = Two(SCALES[name]).double().eval().requires_grad_(False)
    adapters = 2 if name.startswith("two") else 1
    assert_follows(dynamic(model), model, adapters)
    report = fused_report(adapters)
    assert not report.declines
    assert report.ops_after["gemm"] == 1 + adapters  # [W; A], and each B


@pytest.mark.parametrize("name", ["divided", "two adapters, one of a constant", "two adapters scaled together"])
@pytest.mark.parametrize("options", [{"flora.up": "block_diagonal"}, {"flora.layout": "ahead"}], ids=str)
def test_layouts_under_a_symbolic_scale(name: str, options: dict[str, str]) -> None:
    model = Two(SCALES[name]).double().eval().requires_grad_(False)
    adapters = 2 if name.startswith("two") else 1
    graphs = 2 if "flora.layout" in options else 1  # Dynamo guards strides, and B's change when they become columns
    assert_follows(dynamic(model, **options), model, adapters, int, graphs)
    report = fused_report(adapters)
    assert not report.declines
    # Ahead: the A's, and [W, B, B2].
    assert report.ops_after["gemm"] == (2 if "flora.layout" in options else 1 + adapters)


@pytest.mark.parametrize("name", SCALES)
def test_gradients_under_a_symbolic_scale(name: str) -> None:
    model = Two(SCALES[name], bias="between" not in name and "another" not in name).double().train()
    model.w.requires_grad_(False)
    assert_follows(dynamic(model), model, 2 if name.startswith("two") else 1)
    assert last_report().packs  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [False, True])
def test_scales_of_siblings_differ(training: bool) -> None:
    """q, k, v read one value: the symbols of v stand behind the first GEMM in Dynamo's graph. Lengths are free, too."""
    model = net().train(training)
    if not training:
        model.requires_grad_(False)
    call = dynamic(model, **{"flora.up": "block_diagonal"})
    for length in (5, 9):
        x = inputs(2, length)
        assert_equal(call(x), twin(model)(x))
        if training:
            assert_right(call, model, x)
    report = fused_report(3)
    assert not report.declines
    assert report.ops_after["gemm"] == 6  # [q; k; v; A_q; A_v], B_q, B_v, [o; A_o], B_o, head
    assert compilations() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_symbolic_scale_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = Two(SCALES["after"]).to(dtype).eval().requires_grad_(False)
    x, call = inputs(4, dtype=dtype), dynamic(model)
    found, exact = call(x, 0.3, 2), copy.deepcopy(model).double()(x.double(), 0.3, 2)
    fused_report(1)
    assert found.dtype is dtype
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_an_adapters_weight_changes(training: bool) -> None:
    """As diffusers' ``set_adapters(names, weights)`` and PEFT's ``set_scale`` do: two graphs for all values."""
    model, x = net().train(training), inputs()
    call = compiled(model)
    for weight in (1.0, 0.5, 0.7, -2.0, 1.0):
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", weight)
        assert_right(call, model, x)
        fused_report(3)
        assert not last_report().declines  # type: ignore[union-attr]
    assert compilations() == 2
    with no_compilation():
        call(x)


def test_a_scale_made_of_sizes_is_found_in_an_exported_program() -> None:
    class Scaled(Two):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.w(x) + self.b(self.a(x)) / x.shape[0] + self.b2(self.a2(x)) * (1.5 * x.shape[0])

    model = Scaled(SCALES["after"]).double().eval().requires_grad_(False)
    rows = torch.export.Dim("rows", min=2, max=50)
    program = torch.export.export(model, (inputs(4),), dynamic_shapes={"x": {0: rows}})
    for graph in (program, program.module()):
        for config in (FuseConfig(), FuseConfig(fold_scale=True), FuseConfig(layout="ahead", up="per_projection")):
            fused = flora_fx.fuse(graph, config=config)
            report = flora_fx.report(fused)
            assert len(report.fused) == 2
            assert not report.declines
            run = fused if isinstance(fused, GraphModule) else fused.module()
            for count in (4, 7):
                x = inputs(count)
                assert_equal(run(x), model(x))


def test_a_number_that_is_computed_from_a_tensor_is_applied_where_it_stands() -> None:
    class Gated(Two):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            y = self.w(x)
            return y + self.b(self.a(x)) * y.sum().item()

    model = Gated(SCALES["after"]).double().eval().requires_grad_(False)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        call = compiled(model)
        for _ in range(2):
            x = inputs(4)
            torch.testing.assert_close(call(x), model(x), rtol=1e-10, atol=1e-10)
    fused_report(1)


def test_a_number_of_an_input_that_changes_is_taken_when_it_is_asked_for() -> None:
    class Counted(Two):
        def forward(self, x: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
            y = self.w(x)
            count.add_(1.5)
            return y + self.b(self.a(x)) * count.item()

    model = Counted(SCALES["after"]).double().eval().requires_grad_(False)
    counts = [torch.tensor(0.5, dtype=torch.float64) for _ in range(2)]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        call = compiled(model, "eager")  # aot_eager itself loses the change (torch 2.13)
        for _ in range(2):
            x = inputs(4)
            assert_equal(call(x, counts[0]), model(x, counts[1]))
            assert_equal(*counts)
    fused_report(1)


def test_what_is_no_number_is_still_declined_beside_symbols() -> None:
    def form(m: Two, x: Tensor, s: Any, t: Any) -> Tensor:
        return m.w(x) + m.b(m.a(x)) * s * x[..., :10]

    model = Two(form).double().eval().requires_grad_(False)
    x = inputs(4)
    assert_equal(dynamic(model)(x, 0.3, 2), model(x, 0.3, 2))
    report = last_report()
    assert report is not None
    assert [decline.reason for decline in report.declines] == [Reason.SCALE_NOT_SCALAR]
