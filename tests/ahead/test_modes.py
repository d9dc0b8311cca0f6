"""Under the backend, and in other modes: one row in parts, casts, autocast, no_grad."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig, backend
from flora_fx.backend import flora, last_report
from tests.adapters import D_IN, D_OUT, FORMS, Adapted, Siblings
from tests.parallel import columns, x_like
from tests.test_forms import assert_exact, captured, exported, run

from .free import frozen


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
