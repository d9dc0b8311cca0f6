"""Reasons are true: what is said of an adapter that stays out of a pack is why it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.backend import last_report
from tests.adapters import D_IN, D_OUT, RANK

X = torch.randn(4, D_IN, dtype=torch.float64)


class Model(nn.Module):
    """w with the adapter (a, b); a second projection, to share things with."""

    def __init__(self, form: Callable[[Any, Tensor], Any], bias: bool = False) -> None:
        super().__init__()
        self.form = form
        self.w, self.other = nn.Linear(D_IN, D_OUT, bias), nn.Linear(D_IN, D_OUT, bias)
        self.a, self.b = nn.Linear(D_IN, RANK, bias=False), nn.Linear(RANK, D_OUT, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.w(x) + self.b(self.a(x)) * 0.3
        return y


def declines(model: nn.Module, x: Tensor = X, config: FuseConfig | None = None) -> dict[Reason, list[str]]:
    """The details by reason, once the numbers are seen to be right and the adapter accumulates."""
    model = model.double().eval().requires_grad_(False)
    graph = flora_fx.capture(model, x)
    fused = flora_fx.fuse(graph, config=config)
    torch.testing.assert_close(fused(x), graph(x), rtol=1e-12, atol=1e-12)
    report = flora_fx.report(fused)
    assert "b.weight" in report.fused
    found: dict[Reason, list[str]] = {}
    for decline in report.declines:
        found.setdefault(decline.reason, []).append(decline.detail)
    return found


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="flora", options={"flora.inner": "eager"})


def test_a_tied_weight() -> None:
    model = Model(lambda m, x: m.adapted(x) + F.embedding(torch.tensor([1, 2, 3, 0]), m.w.weight))
    model.w, model.b = nn.Linear(D_IN, D_IN, bias=False), nn.Linear(RANK, D_IN, bias=False)
    found = declines(model)
    assert list(found) == [Reason.WEIGHT_SHARED]
    own, its_adapter = found[Reason.WEIGHT_SHARED]
    assert own.startswith("w.weight is also used elsewhere")
    assert its_adapter.startswith("w.weight reads what a.weight reads, but stays out of the pack")


def test_a_layer_that_stands_in_two_places() -> None:
    """PEFT's layer_replication: one base, an adapter for each place."""
    model = Model(lambda m, x: (m.adapted(x), m.w(torch.tanh(x)) + m.b2(m.a2(torch.tanh(x)))))
    model.a2, model.b2 = nn.Linear(D_IN, RANK + 1, bias=False), nn.Linear(RANK + 1, D_OUT, bias=False)
    found = declines(model)
    assert list(found) == [Reason.WEIGHT_SHARED]
    assert sum("stays out of the pack of" in detail for detail in found[Reason.WEIGHT_SHARED]) == 2
    assert sum("stays a GEMM of its own" in detail for detail in found[Reason.WEIGHT_SHARED]) == 2


def test_an_adapter_that_is_used_twice_is_told_once() -> None:
    found = declines(Model(lambda m, x: m.adapted(x) + m.a(torch.tanh(x)).sum()))
    assert list(found) == [Reason.WEIGHT_SHARED]
    assert [detail for detail in found[Reason.WEIGHT_SHARED] if detail.startswith("a.weight is also used")]
    assert not [detail for detail in found[Reason.WEIGHT_SHARED] if "a GEMM of its own" in detail]


def test_a_bias_that_is_used_twice() -> None:
    found = declines(Model(lambda m, x: m.adapted(x) + m.w.bias, bias=True))
    assert list(found) == [Reason.WEIGHT_SHARED]
    assert found[Reason.WEIGHT_SHARED][0].startswith("w.bias is also used elsewhere, so the projection stays out")


def test_memory_that_is_shared() -> None:
    model = Model(lambda m, x: (m.adapted(x), m.other(torch.tanh(x)))).double()
    model.other.weight = nn.Parameter(model.w.weight.detach()[:])
    found = declines(model)
    assert list(found) == [Reason.WEIGHT_SHARED]
    assert any(
        detail.startswith("w.weight shares memory with another parameter") for detail in found[Reason.WEIGHT_SHARED]
    )


