"""Backward fusion: an up-projection as further input columns of the projection that writes the same output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_forms import assert_exact, captured, decomposed, exported, run, traced
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig, FusionReport, Reason, backend
from flora_fx.backend import flora, last_report
from flora_fx.ir import Pack, Role
from flora_fx.passes.layout import ALIGNED

D_IN, D_MID, D_OUT, D_OTHER = 12, 7, 10, 6
Result = Tensor | tuple[Tensor, ...]
Form = Callable[["Wide", Tensor], Result]
CONFIGS = [
    FuseConfig(),
    FuseConfig(layout="beside"),
    FuseConfig(fold_scale=True),
    FuseConfig(up="per_projection", accumulate="add"),
    FuseConfig(layout="beside", fold_scale=True, pack_base=True),
]


class Wide(nn.Module):
    """x -> h, k -> o (and p), with adapters that read x, or what o reads, and are written onto o (and p)."""

    def __init__(self, form: Form, bias: bool = False, up_bias: bool = False) -> None:
        super().__init__()
        self.form = form
        self.h, self.k = nn.Linear(D_IN, D_MID), nn.Linear(D_IN, D_MID, bias=False)
        self.o, self.p = nn.Linear(D_MID, D_OUT, bias=bias), nn.Linear(D_MID, D_OTHER, bias=bias)
        self.a, self.a2 = nn.Linear(D_IN, 3, bias=False), nn.Linear(D_IN, 5, bias=False)
        self.b, self.b2 = nn.Linear(3, D_OUT, bias=up_bias), nn.Linear(5, D_OUT, bias=False)
        self.b_too, self.bp = nn.Linear(3, D_OUT, bias=False), nn.Linear(3, D_OTHER, bias=False)
        self.la, self.lb = nn.Linear(D_MID, 2, bias=False), nn.Linear(2, D_OUT, bias=False)
        self.g = nn.Linear(D_IN, 1)

    def forward(self, x: Tensor) -> Result:
        return self.form(self, x)


def middle(m: Wide, x: Tensor) -> Tensor:
    """What o and p read: a sum, for of h alone o would be an up-projection."""
    return m.h(x) + m.k(x)


def wide(form: Form, **options: bool) -> Wide:
    return Wide(form, **options).double().eval().requires_grad_(False)


def x_like(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D_IN, dtype=torch.float64)


def tensors(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def columns(report: FusionReport) -> list[str]:
    """The up-projections that stand beside a base."""
    packs = [pack for pack in report.packs if Role.BASE in {piece.role for piece in pack.slices}]
    return sorted(
        name for pack in packs for piece, name in zip(pack.slices, pack.members, strict=True) if piece.role is Role.UP
    )


def pack_of(report: FusionReport, member: str) -> Pack:
    """The pack of matrices that holds a parameter."""
    return next(pack for pack in report.packs if member in pack.members and len(pack.shape) == 2)


def fuse_and_compare(program: Any, x: Tensor, config: FuseConfig | None = None) -> FusionReport:
    """Fuse a copy of a program; compare outputs and weights, and both again after all weights have changed."""
    plain, twin = copy.deepcopy(program), copy.deepcopy(program)
    before = {name: value.clone() for name, value in state_of(twin).items()}
    expected = tensors(run(plain, x))
    fused = flora_fx.fuse(twin, config=config)
    for found, wanted in zip(tensors(run(fused, x)), expected, strict=True):
        assert_exact(found, wanted)
    assert all(torch.equal(value, before[name]) for name, value in state_of(twin).items())
    if isinstance(fused, torch.fx.GraphModule):
        fused.load_state_dict({name: value * 1.25 for name, value in before.items()})
        plain.load_state_dict({name: value * 1.25 for name, value in before.items()})
        for found, wanted in zip(tensors(run(fused, x)), tensors(run(plain, x)), strict=True):
            assert_exact(found, wanted)
    return flora_fx.report(fused)


def programs(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """A model as a symbolic trace, as an exported program, and as that program's module."""
    program = exported(model, x)
    return {"traced": traced(model, x), "exported": program, "module": program.module(check_guards=False)}


def state_of(program: Any) -> dict[str, Tensor]:
    state: Any = program.state_dict
    found: dict[str, Tensor] = state if isinstance(program, torch.export.ExportedProgram) else state()
    return found


# What is widened


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


