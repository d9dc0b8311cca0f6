"""Attach, save, load, switch, delete, unload: an FFBA adapter lives as a LoRA does, except that it cannot be merged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora_fx.adapters import FloraConfig, FloraLayer
from flora_fx.errors import AdapterError
from tests.architectures import VOCAB
from tests.patience import LIMIT_S

from .reference import PLACES, assert_differ, attach, base_model, output, tokens, weights_of


def active(model: nn.Module) -> set[tuple[str, ...]]:
    """What the layers take for the active adapters."""
    return {tuple(module.active_adapters) for module in model.modules() if isinstance(module, FloraLayer)}


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# Saving and loading


@pytest.mark.parametrize("place", PLACES)
def test_round_trip_is_bitwise(place: str, tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, activation="silu", layers=[1], **(PLACES[place]))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert_differ(output(loaded, inputs), output(base, inputs))
    assert weights_of(loaded).keys() == weights_of(model).keys()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    model = attach(base_model("llama"), placement="shared", blocks=["mlp"], layers=[1], activation="relu")
    model.save_pretrained(tmp_path)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    prefix = "base_model.model.model.layers.1.mlp."
    found = saved(tmp_path)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        f"{prefix}gate_proj.flora_A.weight": (3, 48),
        f"{prefix}gate_proj.flora_B.weight": (80, 3),
        f"{prefix}up_proj.flora_B.weight": (80, 3),
        f"{prefix}down_proj.flora_B.weight": (48, 3),
    }
    for name, value in found.items():
        assert torch.equal(value, model.get_parameter(name.replace(".weight", ".default.weight")))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "FLORA"
    assert (fields["placement"], fields["blocks"], fields["layers"]) == ("shared", ["mlp"], [1])
    assert (fields["r"], fields["alpha"], fields["activation"]) == (3, 7, "relu")


def test_loaded_to_train_on(tmp_path: Path) -> None:
    base = base_model("llama")
    attach(base).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    trained = {id(parameter) for parameter in loaded.parameters() if parameter.requires_grad}
    assert trained == {id(weight) for weight in weights_of(loaded).values()}


def test_loaded_with_low_cpu_mem_usage(tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, placement="cross")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_auto_classes_find_the_base_and_the_adapter(tmp_path: Path) -> None:
    base_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, FloraConfig(placement="shared", init="random", task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = output(model, tokens_ := tokens())
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is peft.PeftModelForCausalLM
    assert torch.equal(output(loaded, tokens_), expected)
    # transformers' own class, which attaches adapters itself
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is hf.LlamaForCausalLM
    assert torch.equal(output(loaded, tokens_), expected)


def test_weights_of_another_rank_are_refused(tmp_path: Path) -> None:
    base = base_model("llama")
    attach(base).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*flora_A\.default\.weight.*\[3, 48\].*\[4, 48\]"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_weights_that_are_missing_are_warned_of(tmp_path: Path) -> None:
    base = base_model("llama")
    attach(base).save_pretrained(tmp_path)
    weights = saved(tmp_path)
    gone = next(iter(weights))
    save_file({name: value for name, value in weights.items() if name != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=gone.removesuffix(".weight").replace(".", r"\.")):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_a_fresh_process_knows_the_method_once_it_is_imported(tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    base.save_pretrained(tmp_path / "base")
    model = attach(base)
    model.save_pretrained(tmp_path / "adapter")
    torch.save((inputs, output(model, inputs)), tmp_path / "expected.pt")
    script = f"""
import flora_fx, peft, torch, transformers
torch.set_num_threads(1)
base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
try:
    peft.PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
except KeyError as error:
    print("unknown", error)
import flora_fx.adapters
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
print("right", float((model(**inputs)[0] - expected).abs().max()) < 1e-12)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["unknown 'FLORA'", "right True"]


def test_peft_type() -> None:
    kind = peft.PeftType.FLORA
    assert kind is peft.PeftType("FLORA") is peft.PeftType["FLORA"] is copy.deepcopy(kind)
    assert (kind.name, kind.value, kind) == ("FLORA", "FLORA", "FLORA")
    assert kind in list(peft.PeftType)
    assert kind != peft.PeftType.LORA
    assert "FLORA" not in {member.name for member in peft.PeftType if member is not kind}


