"""Paths that must not become columns: they accumulate, or stay, and are exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.backend import flora, last_report
from tests.parallel import (
    CONFIGS,
    D_OTHER,
    Form,
    Wide,
    columns,
    fuse_and_compare,
    middle,
    plain,
    programs,
    silu,
    wide,
    x_like,
)
from tests.test_forms import captured, exported, traced


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
    z.tanh_()
    return y + m.b(z) * 0.7


def base_changed(m: Wide, x: Tensor) -> Tensor:
    z, y = m.a(x), m.o(middle(m, x))
    y.tanh_()
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


@pytest.mark.parametrize("trained", ["b.weight", "o.weight", "p.weight", "o.bias"])
def test_nothing_that_trains_is_stored_as_columns(trained: str) -> None:
    """Neither B nor what its group computes with; the gradients are the unfused model's."""

    def form(m: Wide, x: Tensor) -> Tensor:
        z, u = m.a(x), middle(m, x)
        return torch.cat([m.p(u), m.o(u) + m.b(z) * 0.7], -1)

    model, x = wide(form, bias=True), x_like()
    model.get_parameter(trained).requires_grad_(True)
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
                found = model.get_parameter(trained).grad
        torch.testing.assert_close(found, reference.get_parameter(trained).grad, rtol=1e-10, atol=1e-10)
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
