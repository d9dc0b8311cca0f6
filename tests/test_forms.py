"""Every way to write LoRA, from every kind of graph: the graph, the numbers."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.internals import FakeTensorMode
from tests.adapters import D_IN, FORMS, TWO_ADAPTERS, Adapted, Siblings, linear


def traced(model: nn.Module, x: Tensor) -> Any:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,))


def decomposed(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,)).run_decompositions()


def captured(model: nn.Module, x: Tensor) -> Any:
    return flora_fx.capture(model, x)


def dynamic(model: nn.Module, x: Tensor) -> Any:
    auto = torch.export.Dim.AUTO
    return torch.export.export(model, (x,), dynamic_shapes=({0: auto, 1: auto},))


KINDS = [traced, exported, decomposed, captured, dynamic]


def run(program: Any, *args: Tensor) -> Tensor:
    module = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    return module(*args)


def assert_exact(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capture", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_fused_and_exact(form: str, capture: Callable[..., Any]) -> None:
    model = Adapted(FORMS[form], bias=form in ("peft", "functional")).double().eval().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    expected = model(x)
    program = capture(model, x)
    fused = flora_fx.fuse(program)
    assert type(fused).__mro__.count(fx.GraphModule) == type(program).__mro__.count(fx.GraphModule)
    assert_exact(run(fused, x), expected)
    assert_exact(run(program, x), expected)
    report = flora_fx.report(fused)
    paths = 2 if form in TWO_ADAPTERS or form == "one A, two B" else 1
    if form == "one A, two B":  # the second B is a slice of a weight, not a weight: not a path
        assert len(report.fused) == 1
        return
    assert len(report.fused) == paths, str(report)
    assert not report.declines, str(report)
    # One GEMM for W and the A's, one for each scale; nothing elementwise is left but a tensor scale.
    gemms = 3 if form in ("two adapters", "two adapters added first") else 2
    assert report.ops_after["gemm"] == gemms, str(report)
    assert report.ops_after["elementwise"] == (1 if form == "tensor scale" else 0), str(report)


@pytest.mark.parametrize(("attribute", "operator"), [("T", torch.ops.aten.numpy_T), ("mT", torch.ops.aten.mT)])
def test_a_transpose_is_found_as_dynamo_writes_it(attribute: str, operator: Any) -> None:
    """Until torch 2.13 ``weight.T`` is a `getattr`; since 2.14 it is a call of an operator, overload unnamed."""

    def forward(model: Any, x: Tensor) -> Tensor:
        a, b = getattr(model.a.weight, attribute), getattr(model.b.weight, attribute)
        return model.w(x) + (x @ a @ b) * 0.3

    model = Adapted(forward).double().eval().requires_grad_(False)
    graph = fx.symbolic_trace(model)
    for node in graph.graph.find_nodes(op="call_function", target=getattr):
        node.target, node.args = operator, node.args[:1]
    graph.recompile()
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    assert_exact(graph(x), model(x))
    fused = flora_fx.fuse(graph)
    assert_exact(fused(x), model(x))
    report = flora_fx.report(fused)
    assert (len(report.fused), report.declines, report.ops_after["gemm"]) == (1, (), 2), str(report)


@functools.cache
def siblings(scales: tuple[float, float], capture: Callable[..., Any]) -> tuple[nn.Module, Any]:
    """A model and its graph, to be copied together: what is fused ties its packs to the weights of both."""
    model = Siblings(scales).double().eval().requires_grad_(False)
    return model, capture(model, torch.randn(2, 5, D_IN, dtype=torch.float64))


@pytest.mark.parametrize("capture", KINDS)
@pytest.mark.parametrize(
    ("layout", "up", "accumulate", "fold_scale"),
    [
        *itertools.product(["joined", "beside"], ["block_diagonal", "per_projection"], ["addmm", "add"], [False, True]),
        # Nothing accumulates: how it would makes no difference.
        *[("ahead", "block_diagonal", "addmm", False), ("ahead", "per_projection", "add", False)],
        ("ahead", "block_diagonal", "addmm", True),
        *itertools.product(["joined", "beside"], ["per_projection"], ["unrolled"], [False, True]),
    ],
)
@pytest.mark.parametrize("scales", [(0.7, 0.7), (0.7, 1.9)])
def test_every_configuration_is_exact(
    capture: Callable[..., Any],
    layout: Any,
    up: Any,
    accumulate: Any,
    fold_scale: bool,
    scales: tuple[float, float],
) -> None:
    model, program = copy.deepcopy(siblings(scales, capture))
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    expected = model(x)
    config = FuseConfig(layout=layout, up=up, accumulate=accumulate, fold_scale=fold_scale)
    fused = flora_fx.fuse(program, config=config)
    assert_exact(run(fused, x), expected)
    report = flora_fx.report(fused)
    assert len(report.fused) == 3
    assert not report.declines
    blocks = 1 if up == "block_diagonal" and (scales[0] == scales[1] or fold_scale) else 2
    packs = 2 if layout == "joined" else 4
    # Ahead, every B is columns, and each scale a product with the z's that it is for.
    accumulations = 0 if layout == "ahead" or accumulate == "unrolled" else blocks + 1
    assert report.ops_after["gemm"] == packs + accumulations
    if layout == "ahead":
        scaled = 0 if fold_scale else len(set(scales)) + 1
        assert report.ops_after["elementwise"] == scaled + 1  # the residual


def test_dynamic_sizes_stay_dynamic() -> None:
    model = Siblings().double().eval().requires_grad_(False)
    fused = flora_fx.fuse(dynamic(model, torch.randn(2, 5, D_IN, dtype=torch.float64))).module()
    for shape in [(2, 5), (7, 3), (3, 11)]:
        x = torch.randn(*shape, D_IN, dtype=torch.float64)
        assert_exact(fused(x), model(x))


def test_a_pack_holds_all_that_read_one_value_and_nothing_else() -> None:
    model = Siblings().eval().requires_grad_(False)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    packs = {pack.name: pack for pack in flora_fx.report(fused).packs}
    qkv = next(pack for name, pack in packs.items() if "q" in name and not name.endswith(("_up", "_bias")))
    assert qkv.members == ("q.weight", "v.weight", "k.weight", "q_a.weight", "v_a.weight")
    assert [s.role.value for s in qkv.slices] == ["base"] * 3 + ["down"] * 2
    assert qkv.shape == (10 + 8 + 6 + 3 + 5, D_IN)
    names = [node.name for node in fused.graph.nodes]
    assert {"_flora_qvk", "qvk", "qv_adapted", "_flora_o", "o_adapted"} <= set(names), names
    assert [node.target for node in fused.graph.nodes if node.op == "call_module"] == []


def test_the_graph_given_is_left_untouched() -> None:
    model = Siblings().eval().requires_grad_(False)
    x = torch.randn(4, D_IN)
    graph = fx.symbolic_trace(model)
    before, expected, keys = str(graph.graph), graph(x), list(graph.state_dict())
    fused = flora_fx.fuse(graph)
    assert str(graph.graph) == before
    assert list(graph.state_dict()) == keys == list(fused.state_dict())
    torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize("capture", KINDS)
def test_fusing_twice_changes_nothing(capture: Callable[..., Any]) -> None:
    model = Siblings().eval().requires_grad_(False)
    fused = flora_fx.fuse(capture(model, torch.randn(2, 5, D_IN)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which is for those who give it a config
        again = flora_fx.fuse(fused)
    assert str(again.graph) == str(fused.graph)
    assert flora_fx.report(again) == flora_fx.report(fused)


def test_shared_reads_pack_without_adapters_only_when_asked() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(D_IN, 7, bias=False), nn.Linear(D_IN, 9)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.sigmoid(self.gate(x)), self.up(x)], -1)

    model, x = Base().double().requires_grad_(False), torch.randn(3, D_IN, dtype=torch.float64)
    assert not flora_fx.report(flora_fx.fuse(fx.symbolic_trace(model))).packs
    fused = flora_fx.fuse(fx.symbolic_trace(model), config=FuseConfig(pack_base=True))
    assert flora_fx.report(fused).ops_after["gemm"] == 1
    assert_exact(fused(x), model(x))


def test_adapter_biases() -> None:
    model = Adapted(FORMS["peft"], bias=True, ab_bias=True).double().eval().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    for capture in KINDS:
        for config in (FuseConfig(), FuseConfig(layout="beside", accumulate="add", fold_scale=True)):
            fused = flora_fx.fuse(capture(model, x), config=config)
            assert_exact(run(fused, x), model(x))
            assert len(flora_fx.report(fused).fused) == 1


def on_conv1d() -> nn.Module:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = conv(10, D_IN)
            self.a, self.b = nn.Linear(D_IN, 3, bias=False), nn.Linear(3, 10, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.b(self.a(x)) * 1.4

    model = Model().double().requires_grad_(False)
    model.w.bias.normal_()
    return model


def test_conv1d_of_transformers() -> None:
    model, x = on_conv1d(), torch.randn(2, 5, D_IN, dtype=torch.float64)
    for capture in KINDS:
        fused = flora_fx.fuse(capture(model, x))
        assert_exact(run(fused, x), model(x))
        assert flora_fx.report(fused).ops_after["gemm"] == 2, capture.__name__


def test_example_values_that_lack_numbers() -> None:
    """As ``FakeTensorProp`` of torch 2.11 leaves them: sizes, and what is computed of sizes, are None."""
    model, x = on_conv1d(), torch.randn(2, 5, D_IN, dtype=torch.float64)
    graph = traced(model, x)
    FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    sizes = [node for node in graph.graph.nodes if not isinstance(node.meta["val"], Tensor)]
    assert {str(node.target) for node in sizes} >= {"size"}
    for node in sizes:
        value = node.meta["val"]
        node.meta["val"] = (None,) * len(value) if isinstance(value, tuple) else None
    fused = flora_fx.fuse(graph)
    assert_exact(run(fused, x), model(x))
    assert flora_fx.report(fused).ops_after["gemm"] == 2


def test_bmm_with_an_expanded_weight_after_decompositions() -> None:
    model = Siblings().double().eval().requires_grad_(False)
    x = torch.randn(5, 2, D_IN, dtype=torch.float64)
    program = decomposed(model, x.transpose(0, 1))  # not contiguous: linears decompose to bmm
    assert torch.ops.aten.bmm.default in {node.target for node in program.graph.nodes}
    fused = flora_fx.fuse(program)
    assert_exact(run(fused, x.transpose(0, 1)), model(x.transpose(0, 1)))
    assert flora_fx.report(fused).ops_after["gemm"] == 4


def test_dynamo_graphs_fuse_inside_a_backend() -> None:
    model, x = Siblings().double().eval().requires_grad_(False), torch.randn(2, 5, D_IN, dtype=torch.float64)
    expected, reports = model(x), []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        fused = flora_fx.fuse(graph)
        reports.append(flora_fx.report(fused))
        return fused

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_exact(compiled(x), expected)
    assert reports[0].ops_after["gemm"] == 4
    with torch.no_grad():
        model.q_a.weight.mul_(2)  # a live parameter: the pack sees it
    assert_exact(compiled(x), copy.deepcopy(model)(x))


def test_an_output_keeps_the_layout_it_had() -> None:
    """A slice of a pack is not contiguous; whoever receives it may call .view()."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = nn.Linear(D_IN, 10), nn.Linear(D_IN, 3), nn.Linear(3, 10)
            self.k = nn.Linear(D_IN, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            k = self.k(x)
            return self.w(x) + self.b(self.a(x)), k, k.view(-1)

    model = Model().double().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    for capture in KINDS:
        out = run(flora_fx.fuse(capture(model, x)), x)
        for found, expected in zip(out, model(x), strict=True):
            assert found.stride() == expected.stride()
            assert_exact(found, expected)


def test_declined_reads_are_still_accumulated() -> None:
    """An adapter that reads another value than its projection keeps a GEMM for A and accumulates B."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = nn.Linear(D_IN, 10), nn.Linear(7, 3), nn.Linear(3, 10)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.w(x) + self.b(self.a(other)) * 0.4

    model = Model().double().requires_grad_(False)
    x, other = torch.randn(4, D_IN, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    fused = flora_fx.fuse(flora_fx.capture(model, x, other))
    assert_exact(fused(x, other), model(x, other))
    report = flora_fx.report(fused)
    assert [d.reason for d in report.declines] == [Reason.READS_ANOTHER_VALUE]
    assert report.ops_after["gemm"] == 3
    assert report.ops_after["elementwise"] == 1  # the up-projection's bias


def test_a_scaled_read_is_another_value() -> None:
    model = Adapted(lambda m, x: m.w(x) + m.b(m.a(x * 0.3))).double().eval().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert_exact(fused(x), model(x))
    report = flora_fx.report(fused)
    assert [decline.reason for decline in report.declines] == [Reason.READS_ANOTHER_VALUE]
    assert (report.ops_after["gemm"], report.ops_after["elementwise"]) == (3, 1)


def test_layers_that_read_each_other_directly_leave_nothing_behind() -> None:
    """Without a norm in between, a group reads the very add that the group before it rewrote."""
    layers = [Adapted(FORMS["peft"]).double().eval() for _ in range(3)]
    for layer in layers[1:]:
        layer.w, layer.a = nn.Linear(10, 10, bias=False).double(), nn.Linear(10, 3, bias=False).double()
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    for capture in KINDS:
        fused = flora_fx.fuse(capture(model, x))
        assert_exact(run(fused, x), model(x))
        counts = flora_fx.report(fused).ops_after
        assert (counts["gemm"], counts["elementwise"]) == (6, 0)


@pytest.mark.parametrize("accumulate", ["addmm", "add"])
def test_a_path_whose_rows_are_regrouped_on_the_way(accumulate: Any) -> None:
    """[6, 1, r] becomes [1, 6, n]: the same rows, in a shape that would broadcast instead of match."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = linear(D_IN, 10), linear(D_IN, 3), linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            low = self.a(torch.tanh(x).reshape(6, 1, D_IN))
            return self.w(x).reshape(1, 6, 10) + self.b(low).reshape(1, 6, 10) * 0.3

    model = Model().double().requires_grad_(False)
    x = torch.randn(6, D_IN, dtype=torch.float64)
    fused = flora_fx.fuse(flora_fx.capture(model, x), config=FuseConfig(accumulate=accumulate))
    assert_exact(fused(x), model(x))
    assert len(flora_fx.report(fused).fused) == 1


def test_a_long_chain_of_residuals_without_shapes_is_linear_work() -> None:
    """Each layer reads the sum of all before it: walked path by path, 14 of them took seconds and 40 for ever."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = linear(4, 4), linear(4, 2), linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.w(x) + self.b(self.a(x)) * 0.3) * 0.1 + x

    model = nn.Sequential(*[Layer() for _ in range(60)]).double().requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert len(flora_fx.report(fused).fused) == 60


def test_a_factor_per_token_leaves_sizes_dynamic() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b, self.gate = linear(D_IN, 10), linear(D_IN, 3), linear(3, 10), linear(D_IN, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.b(self.a(x)) * torch.sigmoid(self.gate(x))

    model = Gated().double().requires_grad_(False)
    fused = flora_fx.fuse(dynamic(model, torch.randn(2, 5, D_IN, dtype=torch.float64)))
    assert len(flora_fx.report(fused).fused) == 1
    for shape in [(2, 5), (7, 3)]:
        x = torch.randn(*shape, D_IN, dtype=torch.float64)
        assert_exact(fused.module()(x), model(x))


def test_a_bias_of_the_up_projection_has_the_factors_of_its_adapter() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b, self.gate = linear(D_IN, 10), linear(D_IN, 3), linear(3, 10, True), linear(D_IN, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.b(self.a(x)) * torch.sigmoid(self.gate(x)) * 0.7

    model = Gated().double().requires_grad_(False)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert flora_fx.report(fused).fused == ("b.weight",)
    assert_exact(fused(x), model(x))
