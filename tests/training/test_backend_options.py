"""What the backend refuses and says so; what it tolerates and says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from flora_fx import backend
from tests.training.tuned import assert_right, assert_trains_as, compiled, fused_report, inputs, net, twin

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"flora.x": 1}, r"unknown option 'flora\.x'; it must be one of flora\.inner, flora\.accumulate"),
    "a copy of weights": ({"flora.fold_scale": True}, r"unknown option 'flora\.fold_scale'"),
    "inner": ({"flora.inner": "tvm"}, r"'flora\.inner' is 'tvm'; it must be one of inductor, aot_eager, eager"),
    "freezing": ({"freezing": True}, r"'freezing' turns weights into constants"),
    "Inductor's for another": ({"flora.inner": "eager", "max_autotune": True}, r"max_autotune are Inductor's"),
    "a value": ({"flora.inner": "eager", "flora.layout": "sideways"}, r"sideways"),
}


@pytest.mark.parametrize("options", REFUSED)
def test_a_bad_option_is_refused_by_name(options: str) -> None:
    given, message = REFUSED[options]
    with pytest.raises(Exception, match=message):
        torch.compile(net(), backend="flora", options=given)(inputs())


def test_inner_eager_trains_too() -> None:
    model = net()
    assert_right(compiled(model, inner="eager"), model, inputs())
    fused_report(3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_compiles_unfused_with_a_warning(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = net(), inputs()
    weight = model.base_model.model.q.lora_A["default"].weight
    good = weight.detach().clone()
    weight.data[1, 2] = value
    call = compiled(model)
    with caplog.at_level(logging.WARNING, logger=backend.log.name):
        found = call(x)
    torch.testing.assert_close(found, twin(model)(x), equal_nan=True)
    (record,) = [record for record in caplog.records if record.name == backend.log.name]
    assert record.levelno == logging.WARNING
    assert "q.lora_A.default.weight holds NaN or infinity" in record.getMessage()
    weight.data.copy_(good)
    assert_right(call, model, x)


def test_an_adapter_that_becomes_nan_after_it_was_fused_shows_it_as_the_unfused_one_does() -> None:
    model, x = net(), inputs()
    call = compiled(model)
    assert_right(call, model, x)
    model.base_model.model.v.lora_B["default"].weight.data[0, 0] = float("nan")
    torch.testing.assert_close(call(x), twin(model)(x), equal_nan=True)


def test_a_model_without_adapters_compiles_as_it_is() -> None:
    model = net().unload().requires_grad_(True)
    assert_trains_as(compiled(model), model, twin(model), inputs())


def test_the_default_needs_no_option() -> None:
    model, x = net().float(), inputs(dtype=torch.float32)
    call = torch.compile(model, backend="flora")
    torch.testing.assert_close(call(x), twin(model)(x))
    fused_report(3)
