"""What is not widened accumulates, and is exact: values that others read, that change, that train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import flora_fx
from flora_fx import FuseConfig
from tests.adapters import D_OUT, FORMS, Adapted, Siblings
from tests.parallel import columns, fuse_and_compare, pack_of, x_like
from tests.test_forms import captured, traced

from .free import AHEAD, FOLDED, Free, frozen, sibling_is_returned


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
