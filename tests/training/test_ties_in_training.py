"""The live model after compiled training steps: converted, copied, saved, loaded, shared; nothing goes stale."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import flora_fx
from tests.adapters import Siblings
from tests.training.tuned import (
    Net,
    assert_equal,
    assert_right,
    assert_stored_once,
    assert_trains_as,
    compiled,
    fused_report,
    inputs,
    loss,
    net,
    no_compilation,
    twin,
)


def train(call: Any, model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(call(inputs())).backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def trained() -> tuple[Any, Any]:
    """A model after compiled training steps, and the same compiled."""
    model = net()
    call = compiled(model)
    train(call, model)
    return model, call


def test_training_stores_nothing_twice(trained: tuple[Any, Any]) -> None:
    model, call = trained
    assert_stored_once(model)
    model.eval()
    with torch.no_grad():
        call(inputs())
    assert_stored_once(model)
    assert_right(call, model, inputs())
    assert_stored_once(model)


def _round_trip(model: Any) -> None:
    model.to(torch.float32).to(torch.float64)


def _shared(model: Any) -> None:
    model.share_memory()


def _requires_grad(model: Any) -> None:
    model.requires_grad_(False)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in key)


def _load(model: Any) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


def _assign(model: Any) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()}, assign=True)


def _assign_its_own(model: Any) -> None:
    model.load_state_dict(model.state_dict(), assign=True)


def _torch_save(model: Any) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True), assign=True)


def _new_parameter(model: Any) -> None:
    layer = model.base_model.model.q.lora_A["default"]
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))


CHANGES: list[Callable[[Any], None]] = [
    _round_trip,
    _shared,
    _requires_grad,
    _load,
    _assign,
    _assign_its_own,
    _torch_save,
    _new_parameter,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_change_of_the_live_model_is_followed(trained: tuple[Any, Any], change: Any) -> None:
    model, call = trained
    model.eval()
    with torch.no_grad():
        call(inputs())  # a second graph that holds the same packs, and is not called again
    model.train()
    change(model)
    assert_right(call, model, inputs())
    assert_stored_once(model)
    train(call, model)
    assert_right(call, model, inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_dtype_is_followed_and_the_old_weights_go(trained: tuple[Any, Any], dtype: torch.dtype) -> None:
    model, call = trained
    model.to(dtype)
    x = inputs(dtype=dtype)
    expected = twin(model)(x)
    torch.testing.assert_close(call(x), expected, rtol=0.05, atol=0.05)
    train_inputs = loss(call(x))
    train_inputs.backward()
    fused_report(3)
    assert_stored_once(model)
    model.double()
    assert_right(call, model, inputs())
    assert_stored_once(model)


def test_a_copy_is_apart_and_compiles_for_itself(trained: tuple[Any, Any]) -> None:
    model, call = trained
    copied, x = twin(model), inputs()
    before = call(x).detach()
    train(compiled(copied), copied)
    assert_equal(call(x), before)
    train(call, model)
    assert_right(call, model, x)
    for mine, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_state_dict_names_and_values_are_those_of_unfused_training(trained: tuple[Any, Any]) -> None:
    model, _ = trained
    state = model.state_dict()
    assert list(state) == list(net().state_dict())
    fresh = net()
    fresh.load_state_dict(state)
    x = inputs()
    assert_equal(fresh(x), twin(model)(x))


def test_an_adapter_is_saved_and_loaded(trained: tuple[Any, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    model, call = trained
    x = inputs()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    live = {key.replace(".default", ""): value for key, value in model.state_dict().items() if "lora_" in key}
    assert set(saved) == set(live)
    for key, value in saved.items():
        assert torch.equal(value, live[key]), key
    base = Net().double()
    base.load_state_dict(twin(model).unload().state_dict())
    assert_equal(PeftModel.from_pretrained(base, tmp_path)(x), call(x))
    model.load_adapter(tmp_path, adapter_name="again", is_trainable=True)
    model.set_adapter("again")
    assert_right(call, model, x)
    assert_equal(call(x), PeftModel.from_pretrained(base, tmp_path)(x))


def test_a_state_dict_that_was_taken_follows_as_torch_says(trained: tuple[Any, Any]) -> None:
    model, call = trained
    state = model.state_dict()
    train(call, model)
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def _add(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.q.lora_A["default"].weight.add_(1.0)


def _step(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _base(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.o.base_layer.weight.add_(1.0)


def _up(model: Any) -> None:
    with torch.no_grad():
        model.base_model.model.v.lora_B["default"].weight.add_(1.0)


def _swap(model: Any) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


def _foreach(model: Any) -> None:
    with torch.no_grad():
        torch._foreach_add_([p for p in model.parameters() if p.requires_grad], 1.0)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("change", [_add, _step, _base, _up, _swap, _foreach], ids=lambda f: f.__name__[1:])
def test_a_change_between_forward_and_backward_raises(change: Any, inner: str) -> None:
    model = net()
    value = loss(compiled(model, inner=inner)(inputs()))
    change(model)
    with pytest.raises(RuntimeError, match=r"changed in place after the forward|modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("trained", ["lora_", "lora_B", "nothing but the input"])
@pytest.mark.parametrize("change", [_add, _base], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("kind", ["compiled", "fused"])
def test_such_a_change_raises_also_where_a_pack_has_nothing_that_trains(trained: str, change: Any, kind: str) -> None:
    """As without flora_fx: autograd notices a frozen weight that the backward needs, too."""
    model, x = net(), inputs().requires_grad_(True)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trained in key)
    call = compiled(model) if kind == "compiled" else flora_fx.fuse(flora_fx.capture(model, x))
    for run in (model, call):
        value = loss(run(x))
        change(model)
        with pytest.raises(RuntimeError, match=r"changed in place after the forward|modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_a_swap_of_storage_between_forward_and_backward_is_never_silently_wrong(inner: str) -> None:
    """Another call, that stores the packs elsewhere, in between: the first backward has its own values or refuses."""
    model, x = net(), inputs()
    reference = twin(model)
    value = loss(compiled(model, inner=inner)(x))
    loss(compiled(model, inner=inner, **{"flora.layout": "beside"})(x))
    loss(reference(x)).backward()
    value.backward()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-10)


def test_double_backward_raises() -> None:
    model, x = net(), inputs().requires_grad_(True)
    fused = flora_fx.fuse(flora_fx.capture(model, x))
    for call in (compiled(model), compiled(model, inner="eager"), fused):
        (gradient,) = torch.autograd.grad(loss(call(x).square()), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"double backward|once_differentiable|differentiate twice|marked with"):
            gradient.square().sum().backward()


def test_a_trained_fused_graph_is_copied_saved_and_converted() -> None:
    model = Siblings().double()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("_" in key)
    fused = flora_fx.fuse(fx.symbolic_trace(model))
    train(fused, fused)
    copied = twin(fused)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for each in (fused, copied, loaded, fused.float().double()):
        reference = Siblings().double()
        reference.load_state_dict(each.state_dict())
        for key, parameter in reference.named_parameters():
            parameter.requires_grad_("_" in key)
        assert_trains_as(each, each, reference, inputs())
    before = fused(inputs().fill_(1))
    train(copied, copied)
    assert_equal(fused(inputs().fill_(1)), before)


def test_a_moved_parameter_recompiles_nothing(trained: tuple[Any, Any]) -> None:
    model, call = trained
    with no_compilation():
        for parameter in model.parameters():
            parameter.data = parameter.detach().clone()
        assert_right(call, model, inputs())
    assert_stored_once(model)
