"""Arithmetic in place that nobody sees but through its result: fused through, never taken for what it was before."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import flora_fx
from flora_fx import FusionReport, Reason
from flora_fx.backend import last_report
from tests.adapters import D_IN, Adapted
from tests.parallel import CONFIGS

Form = Callable[[Adapted, Tensor], tuple[Tensor, Tensor]]


def fused(form: Form) -> FusionReport:
    """Captured (with `+=` as it stands there), and trained, and compiled: all are what the model computes."""
    model = Adapted(form).double().eval()
    x = torch.randn(4, D_IN, dtype=torch.float64)

    def step(call: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        model.zero_grad()
        outputs = call(x)
        sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
        gradients = [p.grad for p in model.parameters() if p.grad is not None and p.grad.any()]
        return [output.detach() for output in outputs] + gradients

    expected = step(model)
    graph = flora_fx.capture(model.requires_grad_(False), x)
    for config in CONFIGS:
        frozen = flora_fx.fuse(graph, config=config)
        torch.testing.assert_close(list(frozen(x)), expected[:2], rtol=1e-12, atol=1e-12)
    model.requires_grad_(True)
    compiled = torch.compile(model, backend="flora", options={"flora.inner": "aot_eager"})
    for call in (flora_fx.fuse(flora_fx.capture(model, x)), compiled):
        torch.testing.assert_close(step(call), expected, rtol=1e-12, atol=1e-12)
    report, found = flora_fx.report(flora_fx.fuse(graph)), last_report()
    assert found is not None
    assert found.fused == report.fused, str(found)
    assert Counter(d.reason for d in found.declines) == Counter(d.reason for d in report.declines), str(found)
    return report


def after_the_adapter(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.w(x) + m.b(m.a(x)) * 0.3
    y /= 3.0
    return y, m.a2(x)


def after_a_cast_that_is_none(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
    y = (m.w(x) + m.b(m.a(x)) * 0.3).to(x.dtype)  # as PEFT ends
    y += torch.tanh(x).sum(-1, keepdim=True)
    return y, m.a2(x)


def the_adapter_subtracted(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.w(x)
    y -= m.b(m.a(x)) * 0.3
    return y, m.a2(x)


def the_delta_scaled(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
    delta = m.b(m.a(x))
    delta *= 0.3
    return m.w(x) + delta, m.a2(x)


def the_low_rank_value_scaled(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
    z = m.a(x)
    z /= 4.0
    return m.w(x) + m.b(z), m.a2(x)


@pytest.mark.parametrize(
    "form",
    [
        after_the_adapter,
        after_a_cast_that_is_none,
        the_adapter_subtracted,
        the_delta_scaled,
        the_low_rank_value_scaled,
    ],
)
def test_it_is_fused_through(form: Form) -> None:
    report = fused(form)
    assert report.fused == ("b.weight",), str(report)
    assert not report.declines
    assert report.ops_after["gemm"] == 2, str(report.ops_after)  # nothing of the old path is left


@pytest.mark.parametrize("before", [True, False])
def test_what_is_changed_later_never_stands_for_an_equal_value(before: bool) -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        changed = torch.tanh(x)
        if before:
            changed += 1.0
        same = torch.tanh(x)
        if not before:
            changed += 1.0
        return m.w(same) + m.b(m.a(same)) * 0.3, changed

    assert fused(form).fused == ("b.weight",)


def test_a_tensor_that_is_made_like_a_value_is_none_of_its_views() -> None:
    """As DeepSeek-V3 puts its keys together."""

    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.w(x) + m.b(m.a(x)) * 0.3
        keys = y.new_empty(*y.shape[:-1], y.shape[-1] + x.shape[-1])
        keys[..., : y.shape[-1]].copy_(y)
        keys[..., y.shape[-1] :].copy_(x)
        return keys, m.a2(x)

    assert not fused(form).declines


def test_a_value_is_changed_through_what_is_shown_like_another() -> None:
    """As Wan rotates its queries: the change touches what is shown, not what it is like."""

    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.w(x) + m.b(m.a(x)) * 0.3
        turned = torch.empty_like(y)
        turned[..., 0::2], turned[..., 1::2] = -y[..., 1::2], y[..., 0::2]
        return turned.type_as(y), m.a2(x)

    assert not fused(form).declines


@pytest.mark.parametrize(
    "view",
    [
        lambda h: torch.einsum("ij->ij", h),
        lambda h: torch.meshgrid(h.view(-1), h.new_ones(1), indexing="ij")[0],
        lambda h: torch.cartesian_prod(h.view(-1)),
    ],
    ids=["einsum", "meshgrid", "cartesian_prod"],
)
def test_a_view_that_its_schema_is_silent_of(view: Callable[[Tensor], Tensor]) -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1
        y = m.w(h)
        view(h).add_(1.0)
        return y + m.b(m.a(h)) * 0.3, m.a2(x)

    model, x = Adapted(form).double().requires_grad_(False), torch.randn(4, D_IN, dtype=torch.float64)
    frozen = flora_fx.fuse(flora_fx.capture(model, x))
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-12, atol=1e-12)
    assert [decline.reason for decline in flora_fx.report(frozen).declines] == [Reason.MUTATED]


def through_a_flag(h: Tensor, x: Tensor) -> Tensor:
    return F.silu(h, inplace=True)


def through_out(h: Tensor, x: Tensor) -> Tensor:
    return torch.mul(x, 2.0, out=h)


@pytest.mark.parametrize("change", [through_a_flag, through_out])
def test_what_is_changed_is_what_is_returned(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1
        r = change(h, x)
        y = m.w(r)
        h.add_(1.0)
        return y + m.b(m.a(r)) * 0.3, m.a2(x)

    model, x = Adapted(form).double().requires_grad_(False), torch.randn(4, D_IN, dtype=torch.float64)
    compiled = torch.compile(model, backend="flora", options={"flora.inner": "eager"})
    for call in (flora_fx.fuse(fx.symbolic_trace(model)), compiled):
        torch.testing.assert_close(call(x), model(x), rtol=1e-12, atol=1e-12)
    report = last_report()
    assert report is not None
    assert {decline.reason for decline in report.declines} == {Reason.MUTATED}


def test_a_change_that_others_see_is_left_alone() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        z = m.a(x)
        kept = z.view(-1)
        z *= 0.3
        return m.w(x) + m.b(z), kept * 2

    report = fused(form)
    assert [decline.reason for decline in report.declines] == [Reason.MUTATED]
    assert not report.fused


IN_PLACE: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "flag": lambda graph, h: graph.call_function(F.relu, (h,), {"inplace": True}),
    "item": lambda graph, h: graph.call_function(operator.setitem, (h, (..., 0), 0.5)),
    "out=": lambda graph, h: graph.call_function(torch.mul, (h, 0.9), {"out": h}),
    "view": lambda graph, h: graph.call_method("mul_", (graph.call_method("view", (h, -1)), 0.9)),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_every_way_to_change_a_value_in_place_is_seen(kind: str) -> None:
    """As Dynamo writes them into its graphs; a symbolic trace would not take an item assignment."""

    def form(m: Adapted, x: Tensor) -> Tensor:
        h = torch.neg(x)
        return m.w(h) + m.b(m.a(h)) * 0.3

    graph = fx.symbolic_trace(Adapted(form).double().eval().requires_grad_(False))
    (h,) = graph.graph.find_nodes(op="call_function", target=torch.neg)
    (base,) = graph.graph.find_nodes(op="call_module", target="w")
    with graph.graph.inserting_before(base.next):
        IN_PLACE[kind](graph.graph, h)
    graph.recompile()
    x = torch.randn(4, D_IN, dtype=torch.float64)
    with torch.no_grad():
        frozen = flora_fx.fuse(graph)
        torch.testing.assert_close(frozen(x), graph(x), rtol=1e-12, atol=1e-12)
    assert {decline.reason for decline in flora_fx.report(frozen).declines} == {Reason.MUTATED}


def test_a_copy_that_is_changed_and_returned_is_told_of() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        delta = m.b(m.a(x)).clone()
        return m.w(x) + delta.mul_(0.3), delta

    model = Adapted(form).double().requires_grad_(False)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    x = torch.randn(4, D_IN, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0)
    report = flora_fx.report(fused)
    assert [decline.reason for decline in report.declines] == [Reason.MUTATED]
    assert not report.fused
