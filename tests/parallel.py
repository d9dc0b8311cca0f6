"""Modules with adapters from one projection's input to another one's output, and what is asked of them fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora_fx
from flora_fx import FuseConfig, FusionReport
from flora_fx.ir import Pack, Role
from tests.test_forms import assert_exact, exported, run, traced

D_IN, D_MID, D_OUT, D_OTHER = 12, 7, 10, 6

Result = Tensor | tuple[Tensor, ...]
Form = Callable[["Wide", Tensor], Result]
CONFIGS = [
    FuseConfig(),
    FuseConfig(layout="beside"),
    FuseConfig(fold_scale=True),
    FuseConfig(up="per_projection", accumulate="add"),
    FuseConfig(accumulate="unrolled"),
    FuseConfig(layout="beside", fold_scale=True, pack_base=True),
    FuseConfig(layout="ahead"),
    FuseConfig(layout="ahead", fold_scale=True, pack_base=True),
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


def plain(m: Wide, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.o(middle(m, x)) + m.b(z) * 0.7


def silu(m: Wide, x: Tensor) -> Tensor:
    z = F.silu(m.a(x))
    return m.o(middle(m, x)) - m.b(z) / 3
