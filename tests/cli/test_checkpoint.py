"""Checkpoints load as they were saved, and everything that would load wrongly is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel

from flora_fx.checkpoint import CheckpointNotFoundError, load_model, load_tokenizer
from flora_fx.errors import AdapterError, FloraError

from .conftest import llama, save_lora

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def rewrite(adapter: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Put the adapter's tensors through `change` on the disk."""
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


# --- what loads -------------------------------------------------------------------------------------------


def test_base_equals_the_saved_model(model_dir: Path) -> None:
    loaded = load_model(str(model_dir))
    assert not loaded.training
    assert type(loaded).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, llama().eval()(TOKENS).logits, rtol=0, atol=0)


def test_adapter_is_there_frozen_and_unmerged(model_dir: Path, adapter_dir: Path) -> None:
    loaded = load_model(model_dir, adapter_dir)
    assert isinstance(loaded, PeftModel)
    assert not loaded.training
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "lora_" in name)
    oracle = PeftModel.from_pretrained(llama(), adapter_dir).eval()
    with torch.no_grad():
        logits = loaded(TOKENS).logits
        torch.testing.assert_close(logits, oracle(TOKENS).logits, rtol=0, atol=0)
        assert (logits - llama().eval()(TOKENS).logits).abs().max() > 1e-3


