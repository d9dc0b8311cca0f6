"""LoRA's own up-projections as further input columns: its down-projections run first, and nothing accumulates."""

from __future__ import annotations

import copy
import itertools
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig, backend
from flora_fx.backend import flora, last_report
from flora_fx.ir import Pack
from tests.adapters import D_IN, D_OUT, FORMS, RANK, TWO_ADAPTERS, Adapted, Siblings
from tests.parallel import columns, fuse_and_compare, pack_of, x_like
from tests.test_forms import assert_exact, captured, decomposed, dynamic, exported, run, traced

AHEAD, FOLDED = FuseConfig(layout="ahead"), FuseConfig(layout="ahead", fold_scale=True)
D_HIDDEN = 16


class Free(nn.Module):
    """Projections q, k, v and down-projections a, c of one read, o behind q and k; `form` says what is written."""

    def __init__(self, form: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v = nn.Linear(D_IN, 10), nn.Linear(D_IN, 6, bias=False), nn.Linear(D_IN, 8, bias=False)
        self.a, self.c = nn.Linear(D_IN, 3, bias=False), nn.Linear(D_IN, 5, bias=False)
        self.qa, self.qa2, self.ka = (nn.Linear(3, n, bias=False) for n in (10, 10, 6))
        self.qc, self.vc = nn.Linear(5, 10, bias=False), nn.Linear(5, 8, bias=False)
        self.biased = nn.Linear(3, 10)
        self.o = nn.Linear(D_HIDDEN, D_IN)
        self.oa, self.oc = nn.Linear(3, D_IN, bias=False), nn.Linear(5, D_IN, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)


def frozen(model: nn.Module) -> Any:
    return model.double().eval().requires_grad_(False)


def places(pack: Pack) -> dict[str, tuple[tuple[int, int], tuple[int, int] | None]]:
    """(rows, columns) of a pack's members, by name."""
    pieces = zip(pack.members, pack.slices, strict=True)
    return {name.removesuffix(".weight"): (piece.rows, piece.columns) for name, piece in pieces}


def parts(fused: Any) -> list[int]:
    """How many values are written beside each other for each widened GEMM."""
    return [len(node.args[0]) for node in fused.graph.nodes if node.name.startswith("cat") and node.args[1] == -1]


# Where everything stands


@pytest.mark.parametrize("capture", [traced, captured])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_two_gemms(form: str, capture: Callable[..., Any]) -> None:
    """The down-projections, and the base with the up-projections; but for what is no path or has no constant scale."""
    model, x = frozen(Adapted(FORMS[form], bias=True)), x_like()
    report = fuse_and_compare(capture(model, x), x, AHEAD)
    if form in ("tensor scale", "one A, two B"):
        assert columns(report) == []
    else:
        assert not report.declines
        assert columns(report) == (["b.weight", "b2.weight"] if form in TWO_ADAPTERS else ["b.weight"])
        assert report.ops_after["gemm"] == 2, str(report)


@pytest.mark.parametrize("config", [AHEAD, FOLDED, FuseConfig(layout="ahead", up="per_projection", accumulate="add")])
@pytest.mark.parametrize("scales", [(0.7, 0.7), (1.9, 0.7)])
def test_rows_and_columns_of_siblings(config: FuseConfig, scales: tuple[float, float]) -> None:
    """[q, q_b, 0; k, 0, 0; v, 0, v_b], in the order of the down-projections' rows, which are sorted by scale."""
    model, x = frozen(Siblings(scales)), x_like()
    expected = model(x)
    fused = flora_fx.fuse(captured(model, x), config=config)
    assert_exact(fused(x), expected)
    report, two_scales = flora_fx.report(fused), len(set(scales)) == 2 and not config.fold_scale
    q, v = ((5, 8), (0, 5)) if two_scales else ((0, 3), (3, 8))
    down = pack_of(report, "q_a.weight")
    assert places(down) == {"q_a": (q, None), "v_a": (v, None)}
    assert down.shape == (8, D_IN)
    pack = pack_of(report, "q.weight")
    assert places(pack) == {
        "q": ((0, 10), (0, D_IN)),
        "k": ((10, 16), (0, D_IN)),
        "v": ((16, 24), (0, D_IN)),
        "q_b": ((0, 10), (D_IN + q[0], D_IN + q[1])),
        "v_b": ((16, 24), (D_IN + v[0], D_IN + v[1])),
    }
    assert pack.shape == (24, D_IN + 8)
    packed = fused.get_buffer(f"_flora.{pack.name}").clone()
    for rows, beside in places(pack).values():
        assert packed[slice(*rows), slice(*beside)].all()  # type: ignore[misc]
        packed[slice(*rows), slice(*beside)] = 0  # type: ignore[misc]
    assert not packed.any()
    assert pack_of(report, "o_a.weight").shape == (4, 24)
    assert places(pack_of(report, "o.weight")) == {"o": ((0, D_IN), (0, 24)), "o_b": ((0, D_IN), (24, 28))}
    assert len(report.packs) == 4 + 2  # two with a bias
    # Beside x stands one part a scale: the z of all, or of each, multiplied by it. The second one is the model's own.
    assert parts(fused) == [3 if two_scales else 2, 3, 2]
    assert report.ops_after["elementwise"] == (1 if config.fold_scale else 4 if two_scales else 3)


@pytest.mark.parametrize(("scales", "beside"), [((0.7, 0.7), 2), ((0.7, 1.9), 3), ((1.9, -0.7), 3)])
def test_several_adapters_on_one_base(scales: tuple[float, float], beside: int) -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        return m.w(x) + m.b(m.a(x)) * scales[0] + m.b2(m.a2(x)) * scales[1]

    model, x = frozen(Adapted(form)), x_like()
    fuse_and_compare(captured(model, x), x, AHEAD)
    fused = flora_fx.fuse(captured(model, x), config=AHEAD)
    report, rows = flora_fx.report(fused), (0, D_OUT)
    first, second = (D_IN, D_IN + RANK), (D_IN + RANK, D_IN + 2 * RANK + 2)
    if scales[0] > scales[1]:
        second, first = (D_IN, D_IN + RANK + 2), (D_IN + RANK + 2, D_IN + 2 * RANK + 2)
    assert places(pack_of(report, "w.weight")) == {"w": (rows, (0, D_IN)), "b": (rows, first), "b2": (rows, second)}
    assert parts(fused) == [beside]
    assert report.ops_after["gemm"] == 2


def one_z_two_scales(m: Free, x: Tensor) -> tuple[Tensor, ...]:
    z = m.a(x)
    return m.q(x) + m.qa(z) * 0.7, m.v(x) + m.vc(m.c(x)) * 1.9, m.k(x) + m.ka(z) * 1.9


def one_z_twice_on_one_base(m: Free, x: Tensor) -> tuple[Tensor, ...]:
    z = m.a(x)
    return m.q(x) + m.qa(z) * 0.7 + m.qa2(z) * 0.7, m.k(x) + m.ka(z) * 0.7


@pytest.mark.parametrize("config", [AHEAD, FOLDED])
def test_one_value_beside_the_read_as_often_as_it_must(config: FuseConfig) -> None:
    """Once a scale; and once an up-projection that is written onto the same base."""
    model, x = frozen(Free(one_z_two_scales)), x_like()
    report = fuse_and_compare(captured(model, x), x, config)
    found = {name: at[1] for name, at in places(pack_of(report, "q.weight")).items() if at[1] != (0, D_IN)}
    if config.fold_scale:
        assert found == {"qa": (12, 15), "ka": (12, 15), "vc": (15, 20)}
    else:
        assert found == {"qa": (12, 15), "ka": (15, 18), "vc": (18, 23)}
    assert report.ops_after["gemm"] == 2

    report = fuse_and_compare(captured(frozen(Free(one_z_twice_on_one_base)), x), x, config)
    pack = pack_of(report, "q.weight")
    found = {name: at[1] for name, at in places(pack).items() if at[1] != (0, D_IN)}
    assert found == {"qa": (12, 15), "ka": (12, 15), "qa2": (15, 18)}
    assert pack.shape == (16, D_IN + 6)
    assert report.ops_after["gemm"] == 2


@pytest.mark.parametrize(("capture", "config"), [(captured, AHEAD), (decomposed, FOLDED)])
def test_transposed_weights(capture: Callable[..., Any], config: FuseConfig) -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = conv(D_OUT, D_IN)
            self.a, self.b = nn.Parameter(torch.randn(D_IN, 3)), nn.Parameter(torch.randn(3, D_OUT))

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + (x @ self.a @ self.b) * 1.4

    model = frozen(Transposed())
    model.w.bias.normal_()
    x = x_like()
    report = fuse_and_compare(capture(model, x), x, config)
    assert report.ops_after["gemm"] == 2
    pack = pack_of(report, "w.weight")
    assert places(pack) == {"w": ((0, D_OUT), (0, D_IN)), "b": ((0, D_OUT), (D_IN, D_IN + 3))}
    assert [piece.transposed for piece in pack.slices] == [True, True]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert (shapes["w.weight"], shapes["a"], shapes["b"]) == ((D_IN, D_OUT), (D_IN, 3), (3, D_OUT))


def all_flattened(m: Adapted, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D_IN)
    return (m.w(flat) + m.b(m.a(flat)) * 0.7).view(2, 5, D_OUT)


def base_flattened(m: Adapted, x: Tensor) -> Tensor:
    y = m.w(x.reshape(-1, D_IN)).view(2, 5, D_OUT)
    return y + m.b(m.a(x)) * 0.7 + m.b2(m.a2(x)) * 1.9


def path_flattened(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + m.b(m.a(x.reshape(-1, D_IN))).view(2, 5, D_OUT) * 0.7


@pytest.mark.parametrize(
    ("capture", "form"),
    [
        (traced, all_flattened),  # without shapes, the operands of the others' adds are not seen to agree
        *itertools.product((captured, decomposed), (all_flattened, base_flattened, path_flattened)),
    ],
)
def test_values_that_are_flattened_on_the_way(capture: Callable[..., Any], form: Any) -> None:
    x = x_like()
    report = fuse_and_compare(capture(frozen(Adapted(form, bias=True)), x), x, AHEAD)
    assert columns(report) == (["b.weight", "b2.weight"] if form is base_flattened else ["b.weight"])
    assert report.ops_after["gemm"] == 2


def test_sizes_stay_dynamic() -> None:
    model = frozen(Siblings((0.7, 1.9)))
    fused = flora_fx.fuse(dynamic(model, x_like()), config=AHEAD).module()
    for shape in [(2, 5), (7, 3), (3, 11)]:
        x = x_like(*shape)
        assert_exact(fused(x), model(x))


# Down-projections that others wait for


def hidden(q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(torch.cat([q, k], -1))


def own_and_others(m: Free, x: Tensor) -> Tensor:
    """a is written onto q, which reads the same; c onto o, further down."""
    z = m.c(x)
    return m.o(hidden(m.q(x) + m.qa(m.a(x)) * 0.7, m.k(x))) + m.oc(z) * 1.3


def own_and_others_of_one_base(m: Free, x: Tensor) -> Tensor:
    z = m.c(x)
    return m.o(hidden(m.q(x) + m.qa(m.a(x)) * 0.7, x[..., :6])) + m.oc(z) * 1.3


def others_alone(m: Free, x: Tensor) -> Tensor:
    z = m.c(x)
    return m.o(hidden(m.q(x), m.k(x))) + m.oc(z) * 1.3


def one_for_both(m: Free, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.o(hidden(m.q(x) + m.qa(z) * 0.7, m.k(x))) + m.oa(z) * 1.3


@pytest.mark.parametrize(
    ("form", "shape", "down"),
    [
        (own_and_others, (32, D_IN + 3), ["a"]),  # 10 + 6 + 5 rows
        (own_and_others_of_one_base, (10, D_IN + 3), ["a", "c"]),
        (others_alone, (32, D_IN), []),
        (one_for_both, (16, D_IN + 3), ["a"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_only_others_wait_for_joins_several_bases(form: Any, shape: tuple[int, int], down: list[str]) -> None:
    x = x_like()
    report = fuse_and_compare(captured(frozen(Free(form)), x), x, AHEAD)
    assert pack_of(report, "q.weight").shape == shape
    assert ("c.weight" in pack_of(report, "q.weight").members) == (shape[0] == 32)
    packs = [pack for pack in report.packs if set(pack.members) <= {"a.weight", "c.weight"}]
    assert [pack.members for pack in packs] == ([tuple(f"{name}.weight" for name in down)] if down else [])
    assert report.ops_after["gemm"] == (3 if down else 2)
    assert not report.declines


# What accumulates instead


def base_is_returned(m: Adapted, x: Tensor) -> tuple[Tensor, ...]:
    y = m.w(x)
    return y + m.b(m.a(x)) * 0.7, y


def base_is_read_later(m: Adapted, x: Tensor) -> Tensor:
    y = m.w(x)
    return (y + m.b(m.a(x)) * 0.7) * torch.tanh(y)


def add_in_between(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + x[..., :D_OUT] + m.b(m.a(x)) * 0.7


def factor_per_token(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + m.b(m.a(x)) * torch.sigmoid(x[..., :1])


def activation(m: Adapted, x: Tensor) -> Tensor:
    return m.w(x) + m.b(torch.relu(m.a(x))) * 0.7


def up_is_shared(m: Adapted, x: Tensor) -> tuple[Tensor, ...]:
    z = m.a(x)
    return m.w(x) + m.b(z) * 0.7, m.b(torch.tanh(z))


def base_is_shared(m: Adapted, x: Tensor) -> tuple[Tensor, ...]:
    return m.w(x) + m.b(m.a(x)) * 0.7, m.w(torch.tanh(x))


def base_is_changed(m: Adapted, x: Tensor) -> Tensor:
    y = m.w(x)
    y.tanh_()
    return y + m.b(m.a(x)) * 0.7


def low_is_changed(m: Adapted, x: Tensor) -> Tensor:
    z, y = m.a(x), m.w(x)
    z.tanh_()
    return y + m.b(z) * 0.7


@pytest.mark.parametrize(
    "form",
    [
        base_is_returned,
        base_is_read_later,
        base_is_shared,
        up_is_shared,
        add_in_between,
        activation,
        factor_per_token,
        base_is_changed,
        low_is_changed,
    ],
)
def test_what_is_not_widened_is_accumulated_and_exact(form: Any) -> None:
    x = x_like()
    program = captured(frozen(Adapted(form, bias=True)), x)
    for config in (AHEAD, FOLDED):
        report = fuse_and_compare(program, x, config)
        assert columns(report) == []
        assert report.fused == (() if form in (base_is_changed, low_is_changed) else ("b.weight",))
        if form in (base_is_returned, base_is_read_later, add_in_between):
            assert report.ops_after["gemm"] == 3


def test_a_bias_of_the_up_projection_accumulates() -> None:
    model, x = frozen(Adapted(FORMS["peft"], bias=True, ab_bias=True)), x_like()
    report = fuse_and_compare(captured(model, x), x, AHEAD)
    assert (columns(report), report.fused, report.ops_after["gemm"]) == ([], ("b.weight",), 3)
    model.b.bias = None  # the down-projection's is in z
    report = fuse_and_compare(captured(model, x), x, AHEAD)
    assert (columns(report), report.fused, report.ops_after["gemm"]) == (["b.weight"], ("b.weight",), 2)


def sibling_is_returned(m: Free, x: Tensor) -> tuple[Tensor, ...]:
    q = m.q(x)
    return m.v(x) + m.vc(m.c(x)) * 0.7, q + m.qa(m.a(x)) * 0.7, q


def biased_then_plain(m: Free, x: Tensor) -> Tensor:
    return m.q(x) + m.biased(m.a(x)) * 0.7 + m.qc(m.c(x)) * 0.7


def plain_then_biased(m: Free, x: Tensor) -> Tensor:
    return m.q(x) + m.qc(m.c(x)) * 0.7 + m.biased(m.a(x)) * 0.7


def gated_then_plain(m: Free, x: Tensor) -> Tensor:
    return m.q(x) + m.qa(m.a(x)) * torch.sigmoid(x[..., :1]) + m.qc(m.c(x)) * 0.7


@pytest.mark.parametrize(
    ("form", "wide"),
    [
        (sibling_is_returned, ["vc"]),
        (biased_then_plain, ["qc"]),
        (plain_then_biased, ["qc"]),
        (gated_then_plain, []),  # what is written onto another sum stands where it stood
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_some_paths_of_a_group_accumulate_and_some_do_not(form: Any, wide: list[str]) -> None:
    x = x_like()
    program = captured(frozen(Free(form)), x)
    for config in (AHEAD, FOLDED):
        report = fuse_and_compare(program, x, config)
        assert columns(report) == [f"{name}.weight" for name in wide]
        assert len(report.fused) == 2
        assert pack_of(report, "a.weight").members == ("a.weight", "c.weight")  # what accumulates comes first
        assert report.ops_after["gemm"] == (3 if wide else 4)


@pytest.mark.parametrize("trained", ["q.weight", "k.bias", "q_a.weight", "q_b.weight"])
def test_nothing_that_trains_is_stored_as_columns(trained: str) -> None:
    """Nor anything that reads what it reads; the gradients are the unfused model's."""
    model, x = frozen(Siblings()), x_like()
    model.get_parameter(trained).requires_grad_(True)
    reference = copy.deepcopy(model)
    reference(x).square().sum().backward()
    for capture in (traced, captured):
        model.zero_grad()
        fused = flora_fx.fuse(capture(model, x), config=AHEAD)
        assert columns(flora_fx.report(fused)) == ["o_b.weight", *(["v_b.weight"] if trained == "q_b.weight" else [])]
        fused(x).square().sum().backward()
        found, expected = model.get_parameter(trained).grad, reference.get_parameter(trained).grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert [name for name, p in model.named_parameters() if p.grad is not None] == [trained]


def test_write_accumulated_is_what_beside_is() -> None:
    model, x = frozen(Siblings()), x_like()
    counts = []
    for config in (FuseConfig(layout="beside"), FuseConfig(layout="ahead", write="accumulated")):
        report = fuse_and_compare(captured(model, x), x, config)
        assert columns(report) == []
        counts.append((report.ops_after, [pack.members for pack in report.packs]))
    assert counts[0] == counts[1]


class Mixed(nn.Module):
    """Projections in bfloat16, adapters in float32, and sums that stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = (nn.Linear(D_IN, n, dtype=torch.bfloat16) for n in (10, 8))
        self.qa, self.va, self.vc = (nn.Linear(D_IN, n, bias=False) for n in (3, 5, 2))
        self.qb, self.vb, self.vd = (
            nn.Linear(3, 10, bias=False),
            nn.Linear(5, 8, bias=False),
            nn.Linear(2, 8, bias=False),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = x.float()
        q = self.q(x) + self.qb(self.qa(wide)) * 0.3
        return q, self.v(x) + self.vb(self.va(wide)) * 0.6 + self.vd(self.vc(wide)) * 0.6


@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_an_allowed_cast_leaves_the_results_their_dtype(layout: Any) -> None:
    model = Mixed().requires_grad_(False)
    x = torch.randn(4, D_IN, dtype=torch.bfloat16)
    for capture in (captured, exported):
        fused = flora_fx.fuse(capture(model, x), config=FuseConfig(layout=layout, allow_cast=True))
        report = flora_fx.report(fused)
        # What is added to a sum in float32 needs no cast.
        assert columns(report) == (["qb.weight", "vb.weight"] if layout == "ahead" else [])
        assert len(report.fused) == 3
        for found, expected in zip(run(fused, x), model(x), strict=True):
            assert found.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# The backend


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What Inductor gets: the names of its operations, graph by graph."""
    seen: list[set[str]] = []

    def compile_(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append({getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(backend, "_compiler", lambda *_: compile_)
    return seen


@pytest.mark.parametrize("rows", [1, 4])
def test_one_row_is_multiplied_in_parts(rows: int, inner: list[set[str]]) -> None:
    model, x = frozen(Siblings((0.7, 1.9))), x_like(1, rows)
    expected = model(x)
    compiled = torch.compile(model, backend="flora", fullgraph=True, options={"flora.layout": "ahead"})
    with torch.no_grad():
        assert_exact(compiled(x), expected)
        for parameter in model.parameters():
            parameter.mul_(1.25)
        assert_exact(compiled(x), copy.deepcopy(model)(x))
    report = last_report()
    assert report is not None
    assert columns(report) == ["o_b.weight", "q_b.weight", "v_b.weight"]
    assert "accumulate" not in inner[0]
    assert ("matrix_vector" in inner[0]) == (rows == 1)


def under_autocast(m: Adapted, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.w(x) + m.b(m.a(x)) * 0.7


def base_and_z_under_no_grad(m: Adapted, x: Tensor) -> Tensor:
    with torch.no_grad():
        y, z = m.w(x), m.a(x)
    return torch.tanh(x)[..., :D_OUT] * (y + m.b(z) * 0.7)


def z_under_no_grad(m: Adapted, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.a(x)
    return m.w(x) + m.b(z) * 0.7


@pytest.mark.parametrize(
    "form", [FORMS["peft"], under_autocast, base_and_z_under_no_grad, z_under_no_grad], ids=lambda f: f.__name__
)
def test_regions_of_other_modes_are_not_crossed(form: Any) -> None:
    """Outputs, and the gradient of the input, which stops where it stopped."""
    model = frozen(Adapted(form)).float()
    options: dict[str, Any] = {"flora.inner": "aot_eager", "flora.layout": "ahead"}
    call = torch.compile(copy.deepcopy(model), backend=flora, fullgraph=True, options=options)
    x = x_like().float()
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    y, wanted = call(found), model(expected)
    half = 2e-2 if form is under_autocast else 1e-5
    torch.testing.assert_close(y, wanted, rtol=half, atol=half)
    y.sin().sum().backward()
    wanted.sin().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=2 * half, atol=2 * half)
    report = last_report()
    assert report is not None
    assert bool(columns(report)) == (form in (FORMS["peft"], under_autocast))


# Reports


@pytest.mark.parametrize(
    "model",
    [
        Siblings((0.7, 0.7)),
        Siblings((0.7, 1.9)),
        *map(Free, [own_and_others, own_and_others_of_one_base, others_alone, one_for_both, sibling_is_returned]),
    ],
    ids=lambda model: model.form.__name__ if isinstance(model, Free) else str(model.scales),
)
def test_the_sketches_count_the_gemms_there_are(model: nn.Module) -> None:
    program = captured(frozen(model), x_like())
    for layout in ("joined", "beside", "ahead"):
        for up in ("block_diagonal", "per_projection"):
            for write in ("widened", "accumulated"):
                config = FuseConfig(layout=layout, up=up, write=write)
                report = flora_fx.report(flora_fx.fuse(copy.deepcopy(program), config=config))
                sketched = sum(sketch.gemms for sketch in report.sketches)
                onto_o = {"oa.weight", "oc.weight"} & set(report.fused)
                alone = 2 if onto_o and write == "accumulated" else 0  # o, and what is written onto it: in no group
                assert sketched + alone == report.ops_after["gemm"], config


@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_a_sketch_of_down_projections_alone(layout: Any) -> None:
    def form(m: Adapted, x: Tensor) -> Tensor:
        other = x * 0.3
        return m.w(x) + m.b(m.a(other)) + m.b2(m.a2(other))

    x = x_like()
    report = fuse_and_compare(captured(frozen(Adapted(form)), x), x, FuseConfig(layout=layout))
    assert [sketch.gemms for sketch in report.sketches] == [1]
    assert report.ops_after["gemm"] == 1 + 3  # w, and two that accumulate where they stand


def test_the_picture_shows_down_projections_of_their_own(tmp_path: Path) -> None:
    x = x_like()
    report = flora_fx.report(flora_fx.fuse(captured(frozen(Siblings()), x), config=AHEAD))
    path = report.draw(tmp_path / "packs.svg")
    texts = [element.text for element in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "7 GEMMs, 4 elementwise  →  2 GEMMs" in texts
    assert {"W q", "A q_a", "B q_b", "z", "A q_a  [3]"} <= set(texts)
    assert "y" not in texts  # nothing accumulates
    assert [(sketch.apart, [path.down for path in sketch.widened]) for sketch in report.sketches] == [
        (2, [0, 1]),
        (1, [0]),
    ]
    report = flora_fx.report(flora_fx.fuse(captured(frozen(Free(own_and_others)), x), config=AHEAD))
    first, second = report.sketches
    assert ([name for name, _ in first.downs], first.apart) == (["a.weight", "c.weight"], 1)
    assert [path.down for path in (*first.widened, *second.widened)] == [0, None]


@pytest.mark.parametrize("capture", [traced, captured, exported])
def test_fusing_twice_changes_nothing(capture: Callable[..., Any]) -> None:
    fused = flora_fx.fuse(capture(frozen(Siblings((0.7, 1.9))), x_like()), config=AHEAD)
    before, report = str(fused.graph), flora_fx.report(fused)
    for config in (AHEAD, FuseConfig()):
        with pytest.warns(UserWarning, match="fused already and is returned as it is: config has no effect on it"):
            again = flora_fx.fuse(fused, config=config)
        assert again is fused
        assert str(again.graph) == before
        assert flora_fx.report(again) == report


# Storage


@pytest.mark.parametrize("config", [AHEAD, FOLDED])
def test_captures_share_their_packs_and_a_copy_has_its_own(config: FuseConfig) -> None:
    model, x = frozen(Siblings((0.7, 1.9))), x_like()
    one = flora_fx.fuse(captured(model, x), config=config)
    # What holds scaled copies is not shared.
    two = one if config.fold_scale else flora_fx.fuse(captured(model, x), config=config)
    twin = copy.deepcopy(one)
    before = twin(x)
    for name, packed in one.named_buffers():
        assert packed.data_ptr() == two.get_buffer(name).data_ptr(), name
        assert packed.data_ptr() != twin.get_buffer(name).data_ptr(), name
    for part in ("_a", "_b", ""):
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight").endswith(part) and parameter.dim() == 2:
                parameter.mul_(1.25)
        expected = model(x)
        assert_exact(one(x), expected)
        assert_exact(two(x), expected)
    assert_exact(twin(x), before)
    twin.load_state_dict(model.state_dict())
    assert_exact(twin(x), model(x))


@pytest.mark.parametrize("config", [AHEAD, FOLDED])
def test_another_dtype(config: FuseConfig) -> None:
    model, x = Siblings((0.7, 1.9)).eval().requires_grad_(False), x_like()
    fused = flora_fx.fuse(traced(model, x), config=config)
    torch.testing.assert_close(fused(x.float()), model(x.float()))
    fused.to(torch.float64)
    assert_exact(fused(x), copy.deepcopy(model)(x))
    packed = fused.get_buffer("_flora.qkv")
    assert packed.dtype == torch.float64
    assert model.q.weight.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    tied = model.q_b.weight.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert tied != config.fold_scale
