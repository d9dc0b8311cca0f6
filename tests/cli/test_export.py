"""`flora-fx export`: what is written, of every kind of model, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_fx.commands.exporting import STAGES

from .running import invoke


def test_export_json(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    result = invoke("export", "--model", model_dir, "--adapter", adapter_dir, "--output", tmp_path / "onnx", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["greedy_tokens_equal"] in (True, False)  # random weights: near ties may fall either way
    assert told["max_abs_error"] < 1e-4
    assert (Path(told["directory"]) / "model.onnx").is_file()
    assert told["adapters"] == {"fused": 14, "declined": 0}
    assert told["declines"] == []
    assert told["operations"]["after"]["gemm"] < told["operations"]["before"]["gemm"]
    assert told["files"]["model.onnx.data"] == (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    assert list(told["seconds"]) == ["load", "capture", "fuse", "translate", "write", "check", "seal"]
    assert len(told["seconds"]) == STAGES  # a bar that ends before or after the work would lie
    assert {"flora-fx", "torch", "onnxscript"} <= set(told["versions"])
    stages = [line.split() for line in result.stderr.splitlines()]
    assert [(name, unit) for name, _, unit in stages] == [(name, "s") for name in told["seconds"]]
    assert [float(seconds) for _, seconds, _ in stages] == [round(value, 1) for value in told["seconds"].values()]


def test_export_refuses_to_overwrite(model_dir: Path, exported: Path) -> None:
    result = invoke("export", "--model", model_dir, "--output", exported)
    assert result.exit_code == 1
    assert result.stderr.endswith(
        f"{exported} exists; choose another place, or pass --overwrite to replace an export\n"
    )


@pytest.mark.parametrize("name", ["QuestionAnswering", "TokenClassification", "MaskedLM"])
def test_export_of_an_encoder_has_its_head(name: str, tmp_path: Path) -> None:
    import torch

    from flora_fx.export import load

    from .test_heads import IDS, adapted, bert, made

    base = made(f"BertFor{name}", bert(2))
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["query", "value"])
    model.save_pretrained(tmp_path / "lora")
    options = ("--model", tmp_path / "base", "--adapter", tmp_path / "lora", "--output", tmp_path / "onnx")
    result = invoke("export", *options)
    assert result.exit_code == 0, result.output
    found = load(tmp_path / "onnx")(input_ids=IDS)
    with torch.no_grad():
        wanted = model(input_ids=IDS)
    assert found.keys() == dict(wanted).keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5)


def test_export_of_a_classifier_whose_head_is_the_adapters(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForSequenceClassification

    from flora_fx.export import load

    from .test_heads import IDS, adapted, llama, made

    made("LlamaForCausalLM", llama()).save_pretrained(tmp_path / "base")
    head = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = adapted(head, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "lora")
    options = ("--model", tmp_path / "base", "--adapter", tmp_path / "lora", "--output", tmp_path / "onnx")
    result = invoke("export", *options)
    assert result.exit_code == 0, result.output
    found = load(tmp_path / "onnx")(input_ids=IDS)["logits"]
    assert found.shape == (2, 5)
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_export_of_ctc_with_inputs_from_a_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from flora_fx.export import load

    from .test_heads import SOUND, made, wav2vec2

    model = made("Wav2Vec2ForCTC", wav2vec2())
    model.save_pretrained(tmp_path / "base")
    save_file(SOUND, tmp_path / "inputs.safetensors")
    options = ("--model", tmp_path / "base", "--output", tmp_path / "onnx", "--inputs", tmp_path / "inputs.safetensors")
    result = invoke("export", *options)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        wanted = model(**SOUND).logits
    torch.testing.assert_close(load(tmp_path / "onnx")(**SOUND)["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_export_says_once_what_it_leaves_out(model_dir: Path, tmp_path: Path) -> None:
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4}))
    result = invoke("export", "--model", model_dir, "--output", tmp_path / "onnx", "--json")
    assert result.exit_code == 0, result.output
    assert sum("num_beams=4" in note for note in json.loads(result.stdout)["notes"]) == 1
    assert "num_beams" not in result.stderr
