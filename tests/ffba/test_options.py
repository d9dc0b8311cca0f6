"""What training may vary: how A begins, how fast B learns, which parts there are; fused, none costs a GEMM more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import flora_fx
from flora_fx.adapters import FloraConfig, parameter_groups, parameters_of
from flora_fx.errors import AdapterError

from .counted import gemms, ups_of
from .reference import PLACES, assert_close, assert_differ, attach, base_model, output, tokens, weights_of


def downs(model: nn.Module) -> list[Tensor]:
    return [weight for name, weight in weights_of(model).items() if name.endswith(".A")]


def attached(base: nn.Module, **fields: Any) -> Any:
    return peft.get_peft_model(base, FloraConfig(alpha=10, placement="shared", **fields))


# --- how A begins -----------------------------------------------------------------------------------------


def test_rows_of_an_orthogonal_a_are_orthonormal_and_b_is_zero() -> None:
    base, inputs = base_model("llama"), tokens()
    plain = output(base, inputs)
    model = attached(base, r=5, init="orthogonal")
    assert len(downs(model)) == 4
    for weight in downs(model):
        assert weight.shape == (5, 48)
        torch.testing.assert_close(weight @ weight.T, torch.eye(5, dtype=weight.dtype), atol=1e-6, rtol=0)
    assert torch.equal(output(model, inputs), plain)


def test_columns_are_where_the_rank_is_larger() -> None:
    model = attached(base_model("llama"), r=60, init="orthogonal")
    for weight in downs(model):
        torch.testing.assert_close(weight.T @ weight, torch.eye(48, dtype=weight.dtype), atol=1e-6, rtol=0)


def test_orthogonal_is_drawn_from_the_seed() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return downs(attached(base_model("llama"), r=5, init="orthogonal"))[0].detach()

    assert torch.equal(drawn(1), drawn(1))
    assert_differ(drawn(1), drawn(2))


def test_orthogonal_in_half_precision_and_without_memory() -> None:
    base = base_model("llama")
    assert parameters_of(FloraConfig(r=5, init="orthogonal"), base) == parameters_of(FloraConfig(r=5), base)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as transformers loads a model in half precision
    try:
        model = attached(base.to(torch.bfloat16), r=5, init="orthogonal")
    finally:
        torch.set_default_dtype(before)
    for weight in downs(model):
        rows = weight.float()
        torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=0.02, rtol=0)


@pytest.mark.parametrize("place", ["block", "shared", "cross", "forward"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_of_an_svd_a_are_what_the_weights_beside_it_amplify_most(name: str, place: str) -> None:
    base, inputs = base_model(name), tokens()
    weights = {path: weight.detach().clone() for path, weight in base.named_parameters()}
    plain = output(base, inputs)
    model = peft.get_peft_model(base, FloraConfig(r=5, init="svd", **PLACES[place]))
    first = {
        "llama": {"attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "last": ["mlp.down_proj"]},
        "gpt2": {"attention": ["attn.c_attn"], "last": ["mlp.c_proj"]},
    }[name]["last" if place == "cross" else "attention"]
    layer = {"llama": "model.layers.0", "gpt2": "transformer.h.0"}[name]
    matrices = [weights[f"{layer}.{path}.weight"] for path in first]
    stacked = torch.cat([matrix.T if name == "gpt2" else matrix for matrix in matrices])
    reader: Any = model.base_model.model.get_submodule(f"{layer}.{first[0]}")
    directions = torch.linalg.svd(stacked).Vh[:5]
    found = reader.flora_A.default.weight
    # A singular vector is known but for its sign.
    torch.testing.assert_close((found @ directions.T).abs(), torch.eye(5, dtype=found.dtype), atol=1e-6, rtol=0)
    assert torch.equal(output(model, inputs), plain)


def test_svd_is_no_work_where_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(base_model("llama"), r=5, init="svd")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("flora_fx.adapters.tuner.begin_with_directions", lambda *_: pytest.fail("computed"))
    loaded = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path)
    for weight, before in zip(downs(loaded), downs(model), strict=True):
        assert torch.equal(weight, before)
    assert loaded.peft_config["default"].init == "svd"


def test_svd_in_half_precision_and_without_memory() -> None:
    base = base_model("llama")
    assert parameters_of(FloraConfig(r=5, init="svd"), base) == parameters_of(FloraConfig(r=5), base)
    for weight in downs(attached(base.to(torch.bfloat16), r=5, init="svd")):
        rows = weight.float()
        torch.testing.assert_close(rows @ rows.T, torch.eye(5), atol=0.02, rtol=0)


def test_svd_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"init='svd', ends='backward'.*use init='orthogonal'"):
        FloraConfig(init="svd", ends="backward")
    with pytest.raises(AdapterError, match=r"r=60, init='svd'.*q_proj reads 48 features.*lower r or use init='lora'"):
        attached(base_model("llama"), r=60, init="svd")
    base: Any = base_model("llama")
    projection = base.model.layers[1].self_attn.k_proj
    projection.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)  # packed codes
    with pytest.raises(AdapterError, match=r"init='svd'.*layers\.1\.self_attn\.q_proj reads.*use init='orthogonal'"):
        attached(base, r=3, init="svd")


# --- how fast B learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FFBA", "LoRA"])
def test_b_has_a_learning_rate_of_its_own(kind: str) -> None:
    config: Any = FloraConfig(r=3, placement="shared", modules_to_save=["lm_head"])
    if kind == "LoRA":
        config = peft.LoraConfig(r=3, target_modules="all-linear", modules_to_save=["lm_head"])
    model: Any = peft.get_peft_model(base_model("llama"), config)
    rest, up = parameter_groups(model, lr=2e-3, ratio=8)
    assert (rest["lr"], up["lr"]) == (2e-3, 1.6e-2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [{names[id(parameter)] for parameter in group["params"]} for group in (rest, up)]
    assert found[1] == {name for name in trained if "_B." in name}
    assert found[0] == trained - found[1]
    assert any("lm_head" in name for name in found[0])
    assert len(found[0] | found[1]) == len(rest["params"]) + len(up["params"])


def test_a_step_moves_b_so_much_further() -> None:
    """Adam's first step moves every weight by the learning rate, whatever its gradient."""
    model, inputs = attach(base_model("llama"), placement="shared"), tokens()
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3, ratio=5), eps=0.0)
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    for name, weight in weights_of(model).items():
        moved = (weight - before[name]).abs()
        torch.testing.assert_close(
            moved, torch.full_like(moved, 5e-3 if name.endswith(".B") else 1e-3), rtol=1e-6, atol=0
        )


