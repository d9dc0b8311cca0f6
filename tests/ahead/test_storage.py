"""Packs that hold B's as columns: shared, copied, cast; a second fusing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flora_fx
from flora_fx import FuseConfig
from tests.adapters import Siblings
from tests.parallel import x_like
from tests.test_forms import assert_exact, captured, exported, traced

from .free import AHEAD, FOLDED, frozen


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