# Several adapters


def several(base: Any) -> tuple[Any, dict[str, Any]]:
    """A model with three adapters, and models that have but one of them."""
    fields: dict[str, dict[str, Any]] = {
        "block": {"r": 3, "alpha": 7, "init": "random"},
        "shared": {
            "r": 5,
            "alpha": 2,
            "init": "random",
            "placement": "shared",
            "blocks": ["mlp"],
            "activation": "gelu",
        },
        "cross": {"r": 2, "alpha": 3, "use_rslora": True, "init": "random", "placement": "cross"},
    }
    model, alone = attach(base, "block"), {}
    for name in ("shared", "cross"):
        model.add_adapter(name, FloraConfig(**fields[name]))
    for name, given in fields.items():
        alone[name] = attach(base, name, **given)
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        found = peft.set_peft_model_state_dict(alone[name], state, adapter_name=name)
        assert not found.unexpected_keys
        assert weights_of(alone[name], name).keys() == weights_of(model, name).keys()
    return model.eval(), alone


def test_switching_between_adapters() -> None:
    base, inputs = base_model("llama"), tokens()
    model, alone = several(base)
    seen = [output(base, inputs)]
    for name in ("shared", "cross", "block", "shared"):
        model.set_adapter(name)
        assert torch.equal(output(model, inputs), output(alone[name], inputs))
        assert active(model) == {(name,)}
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert trained == {id(weight) for weight in weights_of(model, name).values()}
        seen.append(output(model, inputs))
    for i in range(4):
        assert_differ(seen[i], seen[i + 1])


def test_adding_an_adapter_leaves_the_active_one_active() -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, "block")
    expected = output(model, inputs)
    model.add_adapter("shared", FloraConfig(init="random", placement="shared"))
    model.eval()
    assert torch.equal(output(model, inputs), expected)
    assert model.active_adapter == "block"
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(weight) for weight in weights_of(model, "block").values()}


def test_several_adapters_are_saved_each_in_its_folder(tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    model, alone = several(base)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "cross", adapter_name="cross")
    assert torch.equal(output(loaded, inputs), output(alone["cross"], inputs))
    loaded.load_adapter(tmp_path / "shared", "shared")
    assert torch.equal(output(loaded, inputs), output(alone["cross"], inputs))
    loaded.set_adapter("shared")
    assert torch.equal(output(loaded, inputs), output(alone["shared"], inputs))


def test_disable_adapter_is_the_base_bitwise() -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, placement="shared")
    adapted = output(model, inputs)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(base, inputs))
    assert torch.equal(output(model, inputs), adapted)
    assert_differ(adapted, output(base, inputs))


def test_delete_an_adapter() -> None:
    base, inputs = base_model("llama"), tokens()
    model, alone = several(base)
    model.delete_adapter("shared")
    assert not weights_of(model, "shared")
    assert set(model.peft_config) == {"block", "cross"}
    for name in ("cross", "block"):
        model.set_adapter(name)
        assert torch.equal(output(model, inputs), output(alone[name], inputs))
    for layer in (module for module in model.modules() if isinstance(module, FloraLayer)):
        for part in (layer.flora_A, layer.flora_B, layer.flora_dropout, layer.scaling, layer.reads, layer.writes):
            assert "shared" not in part
    model.delete_adapter("block")
    model.delete_adapter("cross")
    assert torch.equal(output(model.base_model.model, inputs), output(base, inputs))


@pytest.mark.parametrize("first", [{"ends": "forward", "blocks": ["attention"]}, {"layers": [0]}], ids=str)
def test_deleting_the_active_adapter_leaves_one_active_everywhere(first: dict[str, Any]) -> None:
    model, inputs = attach(base_model("llama"), "one", **first), tokens()
    expected = output(model, inputs)
    model.add_adapter("other", FloraConfig(init="random", **({"layers": [1]} if "layers" in first else {})))
    model.add_adapter("third", FloraConfig(init="random"))
    model.set_adapter("third")
    model.delete_adapter("third")
    assert active(model) == {("one",)}
    assert torch.equal(output(model.eval(), inputs), expected)


