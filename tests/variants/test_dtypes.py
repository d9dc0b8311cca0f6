"""Adapters in float32 on a base in bfloat16, as PEFT makes them by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

import peft

import flora_fx
from flora_fx import FuseConfig, Reason
from flora_fx.ir import Role

from .build import Case, config
from .models import WIDTH, Linears
from .observe import observe


def narrow_base() -> Any:
    """q, k, v, o with a LoRA each; the head without."""
    model = peft.get_peft_model(Linears().to(torch.bfloat16), config(init_lora_weights=False))
    assert model.base_model.model.layers[0].q.lora_A["default"].weight.dtype == torch.float32
    return model.eval()


def read(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), WIDTH, dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_down_projections_pack_among_themselves_and_nothing_changes(layout: Any) -> None:
    model, x = narrow_base().requires_grad_(False), read()
    fused = flora_fx.fuse(flora_fx.capture(model, x), config=FuseConfig(layout=layout))
    report = flora_fx.report(fused)
    assert torch.equal(fused(x), model(x))
    (pack,) = report.packs
    assert [piece.role for piece in pack.slices] == [Role.DOWN] * 3  # those of q, k and v, which read one value
    differs = [decline for decline in report.declines if decline.reason is Reason.DTYPE_DIFFERS]
    assert len(differs) == 4
    assert all("FuseConfig(allow_cast=True)" in decline.detail for decline in differs)
    assert (report.ops_before["gemm"], report.ops_after["gemm"]) == (13, 11)


@pytest.mark.parametrize("mode", ["compiled", "trained"])
def test_the_backend_leaves_them_apart_from_the_base(mode: str) -> None:
    found = observe(Case(narrow_base(), (read(),)), mode)
    assert found.report is not None
    assert {decline.reason for decline in found.report.declines} >= {Reason.DTYPE_DIFFERS}
    assert found.error <= (0 if mode == "compiled" else 1e-2)  # sums over tokens in bfloat16, in another order
    assert found.report.ops_after["gemm"] == 11


@pytest.mark.parametrize("layout", ["joined", "beside", "ahead"])
def test_allow_cast_joins_the_base_and_is_as_close_to_float64_as_peft_is(layout: Any) -> None:
    model, x = narrow_base().requires_grad_(False), read(400)
    exact = copy.deepcopy(model).double()(x.double())
    theirs = (model(x).double() - exact).abs()
    fused = flora_fx.fuse(flora_fx.capture(model, x), config=FuseConfig(allow_cast=True, layout=layout))
    ours = (fused(x).double() - exact).abs()
    report = flora_fx.report(fused)
    assert len(report.fused) == 4
    assert not report.declines, str(report)
    assert ours.mean() <= 1.2 * theirs.mean()  # 0.96 to 1.05 over twelve seeds
    assert ours.max() <= 2 * theirs.max()