def plain(m: Wide, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.o(middle(m, x)) + m.b(z) * 0.7


def relu(m: Wide, x: Tensor) -> Tensor:
    z = torch.relu(m.a(x))
    return m.o(middle(m, x)) + m.b(z) * 0.7


def silu(m: Wide, x: Tensor) -> Tensor:
    z = F.silu(m.a(x))
    return m.o(middle(m, x)) - m.b(z) / 3


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
        assert columns(report) == weights(wanted)
        if config.fold_scale:
            assert report.ops_after["elementwise"] == 1  # h + k
        if config.layout == "joined":
            assert report.ops_after["gemm"] == gemms
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


@pytest.mark.parametrize(
    "form", [base_flattened, base_flattened_and_restored, path_flattened, sibling_flattened], ids=lambda f: f.__name__
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


# What is not widened


def other_reader(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z, y = m.a(x), m.o(middle(m, x))
    return y + m.b(z) * 0.7, y


def other_reader_later(m: Wide, x: Tensor) -> Tensor:
    z, y = m.a(x), m.o(middle(m, x))
    return (y + m.b(z) * 0.7) * torch.tanh(y)


def other_reader_of_an_adapted_value(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z, w = m.a(x), m.a2(x)
    y = m.o(middle(m, x)) + m.b(z) * 0.7
    return y + m.b2(w) * 1.3, y


def z_after_the_base(m: Wide, x: Tensor) -> Tensor:
    y = m.o(middle(m, x))
    return y + m.b(m.a(x * 2)) * 0.7


def shared_up(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z = m.a(x)
    return m.o(middle(m, x)) + m.b(z) * 0.7, m.b(torch.tanh(z))


def shared_base(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
    z = m.a(x)
    u = middle(m, x)
    return m.o(u) + m.b(z) * 0.7, m.o(torch.tanh(u))


def z_changed(m: Wide, x: Tensor) -> Tensor:
    z = m.a(x)
    y = m.o(middle(m, x))
    z.mul_(0.5)
    return y + m.b(z) * 0.7


def base_changed(m: Wide, x: Tensor) -> Tensor:
    z, y = m.a(x), m.o(middle(m, x))
    y.mul_(0.9)
    return y + m.b(z) * 0.7


def read_changed(m: Wide, x: Tensor) -> Tensor:
    z, u = m.a(x), middle(m, x)
    u.mul_(0.9)
    y = m.o(u)
    u.mul_(0.9)
    return y + m.b(z) * 0.7


def per_token(m: Wide, x: Tensor) -> Tensor:
    z, y = m.a(x), m.o(middle(m, x))
    return y + m.b(z) * torch.sigmoid(m.g(x))


def tensor_scale(m: Wide, x: Tensor) -> Tensor:
    z, y = m.a(x), m.o(middle(m, x))
    return y + m.b(z) * m.g.bias.sum()


ALL, SHAPED = ("traced", "exported", "module"), ("exported", "module")
REFUSED: dict[str, tuple[Form, tuple[str, ...], tuple[str, ...]]] = {
    "the base has another reader": (other_reader, ("b.weight",), ALL),
    "the base has another reader, later": (other_reader_later, ("b.weight",), ALL),
    "z comes after the base": (z_after_the_base, ("b.weight",), ALL),
    "the up-projection is used elsewhere": (shared_up, ("b.weight",), ALL),
    "the base is used elsewhere": (shared_base, ("b.weight",), ALL),
    "the base's value is changed": (base_changed, (), ("module",)),
    "a factor per token": (per_token, ("b.weight",), SHAPED),
    "a scale that is a tensor": (tensor_scale, ("b.weight",), SHAPED),
}
"""Form, what is fused all the same, and in which programs."""


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_widened_is_accumulated_and_exact(form: str) -> None:
    function, fused, kinds = REFUSED[form]
    model, x = wide(function, bias=True), x_like()
    nn.init.normal_(model.g.bias)
    given = programs(model, x)
    for kind in kinds:
        for config in (FuseConfig(), FuseConfig(layout="beside", fold_scale=True)):
            report = fuse_and_compare(given[kind], x, config)
            assert columns(report) == [], kind
            assert report.fused == fused, kind


def test_an_adapted_value_that_is_read_in_between_keeps_its_first_columns_alone() -> None:
    model, x = wide(other_reader_of_an_adapted_value), x_like()
    for program in programs(model, x).values():
        report = fuse_and_compare(program, x)
        assert columns(report) == ["b.weight"]
        assert set(report.fused) == {"b.weight", "b2.weight"}


@pytest.mark.parametrize("order", ["p first", "o first"])
def test_a_value_that_depends_on_the_own_group(order: str) -> None:
    """p and o read one value; what is written onto o is computed from p: not there before their GEMM."""

    class Own(Wide):
        def __init__(self, form: Form) -> None:
            super().__init__(form)
            self.pa = nn.Linear(D_OTHER, 3, bias=False)

    def form(m: Wide, x: Tensor) -> tuple[Tensor, ...]:
        u = middle(m, x)
        if order == "p first":
            p = m.p(u)
            z = m.pa(p)
            return p, m.o(u) + m.b(z) * 0.7
        y, p = m.o(u), m.p(u)
        return p, y + m.b(m.pa(p)) * 0.7

    model, x = Own(form).double().requires_grad_(False), x_like()
    for program in programs(model, x).values():
        for config in (FuseConfig(), FuseConfig(pack_base=True)):
            report = fuse_and_compare(program, x, config)
            assert report.fused == ("b.weight",)
            assert columns(report) == []


@pytest.mark.parametrize("function", [z_changed, read_changed], ids=lambda f: f.__name__)
def test_values_that_are_changed_in_between(function: Form) -> None:
    x = x_like()
    program = captured(wide(function), x)
    for config in CONFIGS:
        report = fuse_and_compare(program, x, config)
        if function is z_changed:
            assert columns(report) == []


@pytest.mark.parametrize("trained", ["b", "o", "p"])
def test_nothing_that_trains_is_stored_as_columns(trained: str) -> None:
    """Neither B nor a base of its group; gradients and the optimizer's step are the unfused model's."""

    def form(m: Wide, x: Tensor) -> Tensor:
        z, u = m.a(x), middle(m, x)
        return torch.cat([m.p(u), m.o(u) + m.b(z) * 0.7], -1)

    model, x = wide(form), x_like()
    model.get_submodule(trained).weight.requires_grad_(True)
    reference = copy.deepcopy(model)
    for capture in (traced, captured):
        fused = flora_fx.fuse(capture(model, x))
        report = flora_fx.report(fused)
        assert columns(report) == []
        assert report.fused == ("b.weight",)
        for module in (fused, reference):
            reference.zero_grad()
            model.zero_grad()
            module(x).square().sum().backward()
            if module is fused:
                found = model.get_submodule(trained).weight.grad
        torch.testing.assert_close(found, reference.get_submodule(trained).weight.grad, rtol=1e-10, atol=1e-10)
    program = flora_fx.fuse(exported(copy.deepcopy(reference), x))
    assert columns(flora_fx.report(program)) == []


def test_a_trained_a_before_a_frozen_b_gets_its_gradient_through_the_columns() -> None:
    model, x = wide(silu), x_like()
    model.a.weight.requires_grad_(True)
    reference = copy.deepcopy(model)
    fused = flora_fx.fuse(captured(model, x))
    assert columns(flora_fx.report(fused)) == ["b.weight"]
    for module in (fused, reference):
        module(x).square().sum().backward()
    torch.testing.assert_close(model.a.weight.grad, reference.a.weight.grad, rtol=1e-10, atol=1e-10)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["a.weight"]


@pytest.mark.parametrize("which", ["path", "base"])
def test_another_dtype_is_not_widened(which: str) -> None:
    def form(m: Wide, x: Tensor) -> Tensor:
        if which == "path":
            z = m.a(x.float())
            return m.o(middle(m, x)) + m.b(z) * 0.7
        z = m.a(x)
        return m.o(middle(m, x.float())).double() + m.b(z) * 0.7

    model = wide(form)
    for name in ("a", "b") if which == "path" else ("h", "k", "o"):
        getattr(model, name).float()
    x = x_like()
    report = fuse_and_compare(captured(model, x), x)
    assert columns(report) == []
    if which == "path":
        assert Reason.DTYPE_DIFFERS in [decline.reason for decline in report.declines]
        assert not report.fused


def z_under_no_grad(m: Wide, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.a(x)
    return m.o(middle(m, x)) + m.b(z) * 0.7


def base_under_no_grad(m: Wide, x: Tensor) -> Tensor:
    z = m.a(x)
    with torch.no_grad():
        y = m.o(middle(m, x))
    return y + m.b(z) * 0.7


def z_under_autocast(m: Wide, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = m.a(x)
    return m.o(middle(m, x)) + m.b(z.to(x.dtype)) * 0.7


def base_under_autocast(m: Wide, x: Tensor) -> Tensor:
    z = m.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = m.o(middle(m, x))
    return y.to(x.dtype) + m.b(z) * 0.7


@pytest.mark.parametrize(
    "form",
    [z_under_no_grad, base_under_no_grad, z_under_autocast, base_under_autocast, plain],
    ids=lambda f: f.__name__,
)
def test_regions_of_other_modes_are_not_crossed(form: Form) -> None:
    """Outputs and the gradient of the input, which stops where it stopped."""
    model = wide(form).float()
    call = torch.compile(copy.deepcopy(model), backend=flora, fullgraph=True, options={"flora.inner": "aot_eager"})
    x = x_like().float()
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    y, wanted = call(found), model(expected)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    y.sin().sum().backward()
    wanted.sin().sum().backward()  # type: ignore[union-attr]
    # In bfloat16 the two gradients of a shared read may be added before or after they are rounded.
    half = form in (z_under_autocast, base_under_autocast)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-2 if half else 1e-6)
    report = last_report()
    assert report is not None
    assert bool(columns(report)) == (form is plain)


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
