"""Several adapters of one model: loaded by name, exported and chosen by the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from flora_fx.checkpoint import load_model
from flora_fx.commands.naming import named_adapters
from flora_fx.errors import AdapterError, FloraError

from .conftest import llama, save_lora
from .running import invoke

SIZES = {"hidden_size": 64}  # heads that GroupQueryAttention takes
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])
RANKS = {"sql": 4, "chat": 6, "third": 3}


@dataclass(frozen=True)
class Saved:
    """A model and three LoRAs, on disk."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    def adapter(self, name: str) -> Path:
        return self.root / "loras" / name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    found = Saved(tmp_path_factory.mktemp("named"))
    llama(**SIZES).save_pretrained(found.model)
    for number, (name, rank) in enumerate(RANKS.items()):
        save_lora(llama(**SIZES), found.adapter(name), r=rank, lora_alpha=60 + number)
        file = found.adapter(name) / "adapter_model.safetensors"
        save_file({key: value * (1 + number) for key, value in load_file(file).items()}, file)
    return found


def logits(saved: Saved, name: str) -> torch.Tensor:
    found: torch.Tensor = PeftModel.from_pretrained(llama(**SIZES), saved.adapter(name)).eval()(TOKENS).logits
    return found


@torch.no_grad()
def test_several_load_by_name(saved: Saved) -> None:
    model: Any = load_model(saved.model, {name: saved.adapter(name) for name in ("chat", "sql")})
    assert list(model.peft_config) == ["chat", "sql"]
    assert model.active_adapters == ["chat"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name in ("chat", "sql"):
        model.set_adapter(name)
        torch.testing.assert_close(model(TOKENS).logits, logits(saved, name), rtol=0, atol=0)
    assert not torch.allclose(logits(saved, "sql"), logits(saved, "chat"), atol=1e-3)


def test_what_does_not_load_beside_another(saved: Saved, tmp_path: Path) -> None:
    whole = save_lora(llama(**SIZES), tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(
        AdapterError, match=r"holds weights of the base \(lm_head.weight\), which all adapters .* alone"
    ):
        load_model(saved.model, {"sql": saved.adapter("sql"), "whole": whole})
    other = save_lora(llama(), tmp_path / "other")
    with pytest.raises(AdapterError, match="is it the adapter of another model"):
        load_model(saved.model, {"sql": saved.adapter("sql"), "other": other})
    broken = save_lora(llama(**SIZES), tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if "layers.1.mlp.up_proj.lora_B" not in key}
    save_file(kept, file)
    with pytest.raises(AdapterError, match=r"tensors that adapter_config.json asks for are missing"):
        load_model(saved.model, {"sql": saved.adapter("sql"), "broken": broken})
    with pytest.raises(ValueError, match=r"an adapter cannot be called 'v1.2'; give it a name without a dot"):
        load_model(saved.model, {"v1.2": saved.adapter("sql")})
    with pytest.raises(ValueError, match="names no adapter; pass None"):
        load_model(saved.model, {})


def test_the_command_line(saved: Saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = invoke(
        *("export", "-m", saved.model, "-o", out, "-a", f"sql={saved.adapter('sql')}", "-a", saved.adapter("chat")),
        *("--slots", 3, "--json"),
    )
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["target"] == "decoder"

    def generated(*options: str | Path) -> list[int]:
        result = invoke("generate", "-d", out, "--token-ids", "3,1,4,1,5", "-n", "6", "--json", *options)
        assert result.exit_code == 0, result.output
        tokens: list[int] = json.loads(result.stdout)["token_ids"]
        return tokens

    for name in RANKS:
        adapter = name if name != "third" else saved.adapter(name)
        model: Any = load_model(saved.model, saved.adapter(name))
        assert generated("--adapter", adapter) == continued(model), name
    assert generated() == continued(llama(**SIZES).eval())
    result = invoke("generate", "-d", out, "--token-ids", "3", "--adapter", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "no directory" in result.output


def continued(model: Any) -> list[int]:
    found = model.generate(
        input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), do_sample=False, max_new_tokens=6, pad_token_id=0
    )
    tokens: list[int] = found[0, TOKENS.shape[1] :].tolist()
    return tokens


def test_names_and_paths(saved: Saved, tmp_path: Path) -> None:
    assert named_adapters([], several=True) is None
    assert named_adapters(["sql=a/b=c"], several=False) == {"sql": "a/b=c"}
    assert named_adapters(["runs/lr=3"], several=False) == "runs/lr=3"
    assert named_adapters(["loras/sql"], several=True) == {"sql": "loras/sql"}
    odd = tmp_path / "lr=3"
    odd.mkdir()
    assert named_adapters([str(odd)], several=False) == str(odd)
    with pytest.raises(FloraError, match="two adapters are called 'sql'; pass --adapter NAME=b/sql"):
        named_adapters(["a/sql", "b/sql"], several=True)
    with pytest.raises(FloraError, match=r"cannot be called 'v1.2'; pass --adapter NAME=a/v1.2, a name without a dot"):
        named_adapters(["a/v1.2", "b/sql"], several=True)
