"""What the matrix asked of the passes, without PEFT: what is fused now, and what is told of adapters that are none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig, FusionReport, Reason
from tests.adapters import D_IN, RANK, Adapted

KINDS: dict[str, Callable[..., Any]] = {
    "traced": lambda model, x: fx.symbolic_trace(model),
    "captured": flora_fx.capture,
    "exported": lambda model, x: torch.export.export(model, (x,)),
    "decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions(),
}


def read(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, D_IN)), dtype=torch.float64)


def call(program: Any) -> Callable[..., Any]:
    return program if isinstance(program, nn.Module) else program.module()


class Diagonal(Adapted):
    """A vector between A and B, as KaSA writes it."""

    def __init__(self, ab_bias: bool = False) -> None:
        super().__init__(lambda m, x: m.w(x) + m.b(m.a(x) * m.diagonal) * 0.3, bias=True, ab_bias=ab_bias)
        self.diagonal = nn.Parameter(torch.randn(RANK))


@pytest.mark.parametrize("ab_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_between_down_and_up_projection_stays_between_them(kind: str, ab_bias: bool) -> None:
    model, x = Diagonal(ab_bias).double().requires_grad_(False), read()
    for config in (FuseConfig(), FuseConfig(layout="ahead"), FuseConfig(layout="beside", accumulate="add")):
        program = KINDS[kind](model, x)
        fused = flora_fx.fuse(program, config=config)
        torch.testing.assert_close(call(fused)(x), model(x), rtol=1e-12, atol=1e-12)
        report = flora_fx.report(fused)
        assert not report.declines, str(report)
        assert len(report.fused) == 1
        if config == FuseConfig():
            assert (report.ops_after["gemm"], report.ops_after["elementwise"]) == (2, 1 + ab_bias)


def test_a_vector_trains() -> None:
    model, x = Diagonal().double(), read()
    model.w.requires_grad_(False)
    twin = copy.deepcopy(model)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert len(flora_fx.report(fused).fused) == 1
    for module, run in ((model, fused), (twin, twin)):
        run(x).square().sum().backward()
        assert module.diagonal.grad is not None
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        if one.requires_grad and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_a_vector_that_does_not_fit_is_a_scale_per_feature() -> None:
    class Model(Diagonal):
        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.b(self.a(x) * self.diagonal.expand(5, RANK)) * 0.3

    report = fuse_and_compare(Model().double(), read())
    assert [decline.reason for decline in report.declines] == [Reason.SCALE_NOT_SCALAR]


def fuse_and_compare(model: nn.Module, x: Tensor) -> FusionReport:
    model.eval().requires_grad_(False)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
    return flora_fx.report(fused)


class Convolved(nn.Module):
    """A convolution and, beside it, what `beside` makes of the same input; by the names that PEFT gives."""

    def __init__(self, beside: nn.Module, name: str = "base_layer") -> None:
        super().__init__()
        self.name = name
        self.conv = nn.ModuleDict({name: nn.Conv1d(6, 8, 3, padding=1), "beside": beside})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv[self.name](x) + self.conv["beside"](x) * 0.5


def low_rank() -> nn.Module:
    return nn.Sequential(nn.Conv1d(6, 2, 3, padding=1, bias=False), nn.Conv1d(2, 8, 1, bias=False))


def test_an_adapter_of_convolutions_is_told() -> None:
    report = fuse_and_compare(Convolved(low_rank()).double(), read(2, 6, 9))
    assert [decline.reason for decline in report.declines] == [Reason.NOT_LOW_RANK]
    assert "made of conv1d, mul" in report.declines[0].detail
    traced = flora_fx.report(flora_fx.fuse(fx.symbolic_trace(Convolved(low_rank()))))
    assert [decline.reason for decline in traced.declines] == [Reason.NOT_LOW_RANK]


@pytest.mark.parametrize(
    "branch",
    [
        lambda: nn.Conv1d(6, 8, 1),
        lambda: nn.Sequential(nn.Conv1d(6, 2, 1), nn.ReLU(), nn.Conv1d(2, 8, 1)),
        lambda: nn.Sequential(nn.Conv1d(6, 2, 1), nn.BatchNorm1d(2), nn.Conv1d(2, 8, 1)),
        low_rank,
    ],
    ids=["another layer", "with an activation", "with a norm", "without names that tell"],
)
def test_a_branch_of_a_network_is_no_adapter(branch: Callable[[], nn.Module]) -> None:
    for report in (
        fuse_and_compare(Convolved(branch(), "layer").double(), read(2, 6, 9)),
        flora_fx.report(flora_fx.fuse(fx.symbolic_trace(Convolved(branch(), "layer").eval()))),
    ):
        assert not report.declines, str(report)


def test_a_residual_and_two_layers_side_by_side_are_no_adapters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u, self.o = nn.Linear(D_IN, D_IN), nn.Linear(D_IN, D_IN), nn.Linear(D_IN, D_IN)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.o(torch.tanh(self.w(x) + self.u(x)))

    assert not fuse_and_compare(Model().double(), read()).declines


def test_a_weight_that_is_computed_at_each_call_is_told_once() -> None:
    class Model(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            matrices = {key: nn.Parameter(torch.randn(*s)) for key, s in [("a", (3, D_IN)), ("b", (10, 3))]}
            self.q = nn.ModuleDict({name: nn.Linear(D_IN, 10, bias=False), "lora": nn.ParameterDict(matrices)})

        def forward(self, x: Tensor) -> Tensor:
            weight = self.q[self.name].weight + self.q["lora"]["b"] @ self.q["lora"]["a"] * 0.3
            return F.linear(x, weight) * F.linear(x + 1, weight)

    report = fuse_and_compare(Model("base_layer").double(), read())
    assert [decline.reason for decline in report.declines] == [Reason.WEIGHT_COMPUTED]
    assert "merge the adapter" in report.declines[0].detail
    assert not fuse_and_compare(Model("layer").double(), read()).declines


def test_a_projection_of_a_weight_is_no_weight_that_an_adapter_makes() -> None:
    """DeBERTa projects a table of positions and multiplies its queries with that."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, D_IN))
            linear = {"base_layer": nn.Linear(D_IN, 10), "lora_A": nn.Linear(D_IN, 3), "lora_B": nn.Linear(3, 10)}
            self.key = nn.ModuleDict(linear)

        def forward(self, x: Tensor) -> Tensor:
            key = self.key["base_layer"](self.table) + self.key["lora_B"](self.key["lora_A"](self.table)) * 0.3
            return x @ key.T

    report = fuse_and_compare(Model().double(), read(2, 5, 10))
    assert (len(report.fused), report.declines) == (1, ())


