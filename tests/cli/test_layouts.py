"""Adapters in the layouts of other tools compute what was saved, to the last bit of a float64, or are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from flora_fx.checkpoint import load_model, read_adapter
from flora_fx.errors import AdapterError
from flora_fx.export.lora.reading import read_lora

from .conftest import llama

TOKENS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])}
FRONT = "base_model.model."
Tensors = dict[str, Tensor]


def clip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPTextConfig(vocab_size=96, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.CLIPTextModel(config)


def adapted(model: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    plain = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **(plain | settings))).eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A base, an adapter whose layers have different ranks, and the model of both."""
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), rank_pattern={"layers.1.self_attn.v_proj": 3})
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "base", tmp_path / "lora", model


def rewrite(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.double()(**TOKENS)[0]


def same(loaded: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-14, atol=1e-14)


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(key): value for key, value in tensors.items()}


RENAMED: dict[str, Callable[[str], str]] = {
    "torch.compile around PEFT": lambda key: f"_orig_mod.{key}",
    "torch.compile in PEFT": lambda key: key.replace(FRONT, f"{FRONT}_orig_mod."),
    "torch.compile of each layer": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "FSDP and checkpointing": lambda key: key.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
    "DistributedDataParallel": lambda key: f"module.{key}",
    "without PEFT's prefix": lambda key: key.removeprefix(FRONT),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "all at once": lambda key: f"_orig_mod.{key.removeprefix(FRONT)}".replace(".weight", ".mine.weight"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_other_names(saved: tuple[Path, Path, Any], case: str) -> None:
    base, adapter, model = saved
    wanted = read_lora(adapter)
    rewrite(adapter, renamed(RENAMED[case]))
    same(load_model(base, adapter), model)
    found = read_lora(adapter)  # what a hot swap reads
    assert found.layers.keys() == wanted.layers.keys()
    for name, layer in wanted.layers.items():
        assert found.layers[name].down.equal(layer.down)
        assert found.layers[name].up.equal(layer.up)
        assert found.layers[name].scale == layer.scale


def as_mlx(model: Any, place: Path, **parameters: Any) -> Path:
    """What mlx-lm writes: lora_a [in, rank], lora_b [rank, out]."""
    tensors = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            tensors[f"{name}.lora_a"] = module.lora_A["default"].weight.detach().t().contiguous()
            tensors[f"{name}.lora_b"] = module.lora_B["default"].weight.detach().t().contiguous()
    place.mkdir()
    save_file(tensors, place / "adapters.safetensors")
    settings = {"rank": 4, "dropout": 0.0, "scale": 2.75} | parameters
    config = {"fine_tune_type": "lora", "model": "some/llama", "num_layers": 2, "lora_parameters": settings}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def test_mlx(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), lora_alpha=11)  # 11 / 4 is 2.75
    place = as_mlx(model, tmp_path / "mlx")
    same(load_model(tmp_path / "base", place), model)
    model.save_pretrained(tmp_path / "lora")
    wanted, found = read_lora(tmp_path / "lora"), read_lora(place)
    assert found.layers.keys() == wanted.layers.keys()
    for name, layer in wanted.layers.items():
        assert found.layers[name].down.equal(layer.down)
        assert found.layers[name].scale == layer.scale == 2.75


def as_kohya(model: Any, part: str, prefix: str, alphas: bool) -> Tensors:
    tensors: Tensors = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            flat = f"{part}_{prefix}{name}".replace(".", "_")
            down, up = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            if alphas:
                tensors[f"{flat}.alpha"] = torch.tensor(module.scaling["default"] * len(down))
    return tensors


@pytest.mark.parametrize("alphas", [True, False])
def test_kohya_of_a_text_encoder(tmp_path: Path, alphas: bool) -> None:
    """Its ranks and alphas are each layer's own; without an alpha nothing is scaled."""
    clip().save_pretrained(tmp_path / "base")
    patterns = {
        "rank_pattern": {"layers.1.self_attn.v_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.v_proj": 7 if alphas else 3},
    }
    if not alphas:
        patterns["alpha_pattern"] = {"layers.1.self_attn.v_proj": 3}
    model = adapted(clip(), task_type=None, lora_alpha=7 if alphas else 4, **patterns)
    (tmp_path / "kohya").mkdir()
    save_file(as_kohya(model, "lora_te", "text_model.", alphas), tmp_path / "kohya" / "style.safetensors")
    loaded = load_model(tmp_path / "base", tmp_path / "kohya")
    same(loaded, model)
    assert logits(loaded).sub(logits(clip().eval())).abs().max() > 1e-3


# --- named as what they are -------------------------------------------------------------------------------

NAMED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "torchtune": (
        renamed(lambda key: key.removeprefix(FRONT).replace("lora_A", "lora_a").replace("lora_B", "lora_b")),
        r"is in torchtune's own layout \(model\.layers.*FullModelHFCheckpointer",
    ),
    "loralib": (
        renamed(lambda key: key.removeprefix(FRONT).removesuffix(".weight")),
        r"is in loralib's layout \(model\.layers.*does not say by what",
    ),
    "diffusers": (
        renamed(lambda key: key.replace(f"{FRONT}model", "unet.down_blocks")),
        r"is the LoRA of a diffusers pipeline \(unet\.down_blocks.*load_lora_weights",
    ),
    "kohya with a config": (
        renamed(lambda key: f"lora_te_{key.replace('.', '_')}.lora_down.weight"),
        r"is in kohya's layout .* and has an adapter_config\.json",
    ),
    "two adapters": (
        lambda tensors: {
            key.replace(".weight", f".{name}.weight"): value.clone()
            for key, value in tensors.items()
            for name in ("french", "german")
        },
        r"holds 2 adapters \(french, german\); save one: .*selected_adapters",
    ),
    "the same twice": (
        lambda tensors: tensors | {f"_orig_mod.{key}": value.clone() for key, value in tensors.items()},
        "holds 16 tensors under 8 names, once those of",
    ),
    "two for one name": (
        lambda tensors: (
            tensors
            | {
                f"{FRONT}lm_head.weight": torch.ones(96, 32),
                f"{FRONT}lm_head.modules_to_save.weight": torch.zeros(96, 32),
            }
        ),
        r"holds two tensors for base_model\.model\.lm_head\.weight, which differ",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_named(saved: tuple[Path, Path, Any], case: str) -> None:
    base, adapter, _ = saved
    change, message = NAMED[case]
    rewrite(adapter, change)
    for read in (lambda: load_model(base, adapter), lambda: read_lora(adapter)):
        with pytest.raises(AdapterError, match=message):
            read()


MLX: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"fine_tune_type": "dora"}, r"trained by MLX with fine_tune_type 'dora'; .*mlx_lm\.fuse"),
    "no scale": ({"lora_parameters": {"rank": 4}}, "is MLX's and names no scale in lora_parameters"),
    "two scales": (
        {"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 8}},
        "is MLX's and names alpha and scale",
    ),
}


