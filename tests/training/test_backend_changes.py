"""What PEFT changes on a live model after it was compiled: adapters switched, merged, added, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.architectures import example_inputs
from tests.training.tuned import (
    assert_equal,
    assert_right,
    assert_stored_once,
    assert_trains_as,
    compilations,
    compiled,
    family,
    fused_report,
    inputs,
    lora,
    net,
    no_compilation,
    twin,
)


def two_adapters() -> Any:
    model = net()
    model.add_adapter("other", lora(r=4, lora_alpha=9))
    return model.double()


def test_adapters_are_disabled_and_enabled() -> None:
    model, x = net(), inputs()
    call = compiled(model)
    assert_right(call, model, x)
    adapted = call(x)
    with model.disable_adapter():
        plain = call(x)
        assert_equal(plain, twin(model)(x))
    assert (plain - adapted).abs().max() > 1e-3
    with no_compilation():
        assert_right(call, model, x)


def test_adapters_are_switched() -> None:
    model, x = two_adapters(), inputs()
    call, outputs = compiled(model), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_right(call, model, x)
        fused_report(3)
        outputs[name] = call(x)
    assert (outputs["default"] - outputs["other"]).abs().max() > 1e-3
    with no_compilation():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert_right(call, model, x)
            assert_equal(call(x), outputs[name])


def test_both_adapters_are_active() -> None:
    model, x = two_adapters(), inputs()
    model.base_model.set_adapter(["default", "other"])
    assert_right(compiled(model), model, x)
    fused_report(6)


def test_adapters_switched_between_training_steps_learn_apart() -> None:
    model = two_adapters()
    reference = twin(model)
    runs = [(model, compiled(model)), (reference, reference)]
    batches = [inputs() for _ in range(6)]
    for m, run in runs:
        optimizers: dict[str, torch.optim.Optimizer] = {}
        for step, x in enumerate(batches):
            name = ("default", "other")[step % 2]
            m.set_adapter(name)
            trained = [p for p in m.parameters() if p.requires_grad]
            optimizer = optimizers.setdefault(name, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1))
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (key, found), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, msg=key)


def test_memory_holds_one_base_for_however_many_adapters() -> None:
    model, x = net(), inputs()
    for rank in (2, 4, 6):
        model.add_adapter(f"rank{rank}", lora(r=rank))
    model.double()
    call = compiled(model)
    for _ in range(2):
        for name in ("default", "rank2", "rank4", "rank6"):
            model.set_adapter(name)
            assert_right(call, model, x)
            assert_stored_once(model)


def test_an_adapter_that_was_deleted_takes_its_memory_along() -> None:
    model, x = two_adapters(), inputs()
    call = compiled(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_right(call, model, x)
    model.delete_adapter("default")
    assert_right(call, model, x)
    assert_stored_once(model)


def test_an_adapter_is_added_after_compilation() -> None:
    model, x = net(), inputs()
    call = compiled(model)
    assert_right(call, model, x)
    model.add_adapter("late", lora(r=6))
    model.double()
    assert_right(call, model, x)
    model.set_adapter("late")
    assert_right(call, model, x)
    fused_report(3)


def test_merging_and_unmerging() -> None:
    model, x = net(), inputs()
    call = compiled(model)
    assert_right(call, model, x)
    before = call(x).detach()
    weight = model.base_model.model.q.base_layer.weight.detach().clone()
    for _ in range(2):
        model.merge_adapter()
        assert not torch.equal(model.base_model.model.q.base_layer.weight, weight)
        merged = call(x)
        assert_equal(merged, twin(model)(x))
        torch.testing.assert_close(merged, before, rtol=1e-10, atol=1e-10)
        model.unmerge_adapter()
        assert_right(call, model, x)
        torch.testing.assert_close(call(x), before, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.base_model.model.q.base_layer.weight, weight, rtol=1e-10, atol=1e-10)
    assert_stored_once(model)


def test_merge_and_unload_after_training() -> None:
    model, x = net(), inputs()
    call = compiled(model)
    assert_right(call, model, x)
    expected = call(x).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)


def _by_peft(model: nn.Module, other: nn.Module) -> None:
    state = peft.get_peft_model_state_dict(other)
    peft.set_peft_model_state_dict(model, {key: value.clone() for key, value in state.items()})


def _into_data(model: nn.Module, other: nn.Module) -> None:
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(new)


def _under_no_grad(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(new)


def _replaced_data(model: nn.Module, other: nn.Module) -> None:
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = new.detach().clone()


def _load_state_dict(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in other.state_dict().items()})


def _assign(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in other.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "load",
    [_by_peft, _into_data, _under_no_grad, _replaced_data, _load_state_dict, _assign],
    ids=lambda f: f.__name__[1:],
)
def test_a_hot_swap_is_right_and_compiles_nothing(load: Any) -> None:
    model, x = net(), inputs()
    call = compiled(model)
    assert_right(call, model, x)
    before = call(x).detach()
    other = net()
    if load is _by_peft:
        other.base_model.model.load_state_dict(model.base_model.model.state_dict())
        peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(net()))
    model.zero_grad()
    with no_compilation():
        for _ in range(2):
            load(model, other)
            other.zero_grad()
            assert_trains_as(call, model, other, x)
    assert (call(x) - before).abs().max() > 1e-3
    assert_stored_once(model)


def test_a_hot_swap_on_a_transformer(tmp_path: Path) -> None:
    model, arguments = family("gpt2"), example_inputs("gpt2")
    call = compiled(model)
    for _ in range(2):
        assert_right(call, model, **arguments)
    other = twin(model)
    for key, parameter in other.named_parameters():
        if "lora_" in key:
            parameter.data.normal_(std=0.1)
    other.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    with no_compilation():
        peft.set_peft_model_state_dict(model, state)
        assert_trains_as(call, model, other, **arguments)
    assert_stored_once(model)


@pytest.mark.parametrize(("name", "compiled_once"), [("bert", True), ("gpt2", False)])
def test_tying_at_the_first_call_costs_no_second_compilation(name: str, compiled_once: bool) -> None:
    """But for weights that are stored transposed: Dynamo guards strides, and theirs change as they move into a pack."""
    model, arguments = family(name), example_inputs(name)
    call = compiled(model)
    with torch.no_grad():
        call(**arguments)
        first = compilations()
        call(**arguments)
        assert (compilations() == first) == compiled_once
        with no_compilation():
            call(**arguments)
    fused_report()


def test_two_compiled_models_on_one_base_take_turns() -> None:
    model, x = net(), inputs()
    one, two = compiled(model), compiled(model, **{"flora.layout": "beside"})
    for _ in range(2):
        for call in (one, two):
            assert_right(call, model, x)
    assert_stored_once(model)


def test_only_what_records_gradients_pays_for_guards_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference a parameter's ``requires_grad`` changes nothing; with gradients a change is seen."""
    asked: list[bool] = []
    monkeypatch.setattr("flora_fx.backend.guard_requires_grad", lambda: asked.append(torch.is_grad_enabled()))
    model, x = net(), inputs()
    call = compiled(model)
    with torch.no_grad():
        assert_equal(call(x), twin(model)(x))
    assert asked == []
    assert_right(call, model, x)
    assert set(asked) == {True}
    trained = next(p for name, p in model.named_parameters() if "lora_B" in name)
    assert trained.grad is not None
    trained.requires_grad_(False)
    trained.grad = None
    call(x).sum().backward()
    assert trained.grad is None