def test_groups_of_what_has_no_adapter() -> None:
    base = base_model("llama")
    [group] = parameter_groups(base, lr=1e-3, ratio=4)
    assert (group["lr"], len(group["params"])) == (1e-3, len(list(base.parameters())))
    with pytest.raises(AdapterError, match="no parameter of LlamaForCausalLM requires gradients; activate an adapter"):
        parameter_groups(base.requires_grad_(False), lr=1e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lr": 0.0}, "lr is 0.0; it must be a positive number"),
        ({"lr": math.nan}, "lr is nan; it must be a positive number"),
        ({"lr": 1e-3, "ratio": -1.0}, "ratio is -1.0; it must be a positive number"),
        ({"lr": 1e-3, "ratio": math.inf}, "ratio is inf; it must be a positive number"),
    ],
)
def test_rates_that_make_no_sense(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match="positive") as error:
        parameter_groups(nn.Linear(2, 3), **fields)
    assert str(error.value) == said


# --- what it costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"init": "orthogonal"}, {"init": "svd"}, {"use_rslora": True}, {"dropout": 0.25}],
    ids=str,
)
def test_an_option_of_training_costs_no_gemm(fields: dict[str, Any]) -> None:
    inputs = tokens()
    model = attached(base_model("llama"), r=3, **fields)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".flora_B." in name:
                weight.normal_(std=0.05)
    model.eval().requires_grad_(False)
    expected = output(model, inputs)
    fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
    assert_close(output(fused, inputs), expected, 1e-10)
    report = flora_fx.report(fused)
    assert set(report.fused) == ups_of(model)
    assert report.ops_after["gemm"] == gemms("shared")


def test_a_cross_beside_a_shared_costs_no_gemm() -> None:
    """Its A joins the projection that reads the same, its B the one that writes the same."""
    inputs = tokens()
    model = attach(base_model("llama"), placement="shared")
    alone = output(model, inputs)
    model.add_adapter("beside", FloraConfig(r=5, alpha=3, init="random", placement="cross"))
    model.base_model.set_adapter(["default", "beside"])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "default",
        "beside",
    }
    model.eval().requires_grad_(False)
    expected = output(model, inputs)
    assert_differ(expected, alone)
    fused = flora_fx.fuse(flora_fx.capture(model, **inputs))
    assert_close(output(fused, inputs), expected, 1e-10)
    report = flora_fx.report(fused)
    assert set(report.fused) == ups_of(model)
    assert report.ops_after["gemm"] == gemms("shared")


@pytest.mark.parametrize(("kind", "layer"), [("attention", 6), ("mlp", 7)])
def test_one_kind_of_block_leaves_the_other_as_it_is(kind: str, layer: int) -> None:
    """Attention: 3 GEMMs, and gate, up, down; MLP: 3, and q, k, v, o."""
    model = attach(base_model("llama"), placement="shared", blocks=[kind]).eval().requires_grad_(False)
    report = flora_fx.report(flora_fx.fuse(flora_fx.capture(model, **tokens())))
    assert report.ops_after["gemm"] == 2 * layer + 1