def test_a_projection_whose_value_is_changed() -> None:
    def form(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.w(x)
        views = y.view(-1)
        y2 = m.other(torch.tanh(x)) + m.b(m.a(x)) * 0.3
        views.add_(1)
        return y, y2

    found = declines(Model(form))
    assert set(found) == {Reason.MUTATED}
    assert any(detail.startswith("w.weight reads what a.weight reads") for detail in found[Reason.MUTATED])


class _Int8(torch.Tensor):
    """A weight of a kind that is none of torch's own."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> _Int8:
        return torch.Tensor._make_subclass(cls, weight)


def test_a_weight_of_another_kind() -> None:
    model = Model(Model.adapted).double().requires_grad_(False)
    del model.w.weight
    model.w.weight = nn.Parameter(_Int8(torch.randn(D_OUT, D_IN, dtype=torch.float64)), requires_grad=False)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    report = flora_fx.report(fused)
    torch.testing.assert_close(fused(X), model(X), rtol=1e-12, atol=1e-12)
    assert {decline.reason for decline in report.declines} == {Reason.WEIGHT_NOT_DENSE}
    assert "w.weight reads what a.weight reads" in report.declines[-1].detail


def test_another_mode() -> None:
    def form(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = m.w(x)
        y2: Tensor = m.other(torch.tanh(x)) + m.b(m.a(x)) * 0.3
        return y2 + y

    model = Model(form).double().eval().requires_grad_(False)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model)(X), model(X), rtol=1e-12, atol=1e-12)
    report = last_report()
    assert report is not None
    assert [decline.reason for decline in report.declines] == [Reason.OTHER_MODE]
    assert "reads what" in report.declines[0].detail


def test_another_value() -> None:
    found = declines(Model(lambda m, x: m.w(x) + m.b(m.a(torch.tanh(x))) * 0.3))
    assert list(found) == [Reason.READS_ANOTHER_VALUE]
    [detail] = found[Reason.READS_ANOTHER_VALUE]
    assert detail.startswith("no base that could share a pack reads what a.weight reads (tanh)")
    assert detail.endswith("a.weight stays a GEMM of its own")


@pytest.mark.parametrize("narrow", ["adapter", "base"])
def test_the_dtypes_that_differ_are_named(narrow: str) -> None:
    model = Model(lambda m, x: m.w(x.to(m.w.weight.dtype)) + m.b(m.a(x.to(m.a.weight.dtype))) * 0.3)
    model.double().eval().requires_grad_(False)
    for layer in {"adapter": [model.a, model.b], "base": [model.w]}[narrow]:
        layer.float()
    graph = flora_fx.capture(model, X)
    told = [d for d in flora_fx.report(flora_fx.fuse(graph)).declines if d.reason is Reason.DTYPE_DIFFERS]
    casts = flora_fx.report(flora_fx.fuse(graph, config=FuseConfig(allow_cast=True))).fused
    first, second = told[0].detail.split(";")[0].split(" and ")
    assert {first.split(" is ")[-1], second.split(" is ")[-1]} == {"float32", "float64"}
    assert bool(casts) == ("FuseConfig(allow_cast=True)" in told[0].detail)  # the remedy is named where it is one


def test_a_compiled_model_is_not_told_to_cast() -> None:
    """The backend has no such option."""
    model = Model(lambda m, x: m.w(x) + m.b(m.a(x.float())) * 0.3).double().eval().requires_grad_(False)
    model.a.float(), model.b.float()
    torch._dynamo.reset()
    compiled(model)(X)
    report = last_report()
    assert report is not None
    assert [decline.reason for decline in report.declines] == [Reason.DTYPE_DIFFERS]
    assert "allow_cast" not in report.declines[0].detail


def test_shapes_that_are_known_to_differ() -> None:
    model = Model(lambda m, x: m.w(x)[:1] + m.b(m.a(x)) * 0.3).double().requires_grad_(False)
    report = flora_fx.report(flora_fx.fuse(flora_fx.capture(model, X)))
    assert [decline.reason for decline in report.declines] == [Reason.SHAPE_UNKNOWN]
    assert "has another shape than what is added to it" in report.declines[0].detail
