"""DoRA in eval mode: the norm over all of W is computed when a weight changes, not at each call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters import D_IN, D_OUT, Adapted

pytest.importorskip("peft")

import flora_fx
from flora_fx import FuseConfig, Reason, TieError

from .build import Case, lora, transposed

Forward = Callable[[Any, Tensor], Tensor]


def dora() -> Case:
    case = lora(use_dora=True)()
    case.model.eval().requires_grad_(False)
    return case


def fused(case: Case, config: FuseConfig | None = None) -> Any:
    return flora_fx.fuse(flora_fx.capture(case.model, *case.args), config=config)


def assert_same(call: Any, case: Case) -> None:
    torch.testing.assert_close(call(*case.args), case.model(*case.args), rtol=1e-12, atol=1e-12)


def operations(graph: Any) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


def test_the_norms_leave_the_graph_and_one_vector_per_projection_stays() -> None:
    case = dora()
    graph = fused(case)
    report = flora_fx.report(graph)
    assert len(report.fused) == 4
    assert not report.declines, str(report)
    assert not [name for name in operations(graph) if "norm" in name or "eye" in name or "div" in name]
    # q, v, o: b + m·y; k: m·y, it has no bias; and the residual
    assert (report.ops_before["elementwise"], report.ops_after["elementwise"]) == (40, 8)
    assert_same(graph, case)


@pytest.mark.parametrize("build", [dora, transposed(use_dora=True)], ids=["Linear", "Conv1D"])
def test_every_form(build: Callable[[], Case]) -> None:
    case = build()
    graph = flora_fx.capture(case.model.eval().requires_grad_(False), *case.args)
    for layout, up in product(["joined", "beside", "ahead"], ["block_diagonal", "per_projection"]):
        for others in ({}, {"fold_scale": True, "accumulate": "add"}):
            config = FuseConfig(layout=layout, up=up, **others)
            fused_graph = flora_fx.fuse(graph, config=config)
            assert len(flora_fx.report(fused_graph).fused) == (4 if build is dora else 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the forms before it lose their packs to it
                assert_same(fused_graph, case)


def test_dynamic_shapes() -> None:
    case = dora()
    auto = torch.export.Dim.AUTO
    graph = flora_fx.fuse(flora_fx.capture(case.model, *case.args, dynamic_shapes={"args_0": {0: auto, 1: auto}}))
    assert len(flora_fx.report(graph).fused) == 4
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(graph(x), case.model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_change_of_any_weight_is_seen_at_the_next_call(part: str) -> None:
    case = dora()
    graph = fused(case)
    before = graph(*case.args)
    layer: Any = case.model.get_submodule("base_model.model.layers.0.q")
    weight = layer.base_layer.weight if part == "base_layer" else getattr(layer, part)["default"].weight
    weight.mul_(1.5)
    assert not torch.allclose(graph(*case.args), before)
    assert_same(graph, case)


def test_a_state_that_is_loaded_and_a_copy() -> None:
    case, other = dora(), dora()
    graph = fused(case)
    copied = copy.deepcopy(graph)
    for assign in (False, True):
        for call in (graph, copied):
            call.load_state_dict(other.model.state_dict(), assign=assign)
            torch.testing.assert_close(call(*case.args), other.model(*case.args), rtol=1e-12, atol=1e-12)


def test_another_dtype() -> None:
    model, x = Decomposed(_torchtune).double().eval().requires_grad_(False), torch.randn(2, 5, D_IN)
    graph = flora_fx.fuse(flora_fx.capture(model, x.double())).to(torch.float32)
    assert graph.get_buffer("_flora.w_features").dtype == torch.float32
    torch.testing.assert_close(graph(x), model.float()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decomposed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_program(decomposed: bool) -> None:
    case = dora()
    program = torch.export.export(case.model, case.args, strict=False)
    result = flora_fx.fuse(program.run_decompositions() if decomposed else program)
    assert len(flora_fx.report(result).fused) == 4
    module = result.module()
    assert_same(module, case)
    layer: Any = module.get_submodule("base_model.model.layers.0.q.lora_magnitude_vector.default")
    with torch.no_grad():
        layer.weight.mul_(0.5)
    assert_same(module, case)  # it is the model's own parameter


def test_what_trains_is_left_as_it_is() -> None:
    case = lora(use_dora=True)()
    report = flora_fx.report(fused(case))
    assert not report.fused
    assert {decline.reason for decline in report.declines} == {Reason.SCALE_NOT_SCALAR}


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_A"])
def test_gradients_that_a_stored_vector_cannot_give_are_refused(part: str) -> None:
    case = dora()
    graph = fused(case)
    layer: Any = case.model.get_submodule("base_model.model.layers.0.q")
    getattr(layer, part)["default"].weight.requires_grad_(True)
    with pytest.raises(TieError, match="fuse the graph again"):
        graph(*case.args)
    with torch.no_grad():
        assert_same(graph, case)


def test_a_compiled_fused_graph() -> None:
    case = dora()
    graph = fused(case)
    compiled = torch.compile(graph, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled, case)


class Decomposed(Adapted):
    """A hand-written DoRA; `form` puts its parts together."""

    def __init__(self, form: Forward, bias: bool = True) -> None:
        super().__init__(form, bias=bias)
        self.v = nn.Parameter(torch.rand(D_OUT) + 0.5)
        self.other = nn.Parameter(torch.randn(D_OUT))

    @property
    def m(self) -> Tensor:
        return self.v / torch.linalg.vector_norm(self.w.weight + 0.3 * self.b.weight @ self.a.weight, dim=1)


def _torchtune(m: Decomposed, x: Tensor) -> Tensor:
    y = m.w(x)
    scale = m.m
    return (scale - 1) * y + scale * m.b(m.a(x)) * 0.3 + y


def _subtracted(m: Decomposed, x: Tensor) -> Tensor:
    y, scale = m.w(x), m.m.view(1, -1)
    return y - ((y - m.w.bias) * (1 - scale) - 0.3 * (scale * m.b(m.a(x))))


def _plain(m: Decomposed, x: Tensor) -> Tensor:
    y, scale = m.w(x), m.m
    return y + ((scale - 1) * (y - m.w.bias) + m.b(m.a(x)) * scale / 2)


FORMS: dict[str, Forward] = {"torchtune": _torchtune, "divided": _plain}


@pytest.mark.parametrize("form", FORMS)
def test_other_ways_to_write_it(form: str) -> None:
    report = check(Decomposed(FORMS[form]))
    assert report.fused == ("b.weight",)
    assert not report.declines, str(report)
    assert report.ops_after["gemm"] == 2


WRONG: dict[str, Forward] = {
    "another bias": lambda m, x: (y := m.w(x)) + ((m.m - 1) * (y - m.other) + m.m * m.b(m.a(x)) * 0.3),
    "the bias once more": lambda m, x: (y := m.w(x)) + ((m.m - 1) * (y + m.w.bias) + m.m * m.b(m.a(x)) * 0.3),
    "the base once more": lambda m, x: (y := m.w(x)) + (m.m * (y - m.w.bias) + m.m * m.b(m.a(x)) * 0.3),
    "two magnitudes": lambda m, x: (y := m.w(x)) + ((m.m - 1) * (y - m.w.bias) + m.other * m.b(m.a(x)) * 0.3),
    "a square": lambda m, x: (y := m.w(x)) + ((m.m - 1) * (y - m.w.bias) + m.m * (m.m * m.b(m.a(x))) * 0.3),
    "the delta as it is": lambda m, x: (y := m.w(x)) + ((m.m - 1) * (y - m.w.bias) + m.b(m.a(x)) * 0.3),
    "read elsewhere": lambda m, x: (y := m.w(x)) * ((m.m - 1) * (y - m.w.bias) + m.m * m.b(m.a(x)) * 0.3 + y),
    "a matrix": lambda m, x: (y := m.w(x)) + ((m.mat - 1) * (y - m.w.bias) + m.mat * m.b(m.a(x)) * 0.3),
    "subtracted from one": _subtracted,
}


@pytest.mark.parametrize("form", WRONG)
def test_what_only_looks_like_it_stays_right(form: str) -> None:
    model = Decomposed(WRONG[form])
    model.mat = nn.Parameter(torch.randn(5, D_OUT))
    report = check(model)
    assert report.declines


def test_a_base_that_others_read_is_not_computed_twice() -> None:
    def form(m: Decomposed, x: Tensor) -> Any:
        y = m.w(x)
        return y + ((m.m - 1) * (y - m.w.bias) + m.m * m.b(m.a(x)) * 0.3), torch.tanh(y)

    report = check(Decomposed(form))
    assert not report.fused
    assert report.ops_after["gemm"] == report.ops_before["gemm"]


def check(model: nn.Module) -> flora_fx.FusionReport:
    model.double().eval().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    graph = flora_fx.fuse(flora_fx.capture(model, x))
    torch.testing.assert_close(graph(x), model(x), rtol=1e-12, atol=1e-12)
    return flora_fx.report(graph)
