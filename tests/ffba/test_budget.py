"""Budgets: the largest rank that fits, the same question for LoRA, and nothing is attached or allocated for it."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from flora_fx.adapters import FloraConfig, budget, parameters_of, rank_for_budget
from flora_fx.errors import AdapterError
from tests.architectures import VOCAB

from .reference import PLACES, attach, base_model

CONFIGS: dict[str, peft.PeftConfig] = {place: FloraConfig(**fields) for place, fields in PLACES.items()} | {
    "one layer": FloraConfig(r=64, layers=[1], blocks=["mlp"]),
    "LoRA": peft.LoraConfig(r=64, target_modules="all-linear"),
    "LoRA with a rank of its own": peft.LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5}),
    "DoRA": peft.LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True),
    "with an embedding that trains": FloraConfig(modules_to_save=["embed_tokens"]),
}


def at_rank(config: Any, rank: int) -> Any:
    found = type(config).from_peft_type(**(config.to_dict() | {"r": rank}))
    assert found.r == rank
    return found


def attached(config: peft.PeftConfig) -> int:
    """The parameters that train once it really is attached."""
    model = peft.get_peft_model(base_model("llama", torch.float32), config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_that_train_once_attached(config: peft.PeftConfig) -> None:
    assert parameters_of(config, base_model("llama", torch.float32)) == attached(at_rank(config, config.r)) > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rank_is_the_largest_that_fits(config: peft.PeftConfig) -> None:
    base = base_model("llama", torch.float32)
    costs = {rank: attached(at_rank(config, rank)) for rank in (1, 2, 6, 7)}
    assert len(set(costs.values())) == 4
    for parameters, rank in ((costs[7] - 1, 6), (costs[6], 6), (costs[6] - 1, 5), (costs[2] - 1, 1), (costs[1], 1)):
        assert rank_for_budget(base, config, parameters=parameters) == rank
    with pytest.raises(AdapterError, match=rf"^{costs[1] - 1} parameters are too few: rank 1 .* has {costs[1]}$"):
        rank_for_budget(base, config, parameters=costs[1] - 1)


def test_one_budget_for_both() -> None:
    base = base_model("llama", torch.float32)
    lora, flora = peft.LoraConfig(r=6, target_modules="all-linear"), FloraConfig(placement="shared")
    parameters = parameters_of(lora, base)
    rank = rank_for_budget(base, flora, parameters=parameters)
    assert rank > 6  # one A, where LoRA has one for each projection
    assert attached(at_rank(flora, rank)) <= parameters < attached(at_rank(flora, rank + 1))


@pytest.mark.parametrize("config", [FloraConfig(), CONFIGS["LoRA"]], ids=["FFBA", "LoRA"])
def test_model_with_adapters_is_refused(config: peft.PeftConfig) -> None:
    model = attach(base_model("llama", torch.float32))
    for adapted in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match="has adapters already; count on the base model"):
            parameters_of(config, adapted)
        with pytest.raises(AdapterError, match="has adapters already; count on the base model"):
            rank_for_budget(adapted, config, parameters=10**6)
    assert parameters_of(FloraConfig(r=3), model.unload()) == 2 * 3 * (96 + 96)


def test_model_that_does_not_fit_is_told_why() -> None:
    with pytest.raises(AdapterError, match="has no attention block that FFBA knows"):
        parameters_of(FloraConfig(), base_model("t5", torch.float32))


@pytest.mark.parametrize("config", [FloraConfig(placement="shared"), CONFIGS["LoRA"]], ids=["FFBA", "LoRA"])
def test_nothing_is_attached_and_no_memory_is_taken(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []

    def get_peft_model(model: nn.Module, *args: Any) -> Any:
        built.append(peft.get_peft_model(model, *args))
        return built[-1]

    monkeypatch.setattr(budget, "get_peft_model", get_peft_model)
    base = base_model("llama", torch.float32)
    modules, config_before = dict(base.named_modules()), config.to_dict()
    state = {name: (value, value.data_ptr(), value.clone()) for name, value in base.state_dict(keep_vars=True).items()}
    rank_for_budget(base, config, parameters=10_000)
    assert len(built) == 2
    for model in built:
        tensors = [*model.parameters(), *model.buffers()]
        assert len(tensors) > len(state)
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert dict(base.named_modules()) == modules
    for name, value in base.state_dict(keep_vars=True).items():
        before, pointer, copied = state[name]
        assert value is before
        assert value.data_ptr() == pointer
        assert value.requires_grad
        assert torch.equal(value, copied)
    assert config.to_dict() == config_before
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("kind", [FloraConfig, peft.LoraConfig])
def test_configuration_is_left_as_it_was(kind: Any) -> None:
    """Attaching fills in what PEFT finds out: targets, and the classifier that trains."""
    config = kind(task_type="SEQ_CLS", **({} if kind is FloraConfig else {"target_modules": "all-linear"}))
    before = copy.deepcopy(config)
    parameters_of(config, base_model("llama", torch.float32))
    assert config == before
    assert config.modules_to_save is None
    assert config.target_modules == before.target_modules


def test_model_that_would_not_fit_in_memory() -> None:
    """70 GB, had it not been made on the meta device."""
    sizes: dict[str, Any] = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 20}
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=64, vocab_size=VOCAB))
    parameters = 20 * 2 * 16 * (8192 + 8192)
    assert rank_for_budget(model, FloraConfig(), parameters=parameters) == 16


def test_rank_that_changes_nothing() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    with pytest.raises(AdapterError):
        rank_for_budget(base_model("llama", torch.float32), config, parameters=10_000)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_lora_that_is_initialised_from_the_weights(init: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    assert parameters_of(config, base_model("llama", torch.float32)) == 2 * 4 * (48 + 48)
