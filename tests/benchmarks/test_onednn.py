"""Large float32 products by oneDNN while a training process asks for it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.onednn import use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

_ONEDNN = "mkldnn::_linear_pointwise"


def _operators(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    with torch.profiler.profile() as profile:
        found = left @ right
    return found, {event.key for event in profile.key_averages()}


def test_large_products_of_float32_alone_and_as_long_as_asked() -> None:
    left, right = torch.randn(300, 130, dtype=torch.float64), torch.randn(130, 90, dtype=torch.float64)
    few = left[:7]
    assert _ONEDNN not in _operators(left.float(), right.float())[1]
    library = use_onednn()
    for columns in (right.float(), right.t().float().contiguous().t()):
        for rows in (left.float(), left.t().float().contiguous().t()):
            found, operators = _operators(rows, columns)
            assert _ONEDNN in operators
            torch.testing.assert_close(found.double(), left @ right, rtol=1e-5, atol=1e-4)
    for rows, columns in ((few.float(), right.float()), (left, right)):
        found, operators = _operators(rows, columns)
        assert _ONEDNN not in operators
        torch.testing.assert_close(found.double(), rows.double() @ right, rtol=1e-5, atol=1e-4)
    del library
    assert _ONEDNN not in _operators(left.float(), right.float())[1]


def test_gradients_in_lanes() -> None:
    weight = torch.randn(130, 90, dtype=torch.float64)
    given = torch.randn(3, 200, 130, dtype=torch.float64)
    library = use_onednn()
    own = given.float().requires_grad_()
    lanes = torch.vmap(lambda rows: (rows @ weight.float()).sin().sum())(own)
    lanes.sum().backward()
    exact = given.clone().requires_grad_()
    (exact @ weight).sin().sum().backward()
    del library
    assert own.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)