@pytest.mark.parametrize("case", MLX)
def test_mlx_that_cannot_be_read_exactly(tmp_path: Path, case: str) -> None:
    changes, message = MLX[case]
    place = as_mlx(adapted(llama()), tmp_path / "mlx")
    file = place / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        read_adapter(place)


def test_mlx_of_another_model(tmp_path: Path) -> None:
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"4 tensors have no place in this model \(.*layers\.1\."):
        load_model(tmp_path / "base", as_mlx(adapted(llama()), tmp_path / "mlx"))


def test_mlx_of_experts(tmp_path: Path) -> None:
    place = as_mlx(adapted(llama()), tmp_path / "mlx")
    tensors = load_file(place / "adapters.safetensors")
    save_file(tensors | {"model.layers.0.mlp.switch.lora_a": torch.ones(2, 3, 4)}, place / "adapters.safetensors")
    with pytest.raises(AdapterError, match=r"switch\.lora_a \(2 × 3 × 4\) is no lora_a or lora_b of a linear layer"):
        read_adapter(place)


KOHYA: dict[str, tuple[Tensors, str]] = {
    "a pipeline": (
        {f"lora_{part}_a.lora_{way}.weight": torch.ones(2, 2) for part in ("te", "unet") for way in ("up", "down")},
        r"LoRA of a diffusion pipeline \(lora_te, lora_unet\)",
    ),
    "an unet": (
        {f"lora_unet_a.lora_{way}.weight": torch.ones(2, 2) for way in ("up", "down")},
        r"LoRA of a diffusion pipeline \(lora_unet\), .*pipeline\.load_lora_weights",
    ),
    "LoCon": (
        {"lora_te_a.lora_mid.weight": torch.ones(2, 2)},
        r"more than a LoRA of linear layers \(lora_te_a\.l",
    ),
    "diffusers": ({"unet.a.lora_A.weight": torch.ones(2, 2)}, "is the LoRA of a diffusers pipeline"),
    "something else": (
        {"weight": torch.ones(2, 2)},
        r"has no adapter_config\.json beside it, and weight is no name",
    ),
    "another encoder": (
        {"lora_te_a.lora_up.weight": torch.ones(2, 2)},
        r"lora_te_a\.lora_up\.weight is of no layer",
    ),
    "alpha 0": (
        {
            "lora_te_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 32),
            "lora_te_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(32, 2),
            "lora_te_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(0.0),
        },
        r"alpha of encoder\.layers\.0\.self_attn\.q_proj is 0\.0, which must be a number and not 0",
    ),
}


@pytest.mark.parametrize("case", KOHYA)
def test_kohya_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    tensors, message = KOHYA[case]
    clip().save_pretrained(tmp_path / "base")
    (tmp_path / "kohya").mkdir()
    save_file(tensors, tmp_path / "kohya" / "style.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_model(tmp_path / "base", tmp_path / "kohya")


def test_kohya_without_its_model(tmp_path: Path) -> None:
    model = adapted(clip(), task_type=None)
    save_file(as_kohya(model, "lora_te", "", alphas=True), tmp_path / "style.safetensors")
    with pytest.raises(AdapterError, match="is kohya's, whose names say which layer is meant only beside the model"):
        read_lora(tmp_path)