def test_adapter_that_does_not_fit_leaves_the_others_working(tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base)
    expected = output(model, inputs)
    with pytest.raises(AdapterError, match="layers 0 to 1"):
        model.add_adapter("misfit", FloraConfig(layers=[9]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model, inputs), expected)
    model.add_adapter("fit", FloraConfig())
    model.save_pretrained(tmp_path)
    assert len(saved(tmp_path)) == 8


# What is not possible, and the way back


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
@pytest.mark.parametrize("place", ["block", "cross"])
def test_merging_says_why_not_and_what_to_do(place: str, method: str) -> None:
    model, inputs = attach(base_model("llama"), **PLACES[place]), tokens()
    expected = output(model, inputs)
    with pytest.raises(AdapterError) as error:
        getattr(model, method)()
    said = str(error.value)
    assert said.startswith("an FFBA adapter cannot be merged: its path begins at the input of one projection and ends")
    for remedy in ("flora_fx.fuse", "torch.compile(model, backend='flora')", "export", "unload()"):
        assert remedy in said
    assert torch.equal(output(model, inputs), expected)
    assert model.get_model_status().merged_adapters == []
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_merging_one_layer_is_refused_too() -> None:
    layer = next(module for module in attach(base_model("llama")).modules() if isinstance(module, FloraLayer))
    for method in (layer.merge, layer.unmerge):
        with pytest.raises(AdapterError, match="cannot be merged"):
            method()
    assert not layer.merged


@pytest.mark.parametrize("place", PLACES)
def test_unload_gives_the_base_back(place: str) -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, **PLACES[place])
    model.add_adapter("shared", FloraConfig(placement="shared", init="random"))
    unloaded = model.unload()
    assert type(unloaded) is hf.LlamaForCausalLM
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == [
        (name, type(module)) for name, module in base.named_modules()
    ]
    state, expected = unloaded.state_dict(), base.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(output(unloaded, inputs), output(base, inputs))
    again = peft.get_peft_model(unloaded, FloraConfig(init="random")).eval()
    assert_differ(output(again, inputs), output(base, inputs))


# Around it


def test_transformers_own_methods(tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    model = copy.deepcopy(base)
    model.add_adapter(FloraConfig(r=3, init="random", placement="shared"), "shared")
    model.eval()
    assert model.active_adapters() == ["shared"]
    adapted = output(model, inputs)
    assert_differ(adapted, output(base, inputs))
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(output(loaded, inputs), adapted)
    model.add_adapter(FloraConfig(r=4, init="random", placement="cross"), "cross")
    assert model.active_adapters() == ["cross"]
    assert_differ(output(model, inputs), adapted)
    model.set_adapter("shared")
    assert torch.equal(output(model, inputs), adapted)
    model.disable_adapters()
    assert torch.equal(output(model, inputs), output(base, inputs))
    model.enable_adapters()
    model.delete_adapter("cross")
    assert torch.equal(output(model, inputs), adapted)


def test_inject_adapter_in_model() -> None:
    base, inputs = base_model("llama"), tokens()
    model = peft.inject_adapter_in_model(FloraConfig(r=3, alpha=7, init="random"), copy.deepcopy(base))
    other = attach(base)
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model, adapter_name="default"))
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))
    assert len(weights_of(model)) == 8
    assert_differ(output(model, inputs), output(base, inputs))


