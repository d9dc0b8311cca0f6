"""transformers models with PEFT LoRA on all linear layers: the graph, the numbers, the user's model unharmed.

`families` has many more; here is what is the same for all.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import flora_fx
from flora_fx import FuseConfig
from tests.architectures import base_model, example_inputs, lora_model

# GEMMs of a fused graph: a pack and an accumulation per read, and what no adapter sits on (the head). q, k and v have
# two scales (rank_pattern), so two accumulations.
GEMMS = {
    "llama": 2 * (2 * 4 + 1) + 1,
    "gpt2": 2 * (2 * 4) + 1,
    "bert": 2 * (2 * 4 + 1) + 2,
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_fused_equals_unfused(name: str) -> None:
    model = lora_model(name)
    for dtype, tolerance in [(torch.float64, 1e-10), (torch.float32, 1e-5)]:
        model = model.to(dtype)
        inputs = example_inputs(name, dtype)
        weights = {key: weight.clone() for key, weight in model.state_dict().items()}
        with torch.no_grad():
            expected = model(**inputs)
            graph = flora_fx.capture(model, **inputs)
            fused = flora_fx.fuse(graph)
            found = fused(**inputs)
            again = model(**inputs)
            plain = flora_fx.fuse(flora_fx.capture(base_model(name).to(dtype), **inputs))
        assert type(found) is type(expected)
        assert (found[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
        # The user's model has the same weights, as views of packs: BLAS may sum strided ones in another order.
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        assert (again[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
        report = flora_fx.report(fused)
        adapters = sum(1 for key in model.state_dict() if "lora_B" in key)
        assert len(report.fused) == adapters, str(report)
        assert not report.declines, str(report)
        if name in GEMMS:
            assert report.ops_after["gemm"] == GEMMS[name], str(report)
        assert report.ops_after["elementwise"] == flora_fx.report(plain).ops_after["elementwise"], str(report)


def test_a_llama_layer_costs_8_gemms_where_peft_costs_21_and_14_elementwise() -> None:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    def count(layers: int) -> tuple[dict[str, int], dict[str, int]]:
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=97,
            )
        )
        config = peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(base, config).eval().requires_grad_(False)
        report = flora_fx.report(flora_fx.fuse(flora_fx.capture(model, torch.ones(2, 5, dtype=torch.long))))
        return dict(report.ops_before), dict(report.ops_after)

    (before_1, after_1), (before_3, after_3) = count(1), count(3)
    assert (before_3["gemm"] - before_1["gemm"]) / 2 == 21
    assert (after_3["gemm"] - after_1["gemm"]) / 2 == 8
    saved = [
        (before["elementwise"] - after["elementwise"]) for before, after in ((before_1, after_1), (before_3, after_3))
    ]
    assert saved == [14, 42]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_every_configuration_of_real_models(name: str) -> None:
    model = lora_model(name).double()
    inputs = example_inputs(name)
    with torch.no_grad():
        expected = model(**inputs)[0]
        graph = flora_fx.capture(model, **inputs)
        for config in (
            FuseConfig(layout="beside", up="per_projection", accumulate="add", fold_scale=True),
            FuseConfig(layout="beside"),
            FuseConfig(layout="ahead"),
            FuseConfig(up="per_projection", pack_base=True),
        ):
            fused = flora_fx.fuse(copy.deepcopy(graph), config=config)
            assert (fused(**inputs)[0] - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dynamic_batch_and_length(name: str) -> None:
    model = lora_model(name).double()
    inputs = example_inputs(name)
    auto = torch.export.Dim.AUTO
    graph = flora_fx.capture(model, **inputs, dynamic_shapes={key: {0: auto, 1: auto} for key in inputs})
    fused = flora_fx.fuse(graph)
    ids = torch.randint(3, 97, (3, 11))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        found = fused(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_decomposed_programs(name: str) -> None:
    model = lora_model(name).double()
    inputs = example_inputs(name)
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
        program = torch.export.export(model, (), inputs, strict=False).run_decompositions()
        fused = flora_fx.fuse(program)
        found = fused.module()(**inputs)[0]
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    report = flora_fx.report(fused)
    assert len(report.fused) == sum(1 for key in model.state_dict() if "lora_B" in key)
    assert not report.declines, str(report)


def test_several_active_adapters_and_partial_targets() -> None:
    import peft

    model = peft.get_peft_model(
        base_model("llama"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.add_adapter(
        "second",
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj"], init_lora_weights=False),
    )
    model.base_model.set_adapter(["default", "second"])
    model = model.double().eval().requires_grad_(False)
    inputs = example_inputs("llama")
    with torch.no_grad():
        fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
        expected = model(**inputs)[0]
        assert (fused(**inputs)[0] - expected).abs().max() <= 1e-10 * expected.abs().max()
    report = flora_fx.report(fused)
    assert len(report.fused) == 8
    assert not report.declines


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
        {"bias": "all"},
        {"fan_in_fan_out": False},
    ],
)
def test_variants_of_lora_are_fused_or_declined_but_never_wrong(options: dict[str, bool]) -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, **options)
    model = peft.get_peft_model(base_model("llama"), config).double().eval().requires_grad_(False)
    inputs = example_inputs("llama")
    with torch.no_grad():
        fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
        expected = model(**inputs)[0]
        assert (fused(**inputs)[0] - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_bfloat16_is_as_close_to_float64_as_peft_is() -> None:
    model = lora_model("llama")
    inputs = example_inputs("llama")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs)[0]
        narrow = model.to(torch.bfloat16)
        fused = flora_fx.fuse(flora_fx.capture(narrow, **inputs))
        theirs = (narrow(**inputs)[0].double() - exact).abs().mean()
        ours = (fused(**inputs)[0].double() - exact).abs().mean()
    assert ours <= 1.1 * theirs