def test_two_layers_one_after_the_other_beside_a_third_are_no_adapter() -> None:
    """Though nothing but linear layers and weights is between the read and the add."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u, self.g, self.v = (nn.Linear(*s) for s in [(D_IN, 10), (D_IN, 20), (D_IN, 20), (20, 10)])

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.v(self.u(x) * self.g(x))

    assert not fuse_and_compare(Model().double(), read()).declines


def test_rotary_positions_by_stored_tables_are_no_adapter() -> None:
    class Model(Adapted):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.w(x) + m.b(m.a(x)) * 0.3)
            self.q = nn.Linear(D_IN, D_IN)
            self.cos, self.sin = (nn.Parameter(torch.randn(5, D_IN)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            halves = q.chunk(2, -1)
            return super().forward(q * self.cos + torch.cat((-halves[1], halves[0]), -1) * self.sin)

    report = fuse_and_compare(Model().double(), read())
    assert (len(report.fused), report.declines) == (1, ())


def test_an_add_in_place_into_a_reshape_that_nothing_else_reads() -> None:
    """So torchao's kernels add a bias."""

    class Model(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            y = (F.linear(x.reshape(-1, D_IN), self.w.weight) * 2).reshape(2, 5, -1)
            y += self.bias
            return y + self.b(self.a(x)) * 0.3

    for shared in (False, True):
        model = Model(lambda m, x: x)
        model.bias = nn.Parameter(torch.randn(10))
        if shared:
            model.forward = lambda x, m=model: _seen_elsewhere(m, x)  # type: ignore[method-assign]
        report = fuse_and_compare(model.double(), read())
        assert len(report.fused) == (not shared)
        assert (Reason.MUTATED in [decline.reason for decline in report.declines]) == shared


def _seen_elsewhere(m: Any, x: Tensor) -> Tensor:
    flat = F.linear(x.reshape(-1, D_IN), m.w.weight) * 2
    y = flat.reshape(2, 5, -1)
    y += m.bias
    return y + m.b(m.a(x)) * 0.3 + flat.sum()


def test_arguments_by_name_are_read_or_left_alone() -> None:
    class Model(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            w, a, b = self.w.weight, self.a.weight, self.b.weight
            y = F.linear(input=x, weight=w) + F.linear(F.linear(x, weight=a), weight=b) * 0.3
            return y * F.linear(input=x, weight=w + b @ a)

    model, x = Model(lambda m, x: x).double().requires_grad_(False), read()
    for kind in KINDS.values():
        fused = flora_fx.fuse(kind(model, x))
        torch.testing.assert_close(call(fused)(x), model(x), rtol=1e-12, atol=1e-12)
