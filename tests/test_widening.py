"""Backward fusion: an up-projection as further input columns of the projection that writes the same output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig, backend
from flora_fx.backend import last_report
from flora_fx.ir import Role
from flora_fx.passes.plan.layout import ALIGNED
from tests.parallel import (
    CONFIGS,
    D_IN,
    D_MID,
    D_OTHER,
    D_OUT,
    Form,
    Wide,
    columns,
    fuse_and_compare,
    middle,
    pack_of,
    plain,
    programs,
    silu,
    tensors,
    wide,
    x_like,
)
from tests.test_forms import assert_exact, captured, decomposed, exported, traced


def lora_first(m: Wide, x: Tensor) -> Tensor:
    z, u = m.a(x), middle(m, x)
    return m.o(u) + m.lb(m.la(u)) * 0.3 + m.b(z) * 0.7


def lora_last(m: Wide, x: Tensor) -> Tensor:
    z, u = m.a(x), middle(m, x)
    return m.o(u) + m.b(z) * 0.7 + m.lb(m.la(u)) * 0.3


def one_z_two_bases(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z, u = m.a(x), middle(m, x)
    return m.o(u) + m.b(z) * 0.7, m.p(u) + m.bp(z) * 0.7


def one_z_two_bases_two_scales(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z, u = m.a(x), middle(m, x)
    return m.o(u) - m.b(z) * 0.7, m.p(u) + m.bp(z) * 1.9


def one_z_two_writers(m: Wide, x: Tensor) -> Tensor:
    z, u = m.a(x), middle(m, x)
    return m.o(u) + m.b(z) * 0.7 + m.b_too(z) * 0.7


def z_is_returned(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z = m.a(x)
    return m.o(middle(m, x)) + 0.7 * m.b(z), z


def with_a_sibling(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z, u = m.a(x), middle(m, x)
    return m.p(u), m.o(u) + m.b(z) * 0.7


def no_scale(m: Wide, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.b(z) + m.o(middle(m, x))


def relu(m: Wide, x: Tensor) -> Tensor:
    z = torch.relu(m.a(x))
    return m.o(middle(m, x)) + m.b(z) * 0.7


def two_paths(m: Wide, x: Tensor) -> Tensor:
    z, w = m.a(x), m.a2(x)
    return m.o(middle(m, x)) + m.b(z) * 0.7 + m.b2(w) * 1.3


def two_paths_added_first(m: Wide, x: Tensor) -> Tensor:
    z, w = m.a(x), m.a2(x)
    return m.o(middle(m, x)) + (m.b(z) * 0.7 + m.b2(w) * 1.3)


FORMS: dict[str, tuple[Form, str, str, int]] = {
    "plain": (plain, "b", "b", 2),
    "no scale": (no_scale, "b", "b", 2),
    "relu": (relu, "b", "", 2),
    "silu": (silu, "b", "", 2),
    "two paths": (two_paths, "b b2", "b", 2),
    "two paths added first": (two_paths_added_first, "b b2", "b b2", 2),
    "one z, two bases": (one_z_two_bases, "b bp", "b bp", 2),
    "one z, two bases, two scales": (one_z_two_bases_two_scales, "b bp", "b bp", 2),
    "one z, two writers": (one_z_two_writers, "b b_too", "b", 2),
    "z is returned": (z_is_returned, "b", "b", 2),
    "beside a base that nothing is written onto": (with_a_sibling, "b", "b", 2),
    "LoRA, then FFBA": (lora_first, "b", "", 3),
    "FFBA, then LoRA": (lora_last, "b", "b", 3),
}
"""What becomes columns, what does in a graph without shapes (where it must be seen that they agree), GEMMs left."""


def weights(names: str) -> list[str]:
    return [f"{name}.weight" for name in names.split()]


@pytest.mark.parametrize("form", FORMS)
def test_an_up_projection_becomes_columns(form: str) -> None:
    function, wanted, without_shapes, gemms = FORMS[form]
    model, x = wide(function, bias=True), x_like()
    given = programs(model, x)
    for kind, program in given.items():
        report = fuse_and_compare(program, x)
        assert columns(report) == weights(without_shapes if kind == "traced" else wanted), kind
        if kind != "traced" or without_shapes == wanted:
            assert not report.declines
            assert report.ops_after["gemm"] == gemms, str(report)
    for config in CONFIGS:
        report = fuse_and_compare(given["module"], x, config)
        own = " lb" if config.layout == "ahead" and "LoRA" in form else ""
        assert columns(report) == weights(wanted + own)
        if config.fold_scale:
            assert report.ops_after["elementwise"] == 1  # h + k
        if config.layout != "beside":
            unrolled = config.accumulate == "unrolled" and "LoRA" in form  # its up-projection is no GEMM then
            assert report.ops_after["gemm"] == gemms - unrolled
    report = fuse_and_compare(given["module"], x, FuseConfig(write="accumulated"))
    assert columns(report) == []
    assert set(weights(wanted)) <= set(report.fused)


@pytest.mark.parametrize("form", ["plain", "one z, two bases, two scales", "LoRA, then FFBA"])
def test_after_decompositions(form: str) -> None:
    function, wanted, _, gemms = FORMS[form]
    x = x_like()
    report = fuse_and_compare(decomposed(wide(function, bias=True), x), x)
    assert columns(report) == weights(wanted)
    assert report.ops_after["gemm"] == gemms


def test_where_columns_stand() -> None:
    """[o, b, b_too; p, 0, 0]: each up-projection in the rows of its base, behind the width of what the base reads."""

    def form(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
        z, w, u = m.a(x), m.a2(x), middle(m, x)
        return m.p(u) + m.bp(z) * 0.7, m.o(u) + m.b(z) * 0.7 + m.b2(w) * 0.7

    fused = flora_fx.fuse(captured(model := wide(form), x_like()))
    pack = pack_of(flora_fx.report(fused), "o.weight")
    at = {name: (piece.rows, piece.columns) for name, piece in zip(pack.members, pack.slices, strict=True)}
    assert at == {
        "p.weight": ((0, D_OTHER), (0, D_MID)),
        "o.weight": ((D_OTHER, D_OTHER + D_OUT), (0, D_MID)),
        "bp.weight": ((0, D_OTHER), (D_MID, D_MID + 3)),
        "b.weight": ((D_OTHER, D_OTHER + D_OUT), (D_MID, D_MID + 3)),
        "b2.weight": ((D_OTHER, D_OTHER + D_OUT), (D_MID + 3, D_MID + 8)),
    }
    assert pack.shape == (D_OTHER + D_OUT, D_MID + 8)
    packed = fused.get_buffer(f"_flora.{pack.name}")
    corner = packed[:D_OTHER, D_MID + 3 :]
    assert not corner.any()
    assert torch.equal(packed[D_OTHER:, D_MID + 3 :], model.b2.weight)
    assert model.b2.weight.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


@pytest.mark.parametrize("capture", [captured, exported])
@pytest.mark.parametrize(
    ("bias", "up_bias"),
    [
        (True, False),
        (False, True),
        (True, True),
    ],
)
def test_bias_on_base_and_on_the_up_projection(capture: Callable[..., Any], bias: bool, up_bias: bool) -> None:
    x = x_like()
    program = capture(wide(plain, bias=bias, up_bias=up_bias), x)
    for config in (FuseConfig(), FuseConfig(fold_scale=True)):
        assert fuse_and_compare(program, x, config).fused == ("b.weight",)


@pytest.mark.parametrize("capture", [captured, decomposed])
def test_a_transposed_base_and_a_transposed_up_projection(capture: Callable[..., Any]) -> None:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.a, self.o = nn.Linear(D_IN, D_MID), nn.Linear(D_IN, 3, bias=False), conv(D_OUT, D_MID)
            self.b = nn.Parameter(torch.randn(3, D_OUT))

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return self.o(torch.tanh(self.h(x))) + (z @ self.b) * 0.7

    model = Transposed().double().requires_grad_(False)
    model.o.bias.normal_()
    x = x_like()
    report = fuse_and_compare(capture(model, x), x)
    assert columns(report) == ["b"]
    assert report.ops_after["gemm"] == 2
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert (shapes["o.weight"], shapes["b"]) == ((D_MID, D_OUT), (3, D_OUT))


def base_flattened(m: Wide, x: Tensor) -> Tensor:
    z, u = m.a(x), torch.tanh(middle(m, x))
    y = m.o(u.reshape(-1, D_MID)) + m.b(z.reshape(-1, 3)) * 0.7
    return y.view(*x.shape[:-1], D_OUT)


def base_flattened_and_restored(m: Wide, x: Tensor) -> Tensor:
    z, u = m.a(x), torch.tanh(middle(m, x))
    return m.o(u.reshape(-1, D_MID)).view(*x.shape[:-1], D_OUT) + m.b(z) * 0.7


def path_flattened(m: Wide, x: Tensor) -> Tensor:
    z, u = torch.relu(m.a(x.reshape(-1, D_IN))), torch.tanh(middle(m, x))
    return m.o(u) + m.b(z).view(*x.shape[:-1], D_OUT) * 0.7


def sibling_flattened(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z, u = m.a(x), torch.tanh(middle(m, x))
    p = m.p(u.reshape(-1, D_MID))
    return p, m.o(u) + m.b(z) * 0.7


def base_in_as_many_other_dimensions(m: Wide, x: Tensor) -> Tensor:
    z, u = torch.relu(m.a(x)), torch.tanh(middle(m, x).reshape(-1, 1, D_MID))
    return m.o(u) + m.b(z).reshape(-1, 1, D_OUT) * 0.7


@pytest.mark.parametrize(
    "form",
    [
        base_flattened,
        base_flattened_and_restored,
        base_in_as_many_other_dimensions,
        path_flattened,
        sibling_flattened,
    ],
    ids=lambda f: f.__name__,
)
def test_values_that_are_flattened_on_the_way(form: Form) -> None:
    x = x_like()
    program = exported(wide(form, bias=True), x)
    for config in CONFIGS:
        assert columns(fuse_and_compare(program.module(check_guards=False), x, config)) == ["b.weight"]
    assert columns(fuse_and_compare(program, x)) == ["b.weight"]
    assert columns(fuse_and_compare(program.run_decompositions(), x)) == ["b.weight"]


def test_without_shapes_a_reshape_in_between_is_left_alone() -> None:
    def form(m: Wide, x: Tensor) -> Tensor:
        z, u = m.a(x), middle(m, x)
        return m.o(u).reshape(-1, D_OUT) + m.b(z).reshape(-1, D_OUT) * 0.7

    model, x = wide(form), x_like()
    assert columns(fuse_and_compare(traced(model, x), x)) == []
    assert columns(fuse_and_compare(captured(model, x), x)) == ["b.weight"]


def test_sizes_stay_dynamic() -> None:
    model, auto = wide(one_z_two_bases_two_scales, bias=True), torch.export.Dim.AUTO
    program = torch.export.export(model, (x_like(),), dynamic_shapes=({0: auto, 1: auto},))
    fused = flora_fx.fuse(program).module()
    for shape in [(2, 5), (7, 3), (3, 11)]:
        x = x_like(*shape)
        for found, expected in zip(tensors(fused(x)), tensors(model(x)), strict=True):
            assert_exact(found, expected)


@pytest.mark.parametrize("capture", [traced, captured, exported])
@pytest.mark.parametrize("form", ["one z, two bases, two scales", "LoRA, then FFBA"])
def test_fusing_twice_changes_nothing(form: str, capture: Callable[..., Any]) -> None:
    fused = flora_fx.fuse(capture(wide(FORMS[form][0]), x_like()))
    again = flora_fx.fuse(fused)
    assert str(again.graph) == str(fused.graph)
    assert flora_fx.report(again) == flora_fx.report(fused)


def test_two_captures_share_a_widened_pack_and_a_copy_has_its_own() -> None:
    model, x = wide(lora_first), x_like()
    one, two = flora_fx.fuse(captured(model, x)), flora_fx.fuse(captured(model, x))
    twin = copy.deepcopy(one)
    before = twin(x)
    for name, packed in one.named_buffers():
        assert packed.data_ptr() == two.get_buffer(name).data_ptr(), name
        assert packed.data_ptr() != twin.get_buffer(name).data_ptr(), name
    for parameter in model.parameters():
        parameter.mul_(1.25)
    assert_exact(one(x), model(x))
    assert_exact(two(x), model(x))
    assert_exact(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.25)
    assert_exact(twin(x), model(x))
    twin.load_state_dict({name: value / 1.25 for name, value in twin.state_dict().items()})
    assert_exact(twin(x), before)


# Aligned rows


@pytest.mark.parametrize("layout", ["joined", "beside"])
def test_rows_end_aligned_where_base_and_down_share_a_pack(layout: Any) -> None:
    model, x = wide(lora_first, bias=True), x_like()
    expected, strides = model(x), {name: p.stride() for name, p in model.named_parameters()}
    fused = flora_fx.fuse(captured(model, x), config=FuseConfig(layout=layout))
    assert_exact(fused(x), expected)  # type: ignore[arg-type]
    packs = [pack for pack in flora_fx.report(fused).packs if len(pack.shape) == 2]
    for pack in packs:
        roles, rows = {piece.role for piece in pack.slices}, max(piece.rows[1] for piece in pack.slices)
        packed = fused.get_buffer(f"_flora.{pack.name}")
        assert tuple(packed.shape) == pack.shape
        if {Role.BASE, Role.DOWN} <= roles:
            assert layout == "joined"
            assert pack.shape[0] == -(-rows // ALIGNED) * ALIGNED
            assert not packed[rows:].any()  # so that they say nothing whatever is read
        else:
            assert pack.shape[0] == rows
    assert {pack.shape for pack in packs} >= (
        {(32, D_IN), (16, D_MID + 3)} if layout == "joined" else {(D_OUT, D_MID + 3)}
    )
    # Rows that only fill up belong to no parameter: these keep their shapes, and what is not widened its strides.
    for name, parameter in model.named_parameters():
        if not any(piece.columns is not None and name in pack.members for pack in packs for piece in pack.slices):
            assert parameter.stride() == strides[name], name
    assert {name: p.shape for name, p in fused.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    before = {name: packed.clone() for name, packed in fused.named_buffers()}
    fused.load_state_dict(model.state_dict())
    assert all(torch.equal(packed, before[name]) for name, packed in fused.named_buffers())


@pytest.mark.parametrize("rows", [1, 4])
def test_one_row_goes_through_a_widened_pack_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor gets for a single token: slices of the pack by columns, and nothing written beside anything."""
    model, x, seen = wide(one_z_two_bases_two_scales, bias=True), x_like(1, rows), []

    def inner(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append({getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(backend, "_compiler", lambda *_: inner)
    expected = tensors(model(x))
    with torch.no_grad():
        found = tensors(torch.compile(model, backend="flora", fullgraph=True)(x))
    for one, wanted in zip(found, expected, strict=True):
        assert_exact(one, wanted)
    report = last_report()
    assert report is not None
    assert columns(report) == ["b.weight", "bp.weight"]
    assert ("matrix_vector" in seen[0], "cat" in seen[0]) == ((True, False) if rows == 1 else (False, True))