def test_dtype_reaches_base_and_adapter(model_dir: Path, adapter_dir: Path) -> None:
    loaded = load_model(model_dir, adapter_dir, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_without_dtype_the_checkpoint_decides(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in load_model(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_encoder_loads_without_a_head(encoder_dir: Path) -> None:
    assert isinstance(load_model(encoder_dir), BertModel)


def test_encoder_adapter(encoder_dir: Path, tmp_path: Path) -> None:
    adapter = save_lora(
        BertModel.from_pretrained(encoder_dir),
        tmp_path / "bert-lora",
        target_modules=["query", "key", "value", "dense"],
        task_type="FEATURE_EXTRACTION",
    )
    assert load_model(encoder_dir, adapter)(TOKENS).last_hidden_state.shape == (1, 5, 32)


def test_encoder_trained_without_pooler_gets_none(encoder_dir: Path, tmp_path: Path) -> None:
    BertForMaskedLM(BertModel.from_pretrained(encoder_dir).config).save_pretrained(tmp_path / "mlm")
    loaded = load_model(tmp_path / "mlm", task="encoder")
    assert loaded(TOKENS).pooler_output is None  # and not one computed from random weights


def test_task_overrides_the_config(model_dir: Path) -> None:
    assert type(load_model(model_dir, task="encoder")).__name__ == "LlamaModel"


def test_sharded_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert sum(1 for _ in load_model(tmp_path / "shards").parameters()) == sum(1 for _ in llama().parameters())


def test_hub_id_loads_what_the_hub_delivers(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def deliver(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(name)
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    assert not load_model("someone/some-model").training
    assert asked == ["someone/some-model"]


# --- what is refused: the model ---------------------------------------------------------------------------


def test_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("Cannot reach the Hub\n\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointNotFoundError, match=r"'someone/gone' is neither .*Cannot reach the Hub\)"):
        load_model("someone/gone")


@pytest.mark.parametrize("name", ["./gone", "/gone/away", Path("gone")])
def test_missing_directory(name: str | Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no directory") as caught:
        load_model(name)
    assert isinstance(caught.value, FloraError)
    assert isinstance(caught.value, FileNotFoundError)


def test_file_instead_of_directory(model_dir: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is a file; pass the directory"):
        load_model(model_dir / "model.safetensors")


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_adapter_passed_as_model(adapter_dir: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is an adapter, not a model"):
        load_model(adapter_dir)


def test_half_written_model(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no weights .*half written"):
        load_model(model_dir)


def test_missing_shard(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"1 are missing \({shard.name}\)"):
        load_model(tmp_path)


def test_truncated_model(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(model_dir)


def test_lfs_pointer(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(AdapterError, match="Git LFS pointer"):
        load_model(model_dir)


def test_pickles_only(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"pickles only \(pytorch_model\.bin\).*save_pretrained"):
        load_model(model_dir)


def test_config_that_is_not_json(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{half")
    with pytest.raises(AdapterError, match=r"config\.json is not JSON"):
        load_model(model_dir)


def test_config_that_is_not_an_object(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[]")
    with pytest.raises(AdapterError, match="holds a list where an object is expected"):
        load_model(model_dir)


def test_unknown_architecture(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(AdapterError, match="transformers cannot load this model"):
        load_model(model_dir)


def test_weights_missing_from_the_file(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"1 weights .* \(model\.layers\.1\.mlp\.up_proj\.weight\).*random"):
        load_model(model_dir)


def test_unknown_task(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="task is 'chat'"):
        load_model(model_dir, task="chat")  # type: ignore[arg-type]


# --- what is refused: the adapter -------------------------------------------------------------------------


def test_missing_adapter_directory(model_dir: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no directory"):
        load_model(model_dir, "./gone")


def test_adapter_without_config(model_dir: Path, adapter_dir: Path) -> None:
    (adapter_dir / "adapter_config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"has no adapter_config\.json"):
        load_model(model_dir, adapter_dir)


def test_model_passed_as_adapter(model_dir: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="this is a model; pass it as the model"):
        load_model(model_dir, model_dir)


def test_adapter_without_weights(model_dir: Path, adapter_dir: Path) -> None:
    (adapter_dir / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no adapter_model\.safetensors; it is half written"):
        load_model(model_dir, adapter_dir)


def test_adapter_pickle(model_dir: Path, adapter_dir: Path) -> None:
    (adapter_dir / "adapter_model.safetensors").rename(adapter_dir / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickles only \(adapter_model\.bin\).*PeftModel"):
        load_model(model_dir, adapter_dir)


def test_truncated_adapter(model_dir: Path, adapter_dir: Path) -> None:
    file = adapter_dir / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not a whole"):
        load_model(model_dir, adapter_dir)


def test_empty_adapter(model_dir: Path, adapter_dir: Path) -> None:
    rewrite(adapter_dir, lambda tensors: {})
    with pytest.raises(AdapterError, match="holds no tensors"):
        load_model(model_dir, adapter_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapter_that_diverged(model_dir: Path, adapter_dir: Path, value: float) -> None:
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key][3, 2] = value
        return tensors

    rewrite(adapter_dir, spoil)
    with pytest.raises(AdapterError, match=rf"{key} holds NaN or Inf"):
        load_model(model_dir, adapter_dir)


def test_not_a_lora(model_dir: Path, tmp_path: Path) -> None:
    get_peft_model(llama(), LoHaConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
    with pytest.raises(AdapterError, match="peft_type 'LOHA'; only 'LORA' and 'FLORA'"):
        load_model(model_dir, tmp_path / "loha")


def test_adapter_of_a_wider_model(model_dir: Path, tmp_path: Path) -> None:
    adapter = save_lora(llama(hidden_size=48), tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"lora_B\.weight is 48 × 4 and .* at rank 4 needs 32 × 4") as caught:
        load_model(model_dir, adapter)
    assert len(str(caught.value)) < 500  # one line, not peft's wall


def test_ranks_of_a_and_b_differ(model_dir: Path, adapter_dir: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    rewrite(adapter_dir, lambda tensors: tensors | {key: torch.ones(16, 5)})
    with pytest.raises(AdapterError, match=r"k_proj\.lora_B\.weight is 16 × 5 .* needs 16 × 4"):
        load_model(model_dir, adapter_dir)


def test_rank_differs_from_the_config(model_dir: Path, adapter_dir: Path) -> None:
    file = adapter_dir / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 6}))
    with pytest.raises(AdapterError, match="does not fit LlamaForCausalLM") as caught:
        load_model(model_dir, adapter_dir)
    assert len(str(caught.value)) < 500


def test_adapter_of_a_deeper_model(model_dir: Path, tmp_path: Path) -> None:
    adapter = save_lora(llama(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(AdapterError, match=r"14 tensors have no place in this model \(.*layers\.2\."):
        load_model(model_dir, adapter)


def test_adapter_of_a_shallower_model(model_dir: Path, tmp_path: Path) -> None:
    adapter = save_lora(llama(num_hidden_layers=1), tmp_path / "shallow")
    with pytest.raises(AdapterError, match=r"14 tensors that adapter_config\.json asks for are missing"):
        load_model(model_dir, adapter)


def test_adapter_of_another_architecture(encoder_dir: Path, adapter_dir: Path) -> None:
    with pytest.raises(AdapterError, match=r"does not fit Bert\w+: 28 tensors have no place in this model"):
        load_model(encoder_dir, adapter_dir)


# --- tokenizers -------------------------------------------------------------------------------------------


def test_no_tokenizer(model_dir: Path) -> None:
    assert load_tokenizer(model_dir) is None


def test_broken_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text("{half")
    with pytest.raises(AdapterError, match="the tokenizer cannot be read"):
        load_tokenizer(model_dir)
