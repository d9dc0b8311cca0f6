"""What a pass asks before it rewrites, each by the smallest graph that would come out wrong if it did not ask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FusionReport, backend
from flora_fx.storage.optimizers import protect_from_fused_optimizers
from tests.adapters import D_IN, D_OUT, FORMS, RANK, Adapted, Siblings, linear
from tests.parallel import CONFIGS


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


def test_a_slice_of_a_pack_is_viewed_in_other_shapes() -> None:
    report = fused(Adapted(lambda m, x: ((y := m.w(x)) + m.b(m.a(x)) * 0.3, torch.tanh(y.view(2, -1)))))
    assert len(report.fused) == 1


def test_the_same_operation_on_memory_that_changed_in_between_is_another_value() -> None:
    def form(m: Adapted, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.5
        before = torch.sin(h)
        h.view(-1).add_(1.0)
        return m.w(before) + m.b(m.a(torch.sin(h))) * 0.3, h

    fused(Adapted(form))


class Reshaped(nn.Module):
    """What looks like an adapter works on halves of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = linear(D_IN, D_OUT), linear(D_IN // 2, RANK), linear(RANK, D_OUT // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + self.b(self.a(x.reshape(2, 10, D_IN // 2))).reshape(2, 5, D_OUT) * 0.3


def test_a_reshape_of_features_is_not_one_of_rows() -> None:
    fused(Reshaped())


def test_two_random_draws_are_two_values() -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        return m.w(x * torch.rand_like(x)) + m.b(m.a(x * torch.rand_like(x))) * 0.3

    model = Adapted(form).double().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    graph = flora_fx.fuse(flora_fx.capture(model, x))
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)


class Chained(nn.Module):
    """Base and adapter are both a linear layer behind another; the narrow one is the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = linear(D_IN, D_IN), linear(D_IN, D_OUT)
        self.a, self.b = linear(D_IN, RANK), linear(RANK, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(self.first(x)) + self.b(self.a(x)) * 0.3


def test_of_two_chains_that_are_added_the_narrow_one_is_the_adapter() -> None:
    assert fused(Chained()).fused == ("b.weight",)


@pytest.mark.parametrize("layout", ["joined", "beside"])
def test_a_single_row_keeps_its_scales(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor gets for one token is written in another way than for many."""
    model, x = Siblings((0.7, 1.9)).double().eval().requires_grad_(False), torch.randn(1, 1, D_IN, dtype=torch.float64)
    monkeypatch.setattr(backend, "_compiler", lambda *_: lambda graph, inputs: graph.forward)
    compiled = torch.compile(model, backend="flora", options={"flora.layout": layout})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_fused_optimizer_leaves_the_neighbours_of_a_strided_parameter_alone() -> None:
    protect_from_fused_optimizers()
    pack = torch.zeros(4, 5)
    inside, dense = nn.Parameter(torch.empty(0)), nn.Parameter(torch.zeros(4, 3))
    inside.data = pack[:, :3]
    inside.grad = dense.grad = torch.randn(4, 3)
    torch.optim.AdamW([inside, dense], lr=0.1, fused=True).step()
    torch.testing.assert_close(inside, dense)
    assert dense.any()
    assert not pack[:, 3:].any()


class ChangedInPlace(nn.Module):
    """The pack has 16 rows, which a split tiles without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = linear(D_IN, 16 - RANK), linear(D_IN, RANK), linear(RANK, 16 - RANK)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w(x)
        y *= 2.0
        return y + self.b(self.a(x)) * 0.3


def test_a_slice_of_a_pack_that_is_changed_in_place_gives_the_inputs_gradient() -> None:
    """Autograd lets no part of a split be changed in place."""
    model = ChangedInPlace().double().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    graph = flora_fx.fuse(flora_fx.capture(model, x.detach()))
    torch.testing.assert_close(torch.autograd.grad(graph(x).square().sum(), x)[0], expected)
