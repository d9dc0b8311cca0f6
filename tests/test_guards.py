"""What a pass asks before it rewrites, each by the smallest graph that would come out wrong if it did not ask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapters import D_IN, D_OUT, FORMS, RANK, Adapted, linear
from parallel import CONFIGS
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FusionReport


def fused(model: nn.Module, *shape: int) -> FusionReport:
    """Equal in every form that a fused graph may have; the report of the default one."""
    model.double().eval().requires_grad_(False)
    x = torch.randn(*(shape or (2, 5, D_IN)), dtype=torch.float64)
    expected = model(x)
    for graph in (fx.symbolic_trace(model), flora_fx.capture(model, x)):
        for config in CONFIGS:
            torch.testing.assert_close(flora_fx.fuse(graph, config=config)(x), expected, rtol=1e-12, atol=1e-12)
    return flora_fx.report(flora_fx.fuse(graph))


BRANCHES: dict[str, Callable[[Adapted, Tensor], tuple[Tensor, ...]]] = {
    "two adds": lambda m, x: ((y := m.w(x)) + m.b(m.a(x)) * 0.3, y + m.b2(m.a2(x)) * 0.7),
    "one add on top, the sum read": lambda m, x: (
        (y := m.w(x) + m.b(m.a(x)) * 0.3) + m.b2(m.a2(x)) * 0.7,
        torch.tanh(y),
    ),
    "the base read": lambda m, x: ((y := m.w(x)) + m.b(m.a(x)) * 0.3, torch.tanh(y)),
}


@pytest.mark.parametrize("form", BRANCHES)
def test_an_adapter_reaches_its_own_branch_alone(form: str) -> None:
    report = fused(Adapted(BRANCHES[form]))
    assert len(report.fused) == 1 + (form != "the base read")
    assert not report.declines


class Parallel(nn.Module):
    """An adapter that reads what its projection's input was computed from, as FFBA's do; B has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = linear(D_IN, D_IN), linear(D_IN, D_OUT, True)
        self.a, self.b = linear(D_IN, RANK, True), linear(RANK, D_OUT, True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.w(torch.tanh(self.first(x))) + self.b(z)


def test_the_bias_of_an_up_projection_is_kept_where_it_might_be_columns() -> None:
    assert len(fused(Parallel()).fused) == 1


class Nested(nn.Module):
    """Two projections whose names differ in a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.ModuleDict({"w": Adapted(lambda m, x: m.w(x) + m.b(m.a(x)) * 0.3)})
        self.q_w_w, self.a, self.b = linear(D_OUT, D_OUT), linear(D_OUT, RANK), linear(RANK, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.q["w"](x))
        return self.q_w_w(y) + self.b(self.a(y)) * 0.7


def test_packs_whose_parameters_have_one_name_but_for_a_dot_are_two() -> None:
    report = fused(Nested())
    assert len(report.fused) == 2
    assert len({pack.name for pack in report.packs}) == len(report.packs)


@pytest.mark.parametrize("form", ["two adapters, one scale", "two adapters"])
def test_up_projections_onto_one_base_train_each_by_itself(form: str) -> None:
    model = Adapted(FORMS[form]).double()
    model.w.requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    trained = [model.a.weight, model.b.weight, model.a2.weight, model.b2.weight]
    expected = torch.autograd.grad(model(x).square().sum(), trained)
    for config in CONFIGS:
        graph = flora_fx.fuse(flora_fx.capture(model, x), config=config)
        assert len(flora_fx.report(graph).fused) == 2
        torch.testing.assert_close(torch.autograd.grad(graph(x).square().sum(), trained), expected)
