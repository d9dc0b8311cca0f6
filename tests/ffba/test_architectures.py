"""Which architectures FFBA knows, how many paths each gets, and what the others are told."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from flora_fx.adapters import FloraConfig, FloraLayer, parameters_of
from flora_fx.errors import AdapterError
from tests.architectures import VOCAB

from .reference import LAYOUTS, PLACES, attach, base_model, output, paths, tokens, weights_of

BLOCKS = ("attention", "mlp")


@pytest.mark.parametrize("place", ["block", "shared", "cross"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_with_b_zero_the_model_is_the_base_bitwise(family: str, place: str) -> None:
    base, inputs = base_model(family, torch.float32), tokens()
    model = attach(base, init="lora", activation="gelu", **PLACES[place])
    with torch.no_grad():
        assert torch.equal(output(model, inputs), output(base, inputs))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_b_zero_it_generates_what_the_base_generates(family: str) -> None:
    base, inputs = base_model(family), tokens(length=4)
    kept = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = base.generate(**inputs, **kept)
    found = attach(base, init="gaussian", placement="shared").generate(**inputs, **kept)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.sequences.shape == (2, 9)
    assert all(map(torch.equal, found.logits, expected.logits))
    assert not torch.equal(attach(base).generate(**inputs, **kept).logits[-1], expected.logits[-1])


@pytest.mark.parametrize("place", ["block", "shared", "cross"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_ends_are_where_the_layout_says(family: str, place: str) -> None:
    base = base_model(family, torch.float32)
    config = FloraConfig(r=3, **PLACES[place])
    expected = parameters_of(config, base)
    model = attach(base, **PLACES[place])
    planned = paths(family, place, BLOCKS, (0, 1))
    assert len(planned) == (3 if place == "cross" else 4)
    ends = {f"{reader}.A" for reader, _ in planned} | {f"{writer}.B" for _, writers in planned for writer in writers}
    assert weights_of(model).keys() == ends
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(weight) for weight in weights_of(model).values()}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained) == expected > 0


def test_parameters_by_hand() -> None:
    """A Llama of hidden size 48, MLP 80, 4 heads of 12, 2 of them for keys and values; 2 layers; rank 3."""
    q, k, v, o, gate, up, down = 48, 24, 24, 48, 80, 80, 48
    expected = {
        "block": 2 * 3 * ((48 + o) + (48 + down)),
        "forward": 2 * 3 * ((48 + q + k + v) + (48 + gate + up)),
        "backward": 2 * 3 * ((48 + o) + (48 + down)),
        "shared": 2 * 3 * ((48 + q + k + v + o) + (48 + gate + up + down)),
        "cross": 3 * (2 * (48 + gate + up) + (80 + q + k + v)),
    }
    base = base_model("llama", torch.float32)
    assert {place: parameters_of(FloraConfig(r=3, **fields), base) for place, fields in PLACES.items()} == expected


def untouched(model: nn.Module, config: FloraConfig) -> str:
    """The error of attaching; the model must be left as it was."""
    next(model.parameters()).requires_grad_(False)
    modules = dict(model.named_modules())
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterError) as error:
        peft.get_peft_model(model, config)
    after = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert dict(model.named_modules()) == modules
    assert not any(isinstance(module, FloraLayer) for module in model.modules())
    assert after.keys() == before.keys()
    assert all(parameter is before[name][0] and grad == before[name][1] for name, (parameter, grad) in after.items())
    assert not hasattr(model, "peft_config")
    return str(error.value)


@pytest.mark.parametrize("family", sorted(family for family, layout in LAYOUTS.items() if layout.norms is None))
def test_backward_needs_a_norm_before_the_block(family: str) -> None:
    said = untouched(base_model(family), FloraConfig(ends="backward"))
    assert "no norm was found before attention of " in said
    assert LAYOUTS[family].layer.format(0).rstrip(".") in said
    assert said.endswith("use ends='both'")


def test_backward_on_an_opt_that_normalises_after_its_blocks() -> None:
    config = copy.deepcopy(base_model("opt").config)
    config.do_layer_norm_before = False
    assert "no norm was found before attention" in untouched(hf.OPTForCausalLM(config), FloraConfig(ends="backward"))
    attach(hf.OPTForCausalLM(config))


BART: dict[str, Any] = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in
                        (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))}  # fmt: skip


def test_backward_on_an_encoder_that_normalises_after_its_blocks() -> None:
    model = hf.BartModel(hf.BartConfig(d_model=48, vocab_size=VOCAB, **BART)).encoder
    assert "no norm was found before attention" in untouched(model, FloraConfig(ends="backward"))


def mixtral() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads, num_local_experts=2))


def test_unknown_architecture_is_told_what_was_looked_for() -> None:
    said = untouched(base_model("t5", torch.float32), FloraConfig())
    assert said.startswith("T5ForConditionalGeneration has no attention block that FFBA knows.")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "attn.c_attn", "attention.query_key_value", "attention.q_lin"):
        assert name in said
    assert "mlp." not in said
    assert said.endswith("Use LoRA for this architecture.")


def test_unknown_block_is_told_what_was_looked_for_and_what_is_there() -> None:
    said = untouched(mixtral(), FloraConfig())
    assert said.startswith("MixtralForCausalLM has no mlp block that FFBA knows.")
    assert "mlp.gate_proj, mlp.up_proj with mlp.down_proj" in said
    assert "self_attn" not in said
    assert said.endswith("Leave it out: FloraConfig(blocks=['attention']).")


def test_the_other_block_works() -> None:
    base, inputs = mixtral().eval(), tokens()
    model = attach(base, blocks=["attention"])
    assert len(weights_of(model)) == 4
    assert not torch.equal(output(model, inputs), output(base, inputs))


def test_layers_that_are_not_there() -> None:
    said = untouched(base_model("llama"), FloraConfig(layers=[1, 2, 7]))
    assert "lists [2, 7]" in said
    assert "has layers 0 to 1" in said


def test_cross_needs_a_second_block() -> None:
    said = untouched(base_model("llama"), FloraConfig(placement="cross", layers=[0], blocks=["mlp"]))
    assert "needs a block after another one" in said


def test_cross_stays_within_the_encoder_or_the_decoder() -> None:
    model = attach(hf.BartModel(hf.BartConfig(d_model=48, vocab_size=VOCAB, **BART)), placement="cross")
    sides = [name.split(".")[0] for name in weights_of(model) if name.endswith(".A")]
    assert sorted(sides) == ["decoder"] * 3 + ["encoder"] * 3
    assert "encoder.layers.1.fc2.A" not in weights_of(model)
    assert torch.isfinite(output(model, tokens())).all()


class Adder(nn.Module):
    """Something that is no linear layer, under a known name."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_what_is_no_linear_layer_is_named() -> None:
    base = base_model("llama")
    base.model.layers[1].mlp.down_proj = Adder()
    assert untouched(base, FloraConfig()) == ("model.layers.1.mlp.down_proj is a Adder; FFBA knows linear layers")


def test_adapter_of_another_kind_in_the_way() -> None:
    base = base_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["o_proj"]), base)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.o_proj carries an adapter of another kind .*unload"):
        peft.inject_adapter_in_model(FloraConfig(), base)
    assert not any(isinstance(module, FloraLayer) for module in base.modules())


def test_layers_of_another_kind_are_told_of() -> None:
    """A mixture of experts behind a dense layer: the adapter is where it can be; the user is told where it is not."""
    base = base_model("llama")
    base.model.layers[1].mlp = torch.nn.Identity()
    with pytest.warns(UserWarning, match=r"model.layers has no mlp block that FFBA knows in layers \[1\]"):
        attach(base)


def test_rows_for_several_adapters_are_refused() -> None:
    model = attach(base_model("llama"))
    with pytest.raises(AdapterError, match=r"no adapter_names: call flora_fx\.MixedAdapters"):
        model(input_ids=torch.tensor([[1, 2]]), adapter_names=["default"])
