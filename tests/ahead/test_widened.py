"""LoRA's own up-projections as further input columns: its down-projections run first, and nothing accumulates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig
from tests.adapters import D_IN, D_OUT, FORMS, RANK, TWO_ADAPTERS, Adapted, Siblings
from tests.parallel import columns, fuse_and_compare, pack_of, x_like
from tests.test_forms import assert_exact, captured, decomposed, dynamic, traced

from .free import (
    AHEAD,
    FOLDED,
    Free,
    frozen,
    one_for_both,
    others_alone,
    own_and_others,
    own_and_others_of_one_base,
    parts,
    places,
)

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
