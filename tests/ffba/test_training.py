"""Gradients, dropout, checkpointing, torch.compile and transformers' Trainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from flora_fx.adapters import FloraConfig, FloraLayer
from flora_fx.backend import last_report
from flora_fx.errors import AdapterError
from tests.architectures import VOCAB

from .reference import (
    ACTIVATIONS,
    PLACES,
    SCALE,
    assert_close,
    assert_differ,
    attach,
    base_model,
    by_hand,
    output,
    paths,
    tokens,
    weights_of,
)

BLOCKS = ("attention", "mlp")


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All there are, which are then gone."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_step(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0, name
        assert_close(found[1][name], gradient, 1e-11)


# Gradients


@pytest.mark.parametrize("activation", [None, "silu", "relu"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_a_and_b_and_of_nothing_else(family: str, place: str, activation: str | None) -> None:
    base, inputs = base_model(family).requires_grad_(False), tokens()
    model = attach(base, activation=activation, **PLACES[place])
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in weights_of(model).items()}
    with by_hand(base, family, weights, SCALE, place, activation):
        loss_of(base, inputs).backward()
    loss_of(model, inputs).backward()
    for name, weight in weights_of(model).items():
        assert weights[name].grad.abs().max() > 1e-6
        assert_close(weight.grad, weights[name].grad, 1e-11)
    ours = {id(weight) for weight in weights_of(model).values()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in ours)


def test_with_b_zero_only_b_gets_a_gradient_at_first() -> None:
    model, inputs = attach(base_model("llama"), init="lora", placement="shared"), tokens()
    loss_of(model, inputs).backward()
    for name, weight in weights_of(model).items():
        assert bool(weight.grad.any()) == name.endswith(".B")


def test_only_the_active_adapter_gets_gradients() -> None:
    model, inputs = attach(base_model("llama"), "one"), tokens()
    model.add_adapter("two", FloraConfig(init="random", placement="shared"))
    for name, other in (("two", "one"), ("one", "two")):
        model.set_adapter(name)
        found = step(model, inputs)[1]
        assert all(f".{name}." in parameter for parameter in found)
        assert len(found) == len(weights_of(model, name)) != len(weights_of(model, other))


# Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("place", ["block", "forward", "backward", "shared"])
def test_gradient_checkpointing_changes_nothing(place: str, use_reentrant: bool) -> None:
    model, inputs = attach(base_model("llama"), activation="gelu", **PLACES[place]).train(), tokens()
    model.enable_input_require_grads()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith(".flora_A.default"):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    assert_same_step(step(model, inputs), expected)
    assert set(runs.values()) == {2}  # it was on: each path ran once more
    assert len(runs) == 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout_repeats_the_mask(use_reentrant: bool) -> None:
    model, inputs = attach(base_model("llama"), dropout=0.5, placement="shared").train(), tokens()
    model.enable_input_require_grads()
    torch.manual_seed(3)
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_layers_is_refused_across_them(use_reentrant: bool) -> None:
    model, inputs = attach(base_model("llama"), placement="cross").train(), tokens()
    model.enable_input_require_grads()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    said = (
        r"^model\.layers\.1\.self_attn\.q_proj adds what model\.layers\.0\.mlp\.down_proj reads.*"
        r"placement 'cross' reaches into the next layer: turn checkpointing off there, or use 'block' or 'shared'"
    )
    with pytest.raises(AdapterError, match=said):
        loss_of(model, inputs).backward()
    model.zero_grad()
    model.gradient_checkpointing_disable()
    assert_same_step(step(model, inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_goes_with_cross_within_a_layer(use_reentrant: bool) -> None:
    model, inputs = attach(base_model("llama"), placement="cross", layers=[1]).train(), tokens()
    model.enable_input_require_grads()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_step(step(model, inputs), expected)


# Dropout


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("place", PLACES)
def test_dropout_is_one_mask_for_each_path(place: str, activation: str | None) -> None:
    """The masks that were drawn, given to the reference, give the same output."""
    p = 0.4
    base, inputs = base_model("llama"), tokens()
    model = attach(base, dropout=p, activation=activation, **PLACES[place])
    masks: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, dropped: Tensor) -> None:
        assert name not in masks, "drawn twice"
        masks[name] = dropped / x

    for name, module in model.named_modules():
        if isinstance(module, FloraLayer) and module.flora_dropout:
            dropout, reader = module.flora_dropout["default"], name.removeprefix("base_model.model.")
            dropout.register_forward_hook(lambda _, args, out, reader=reader: keep(reader, args[0], out))
    without = output(model, inputs)
    assert all(bool((mask == 1).all()) for mask in masks.values())  # none in eval
    masks.clear()
    found = output(model.train(), inputs)

    assert masks.keys() == {reader for reader, _ in paths("llama", place, BLOCKS, (0, 1))}
    for mask in masks.values():
        dropped = mask.abs() < 1e-9
        assert_close(mask[~dropped], torch.full_like(mask[~dropped], 1 / (1 - p)))
        assert float(dropped.double().mean()) == pytest.approx(p, abs=0.1)
    shapes = [mask.shape for mask in masks.values()]
    for i, first in enumerate(masks.values()):
        for j, second in enumerate(masks.values()):
            assert i == j or shapes[i] != shapes[j] or not torch.equal(first, second)
    given = (base, "llama", weights_of(model), SCALE, place, activation)
    with by_hand(*given, dropped=lambda reader, x: x * masks[reader]):
        assert_close(found, output(base, inputs))
    assert_differ(found, without)
    with by_hand(*given):
        assert_close(without, output(base, inputs))
    masks.clear()
    assert torch.equal(output(model.eval(), inputs), without)


# torch.compile


@pytest.mark.parametrize("place", ["shared", "cross"])
def test_compiled_without_graph_breaks(place: str) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, activation="silu", **PLACES[place]).train()
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        loss = loss_of(compiled, inputs)
        loss.backward()
        assert_same_step((loss.detach(), gradients(model)), expected)
    links = [link for module in model.modules() if isinstance(module, FloraLayer) for link in module.reads.values()]
    assert all(link._traced is None and not link._held for link in links)
    assert_same_step(step(model, inputs), expected)  # and not compiled again


@pytest.mark.parametrize("place", ["block", "shared"])
def test_compiled_and_fused_with_checkpointing(place: str) -> None:
    """Dynamo has to be told that what a region puts on a link need not be put again when it is run again."""
    model, inputs = attach(base_model("llama"), **PLACES[place]).train(), tokens()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(model, backend="flora", fullgraph=True, options={"flora.inner": "aot_eager"})
        loss = loss_of(compiled, inputs)
        loss.backward()
    assert_same_step((loss.detach(), gradients(model)), expected)
    report = last_report()
    assert report is not None
    assert len(report.fused) == sum("flora_B" in name for name in expected[1])


# transformers' Trainer

DATA = [{"input_ids": torch.arange(i, i + 8) % 7 + 3, "labels": torch.arange(i, i + 8) % 7 + 3} for i in range(8)]


@pytest.mark.parametrize("fields", [{"placement": "shared", "activation": "silu"}, {"placement": "cross"}], ids=str)
def test_trainer(fields: dict[str, Any], tmp_path: Path) -> None:
    base = base_model("llama", torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = attach(base, init="lora", r=4, alpha=8, dropout=0.05, **fields)
    start = {name: weight.detach().clone() for name, weight in weights_of(model).items()}
    settings = hf.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=20,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = hf.Trainer(model, settings, train_dataset=DATA)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
    assert not any(torch.equal(weight, start[name]) for name, weight in weights_of(model).items())
    model.eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-20")
    assert [path.name for path in tmp_path.glob("checkpoint-20/*model*")] == ["adapter_model.safetensors"]
    inputs = tokens()
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    unloaded = model.unload().state_dict()
    assert unloaded.keys() == before.keys()
    assert all(torch.equal(unloaded[name], value) for name, value in before.items())


def test_reference_activations_are_torchs() -> None:
    """So that what the reference is compared with has been compared itself."""
    z = torch.randn(VOCAB, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        assert_close(function(z), z if name is None else getattr(nn.functional, name)(z))