def test_classification_head_trains_and_is_saved(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": VOCAB}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0)
    base, inputs = hf.LlamaForSequenceClassification(config).eval(), tokens()
    model = peft.get_peft_model(copy.deepcopy(base), FloraConfig(init="random", task_type="SEQ_CLS"))
    head = {name for name, p in model.named_parameters() if p.requires_grad and "flora_" not in name}
    assert head == {"base_model.model.score.modules_to_save.default.weight"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    weights = saved(tmp_path)
    assert "base_model.model.score.weight" in weights
    assert not torch.equal(weights["base_model.model.score.weight"], base.score.weight)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_deep_copy_is_another_model() -> None:
    base, inputs = base_model("llama"), tokens()
    model = attach(base, placement="shared")
    expected = output(model, inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied, inputs), expected)
    with torch.no_grad():
        for weight in weights_of(copied).values():
            weight.zero_()
    assert torch.equal(output(copied, inputs), output(base, inputs))
    assert torch.equal(output(model, inputs), expected)


def test_state_dict_through_a_file(tmp_path: Path) -> None:
    base, inputs = base_model("llama"), tokens()
    model, other = attach(base, placement="cross"), attach(base, placement="cross")
    assert_differ(output(other, inputs), output(model, inputs))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(output(other, inputs), output(model, inputs))
    for assign in (False, True):
        other = attach(base, placement="cross")
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(output(other, inputs), output(model, inputs))


@pytest.mark.parametrize("place", PLACES)
def test_base_in_bf16(place: str) -> None:
    """The adapter is in float32, as PEFT has it; the output has the base's type and is right to its precision."""
    base, inputs = base_model("llama", torch.bfloat16), tokens()
    model = attach(base, activation="silu", **PLACES[place])
    assert {weight.dtype for weight in weights_of(model).values()} == {torch.float32}
    assert {module.base_layer.weight.dtype for module in model.modules() if isinstance(module, FloraLayer)} == {
        torch.bfloat16
    }
    expected = output(copy.deepcopy(model).double(), inputs)
    found = output(model, inputs)
    assert found.dtype == torch.bfloat16
    error, effect = ((found - other).abs().max() for other in (expected, output(base, inputs)))
    assert error < 0.05 * expected.abs().max() < effect
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights_of(model).values())


def test_base_in_bf16_with_b_zero() -> None:
    base, inputs = base_model("llama", torch.bfloat16), tokens()
    assert torch.equal(output(attach(base, init="lora", placement="shared"), inputs), output(base, inputs))


def test_adapter_in_the_bases_type_where_peft_is_told_so() -> None:
    base, inputs = base_model("llama", torch.bfloat16), tokens()
    model = peft.get_peft_model(base, FloraConfig(init="random"), autocast_adapter_dtype=False)
    assert {weight.dtype for weight in weights_of(model).values()} == {torch.bfloat16}
    assert output(model, inputs).dtype == torch.bfloat16


def test_counts_that_peft_prints(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model("llama")
    total = sum(parameter.numel() for parameter in base.parameters())
    model = attach(base)  # 2 layers, 2 blocks, rank 3, 48 in and out
    trained = 2 * 2 * 3 * (48 + 48)
    assert model.get_nb_trainable_parameters() == (trained, total + trained)
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,} || all params: {total + trained:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.trainable_params, status.num_adapter_layers, status.enabled) == (trained, 8, True)
    assert status.active_adapters == status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert {layer.module_type for layer in model.get_layer_status()} == {"flora.FloraLayer"}


@pytest.mark.parametrize("place", PLACES)
def test_attaching_warns_of_nothing(place: str, recwarn: pytest.WarningsRecorder) -> None:
    base = base_model("llama")
    recwarn.clear()
    attach(base, **PLACES[place])
    said = [str(warning.message) for warning in recwarn]
    assert [message for message in said if not message.startswith("`is_gradient_checkpointing` is deprecated")] == []


@pytest.mark.parametrize("init", ["lora", "gaussian", "random"])
def test_initial_weights(init: str) -> None:
    weights = weights_of(attach(base_model("llama"), r=16, init=init))
    for name, weight in weights.items():
        if name.endswith(".B"):
            assert bool(weight.any()) == (init == "random")
        elif init == "gaussian":
            assert weight.std().item() == pytest.approx(1 / 16, rel=0.15)
            assert weight.abs().max() > 2.5 / 16
        else:
            assert 0.95 / 48**0.5 < weight.abs().max() <= 1 / 48**0.5  # PyTorch's own: uniform within 1/sqrt(in)
