"""Adapters beside quantized projections, fused."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.quantized import QuantizedLinear, QuantizedWeight

from .weights import affine, codebook

OPERATOR = torch.ops.flora_fx.quantized_linear.default
K, ROWS, RANKS, SCALES = 32, {"q": 12, "k": 6, "v": 8}, {"q": 3, "k": 2, "v": 4}, {"q": 2.0, "k": 2.0, "v": 0.5}


class Adapted(nn.Module):
    """Projections of one value, quantized or not, each with a LoRA of its own rank beside it."""

    def __init__(self, weights: dict[str, QuantizedWeight | None], adapted: str = "qkv", biased: str = "k") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.names = list(weights)
        for name, weight in weights.items():
            rows = ROWS[name]
            bias = nn.Parameter(torch.randn(rows)) if name in biased else None
            layer = nn.Linear(K, rows, bias is not None) if weight is None else QuantizedLinear(weight, bias)
            setattr(self, name, layer)
            if name in adapted:
                self.register_parameter(f"{name}_a", nn.Parameter(torch.randn(RANKS[name], K)))
                self.register_parameter(f"{name}_b", nn.Parameter(torch.randn(rows, RANKS[name])))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for name in self.names:
            y = getattr(self, name)(x)
            if hasattr(self, f"{name}_a"):
                low = nn.functional.linear(x, getattr(self, f"{name}_a"))
                y = y + SCALES[name] * nn.functional.linear(low, getattr(self, f"{name}_b"))
            found.append(torch.tanh(y))
        return torch.cat(found, -1)

    def in_float64(self, x: Tensor) -> Tensor:
        """The same over dequantized weights."""
        plain = copy.deepcopy(self)
        for name in self.names:
            if isinstance(layer := getattr(plain, name), QuantizedLinear):
                setattr(plain, name, layer.dequantize(torch.float32))
        return plain.double()(x.double())


def of_kind(kind: str, **settings: Any) -> dict[str, QuantizedWeight | None]:
    if kind in ("nf4", "fp4"):
        return {name: codebook(rows, K, kind=kind, seed=rows) for name, rows in ROWS.items()}
    order = torch.randperm(K) if kind == "act-order" else None
    bits = 8 if kind == "8 bits" else 4
    return {
        name: affine(rows, K, bits=bits, order=None if order is None else order.clone(), seed=rows, **settings)[0]
        for name, rows in ROWS.items()
    }


def calls(graph: Any) -> Counter[Any]:
    return Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


KINDS = ["4 bits", "8 bits", "act-order", "nf4", "fp4"]


AHEAD, EACH = FuseConfig(layout="ahead"), FuseConfig(up="per_projection", fold_scale=True)


@pytest.mark.parametrize(
    ("kind", "config", "exported"),
    [
        *((kind, None, False) for kind in KINDS),
        ("nf4", AHEAD, False),
        ("act-order", EACH, True),
        ("4 bits", AHEAD, True),
    ],
)
def test_bases_of_one_read_are_one_operator_and_the_downs_one_gemm(
    kind: str, config: FuseConfig | None, exported: bool
) -> None:
    model, x = Adapted(of_kind(kind)), torch.randn(2, 5, K)
    wanted = model.in_float64(x)
    graph = torch.export.export(model, (x,)) if exported else flora_fx.capture(model, x)
    fused: Any = flora_fx.fuse(graph, config=config)
    report = flora_fx.report(fused)
    assert calls(fused)[OPERATOR] == 1
    assert sorted(report.fused) == ["k_b", "q_b", "v_b"]
    assert report.declines == ()
    assert report.ops_before["gemm"] == 9
    blocks = 3 if config is not None and config.up == "per_projection" else 2  # q and k have one scale, v another
    assert report.ops_after["gemm"] == 2 + blocks
    assert "4 bits" in str(report) or "8 bits" in str(report)
    assert "no row in floating point" in str(report)
    reference = nn.Module()
    reference.forward = lambda _: wanted  # type: ignore[method-assign]
    assert flora_fx.verify(reference, fused, x).max_rel < 1e-12
    runs = fused.module() if exported else fused
    torch.testing.assert_close(runs(x), model(x), rtol=1e-4, atol=1e-4)


def test_packed_parts_share_their_memory_and_keep_their_names() -> None:
    model, x = Adapted(of_kind("4 bits")), torch.randn(2, K)
    names = set(flora_fx.capture(model, x).state_dict())
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert set(fused.state_dict()) == names
    for part in ("codes", "scales", "zeros"):
        q, k = fused.get_buffer(f"q.{part}"), fused.get_buffer(f"k.{part}")
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert q is model.q.get_buffer(part)


def test_other_codes_loaded_into_the_fused_graph_are_what_it_computes_with() -> None:
    model, x = Adapted(of_kind("nf4")), torch.randn(2, K)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    other = Adapted({name: codebook(rows, K, seed=90 + rows) for name, rows in ROWS.items()})
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x).double(), other.in_float64(x), rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(fused)
    torch.testing.assert_close(copied(x), fused(x), rtol=0, atol=0)


def test_bases_that_differ_stay_apart_and_the_report_says_why() -> None:
    weights = of_kind("4 bits")
    weights["v"] = affine(ROWS["v"], K, block=8)[0]
    model, x = Adapted(weights), torch.randn(2, 5, K)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    [decline] = flora_fx.report(fused).declines
    assert decline.reason is Reason.WEIGHT_NOT_DENSE
    assert "q.codes and v.codes read one value and stay apart: their groups are 16 and 8" in decline.detail
    assert calls(fused)[OPERATOR] == 2
    assert flora_fx.verify(model, fused, x).max_rel < 1e-12


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda: affine(ROWS["v"], K, bits=8)[0], "bits are 4 and 8"),
        (lambda: affine(ROWS["v"], K, dtype=torch.bfloat16)[0], "scales are float16 and bfloat16"),
        (lambda: affine(ROWS["v"], K, zeros=False)[0], "one has zero points"),
        (lambda: affine(ROWS["v"], K, ordered=True)[0], "another order"),
        (lambda: codebook(ROWS["v"], K), "kinds are affine and nf4"),
    ],
)
def test_what_may_differ(changed: Any, told: str) -> None:
    model, x = Adapted(of_kind("4 bits") | {"v": changed()}), torch.randn(2, K)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    [decline] = flora_fx.report(fused).declines
    assert told in decline.detail
    assert flora_fx.verify(model, fused, x).max_rel < 1e-12


def test_two_orders_of_columns_are_two_operators() -> None:
    model, x = Adapted(of_kind("act-order") | {"v": affine(ROWS["v"], K, ordered=True)[0]}), torch.randn(2, K)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert calls(fused)[OPERATOR] == 2
    assert "another order" in flora_fx.report(fused).declines[0].detail
    assert flora_fx.verify(model, fused, x).max_rel < 1e-12


def test_biases_of_other_dtypes_stay_apart() -> None:
    model, x = Adapted(of_kind("nf4"), biased="qk"), torch.randn(2, K)
    model.k.bias = nn.Parameter(model.k.bias.bfloat16(), requires_grad=False)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert any("biases" in decline.detail for decline in flora_fx.report(fused).declines)
    assert flora_fx.verify(model, fused, x).max_rel < 1e-12


def test_a_base_in_floating_point_takes_the_downs() -> None:
    weights = of_kind("nf4")
    weights["v"] = None
    model, x = Adapted(weights), torch.randn(2, 5, K)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    report = flora_fx.report(fused)
    assert calls(fused)[OPERATOR] == 1
    assert "only one of them is quantized" in report.declines[0].detail
    assert any({"v.weight", "q_a", "k_a", "v_a"} == set(pack.members) for pack in report.packs)
    assert flora_fx.verify(model, fused, x).max_rel < 1e-12


def test_without_adapters_nothing_packs_unless_it_is_asked_for() -> None:
    model, x = Adapted(of_kind("nf4"), adapted=""), torch.randn(2, K)
    graph = flora_fx.capture(model, x)
    assert calls(flora_fx.fuse(graph))[OPERATOR] == 3
    packed = flora_fx.fuse(graph, config=FuseConfig(pack_base=True))
    assert calls(packed)[OPERATOR] == 1
    assert flora_fx.verify(graph, packed, x).max_rel < 1e-12


def test_one_base_alone_keeps_its_operator() -> None:
    model, x = Adapted({"q": of_kind("nf4")["q"]}), torch.randn(2, K)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert flora_fx.report(fused).ops_after["gemm"] == 3
    assert flora_fx.report(fused).fused == ("q_b",)
    assert flora_fx.verify(model, fused, x).max_rel < 1e-12


def test_a_bias_that_trains_keeps_its_base_apart_and_has_its_gradient() -> None:
    model, x = Adapted(of_kind("nf4"), biased="qk"), torch.randn(2, K)
    model.k.bias.requires_grad_(True)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert calls(fused)[OPERATOR] == 2
    fused(x).sum().backward()
    [found] = [fused.get_parameter("k.bias").grad]
    model.k.bias.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(found, model.k.bias.grad)


def test_adapters_train_beside_packed_codes() -> None:
    model, x = Adapted(of_kind("act-order")).double(), torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in model.named_parameters() if name[1:] in ("_a", "_b")]
    trained = [model.get_parameter(name).requires_grad_(True) for name in names]
    pull = torch.randn(2, 5, sum(ROWS.values()), dtype=torch.float64)
    wanted = torch.autograd.grad((model(x) * pull).sum(), [x, *trained])
    graph = flora_fx.capture(model, x)
    fused = flora_fx.fuse(graph)
    assert calls(fused)[OPERATOR] == 1
    found = torch.autograd.grad((fused(x) * pull).sum(), [x, *(fused.get_parameter(name) for name in names)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_symbolic_trace_knows_no_shapes_and_is_left() -> None:
    model, x = Adapted(of_kind("nf4")), torch.randn(2, K)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    assert {decline.reason for decline in flora_fx.report(fused).declines} == {Reason.SHAPE_UNKNOWN}
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_allow_cast_leaves_codes_alone() -> None:
    model = Adapted(of_kind("nf4")).bfloat16()
    for name in "qkv":
        for end in "ab":
            part = getattr(model, f"{name}_{end}")
            part.data = part.data.float()
    x = torch.randn(2, K, dtype=torch.bfloat16)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            inner, wide = self.inner, x.float()
            y = inner.q(x)
            return (y + nn.functional.linear(nn.functional.linear(wide, inner.q_a), inner.q_b) * 2.0).to(x.dtype)

    fused = flora_fx.fuse(flora_fx.capture(Cast(), x), config=FuseConfig(allow_cast=True))
    torch.testing.assert_close(fused(x), Cast()(x))
    assert {decline.reason for decline in flora_fx.report(fused).declines} == {Reason.DTYPE_DIFFERS}


def test_two_quantized_layers_are_no_adapter() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down = QuantizedLinear(codebook(32, 32)), QuantizedLinear(codebook(16, 32, seed=1))
            self.up = QuantizedLinear(codebook(32, 16, seed=2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model, x = Narrow(), torch.randn(3, 32)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    assert flora_fx.report(fused).fused == ()
    assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("trains", [True, False])
def test_the_backend_packs_the_downs_and_gives_exact_gradients(trains: bool) -> None:
    model = Adapted(of_kind("nf4")).double()
    x = torch.randn(2, 5, K, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters() if name[1:] in ("_a", "_b")]
    for name in names:
        model.get_parameter(name).requires_grad_(trains)
    compiled = torch.compile(model, backend="flora", fullgraph=True, options={"flora.inner": "aot_eager"})
    found = compiled(x)
    torch.testing.assert_close(found, model(x), rtol=1e-10, atol=1e-10)
    report = flora_fx.backend.last_report()
    assert report is not None
    assert len(report.fused) == 3
    assert [pack.shape for pack in report.packs if len(pack.slices) == 3] == [(sum(RANKS.values()), K)]
    assert {decline.reason for decline in report.declines} == {Reason.READS_ANOTHER_VALUE}
    assert all(decline.detail.endswith("packs with other down-projections alone") for decline in report.declines)
    if trains:
        parameters = [model.get_parameter(name) for name in names]
        pairs = [torch.autograd.grad(y.square().sum(), parameters) for y in (found, model(x))]
        torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-10)
