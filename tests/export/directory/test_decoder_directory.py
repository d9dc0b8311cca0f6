"""What is in the directory of a decoder: a model directory of onnxruntime-genai, and which base and adapters it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime_genai
import pytest
import torch

from flora_fx.demo.train import build_tokenizer
from flora_fx.errors import ExportError
from flora_fx.export import Decoder, export_onnx, load
from flora_fx.export.directory.genai_config import write_genai_config
from flora_fx.export.directory.identity import Identity, identify
from flora_fx.export.trace.model import unwrap
from tests.export.exported_models import Export, build, plain
from tests.export.genai_models import Built

GREETING = "for name in dir(object): print(name)"


def test_the_files(exported: Export) -> None:
    directory = exported("Llama").directory
    names = {path.name for path in directory.iterdir()}
    assert names == {
        *("model.onnx", "model.onnx.data", "genai_config.json", "config.json", "generation_config.json"),
        "flora_fx.json",
    }
    manifest = json.loads((directory / "flora_fx.json").read_text())
    assert (manifest["kind"], manifest["target"], manifest["notes"]) == ("causal-lm", "decoder", [])
    assert (manifest["layers"], manifest["kv_heads"], manifest["head_dim"]) == (2, 2, 16)
    assert set(manifest["files"]) == names - {"flora_fx.json"}


# genai_config.json


def config_of(model: Any, place: Path, provider: str = "CPUExecutionProvider") -> Any:
    text = model.config
    traced: Any = SimpleNamespace(layers=text.num_hidden_layers, kv_heads=2, head_dim=16, switches=())
    write_genai_config(place, model, traced, provider)
    return json.loads((place / "genai_config.json").read_text())


def test_the_config_is_the_builders(built: Built, tmp_path: Path) -> None:
    theirs = json.loads((built.graph.parent / "genai_config.json").read_text())
    ours = config_of(built.model, tmp_path)
    assert ours["model"] == theirs["model"]
    left_out = {"diversity_penalty", "early_stopping", "length_penalty"}  # of beam search
    assert ours["search"] == {key: value for key, value in theirs["search"].items() if key not in left_out}


@pytest.mark.parametrize(
    ("ends", "pad", "expected"),
    [
        (5, 3, (5, 3)),
        ([5, 7], None, ([5, 7], 5)),
        ([7], None, (7, 7)),
        (None, 3, ([], 3)),
        (None, None, ([], 0)),
        ([151329, 8], 151329, (8, 8)),  # a size of the vocabulary that its config was not made for
    ],
)
def test_what_ends_a_sequence(tmp_path: Path, ends: Any, pad: int | None, expected: tuple[Any, int]) -> None:
    model: Any = plain("Llama")
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = ends, pad
    content = config_of(model, tmp_path)["model"]
    assert (content["eos_token_id"], content["pad_token_id"]) == expected


def test_types_and_providers(tmp_path: Path) -> None:
    cuda = config_of(plain("Qwen3"), tmp_path, "CUDAExecutionProvider")["model"]
    assert cuda["type"] == "qwen3"
    assert cuda["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    assert config_of(plain("StarCoder2"), tmp_path)["model"]["type"] == "decoder", "not known by name"


def test_two_runtimes_go_by_one_generation_config(tmp_path: Path) -> None:
    model = build("Llama").eval()
    core: Any = unwrap(model)
    ids = torch.tensor([[11, 23, 5, 40, 7]])
    core.generation_config.update(repetition_penalty=1.1, no_repeat_ngram_size=2, max_new_tokens=30)
    free = core.generate(ids, attention_mask=torch.ones_like(ids))[0]
    # A token that would end it at once, but for the length that is asked for.
    core.generation_config.update(eos_token_id=int(free[8]), min_length=15)
    expected = core.generate(ids, attention_mask=torch.ones_like(ids))
    assert 15 < expected.shape[1] < 35, "it ends, and late"
    core.generation_config.update(num_beams=3, typical_p=0.9, early_stopping=True)

    with pytest.warns(UserWarning, match="asks for num_beams=3, typical_p=0.9, which exports do not have") as caught:
        result = export_onnx(model, tmp_path / "out")
    assert [note.split(":")[0] for note in result.notes] == [
        "generation_config asks for num_beams=3, typical_p=0.9, which exports do not have",
        "generation_config asks for max_new_tokens",
    ]
    assert [str(warning.message) for warning in caught if warning.filename == __file__] == list(result.notes)
    assert result.greedy_tokens_equal, "the check is of plain greedy tokens"
    runner = load(tmp_path / "out")
    assert isinstance(runner, Decoder)
    assert tuple(runner.manifest.notes) == result.notes
    assert runner.manifest.generation == {
        **{"max_new_tokens": 30, "min_length": 15, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "top_k": 50}
    }
    assert torch.equal(runner.generate(ids), expected)
    search = json.loads((tmp_path / "out" / "genai_config.json").read_text())["search"]
    assert (search["repetition_penalty"], search["no_repeat_ngram_size"], search["min_length"]) == (1.1, 2, 15)
    generator = onnxruntime_genai.Generator(genai := onnxruntime_genai.Model(str(tmp_path / "out")), parameters(genai))
    generator.append_tokens(ids[0].numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected[0, :-1].tolist(), "genai leaves the end token out"


def parameters(genai: onnxruntime_genai.Model) -> onnxruntime_genai.GeneratorParams:
    return onnxruntime_genai.GeneratorParams(genai)


# Base and adapters


def test_the_identity_is_in_the_manifest(exported: Export) -> None:
    export = exported("Llama")
    (adapter,) = export.decoder.manifest.identity.adapters
    assert (adapter.name, adapter.method, adapter.rank) == ("default", "LORA", 5)
    assert export.decoder.manifest.identity == identify(export.model, unwrap(export.model))
    assert len(adapter.sha256) == 64


def test_another_adapter_has_another_identity() -> None:
    model: Any = build("tiny")
    core: Any = unwrap(model)
    core.config._name_or_path, core.config._commit_hash = "someone/tiny", "abc123"

    def found() -> Identity:
        return identify(model, core)

    first = found()
    assert (first.base, first.commit) == ("someone/tiny", "abc123")
    assert found() == first == Identity.from_dict(json.loads(json.dumps(first, default=vars)))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] += 1e-3
    changed = found()
    assert changed.adapters[0].sha256 != first.adapters[0].sha256
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "base_layer" in name)[0, 0] += 1
    assert found() == changed, "of the adapter alone"
    model.add_adapter("other", model.peft_config["default"])
    assert found() == changed, "of those that are active"
    model.set_adapter("other")
    assert [adapter.name for adapter in found().adapters] == ["other"]
    assert identify(core, core).adapters == ()


# Half precision, and a tokenizer


def test_float16_with_a_tokenizer(tmp_path: Path) -> None:
    model = build("Llama")
    words = " ".join(dir(object)) + GREETING
    tokenizer: Any = build_tokenizer([words], tmp_path, vocabulary=97)
    result = export_onnx(model, tmp_path / "out", dtype=torch.float16, tokenizer=tokenizer)
    assert result.target == "decoder"
    assert result.max_rel_error < 1e-2
    size = sum(p.numel() for p in model.parameters()) * 2
    assert result.files["model.onnx.data"] < size * 1.3 + 4096
    runner = load(tmp_path / "out")
    assert isinstance(runner, Decoder)
    ids = torch.tensor([[1, 2, 3]])
    assert runner(ids).dtype == torch.float16
    tokens = runner.generate(ids, max_new_tokens=8, eos_token_id=[])
    genai = onnxruntime_genai.Model(str(tmp_path / "out"))
    assert onnxruntime_genai.Tokenizer(genai).encode(GREETING).tolist() == tokenizer(GREETING)["input_ids"]
    options = onnxruntime_genai.GeneratorParams(genai)
    options.set_search_options(do_sample=False, max_length=11)
    generator = onnxruntime_genai.Generator(genai, options)
    generator.append_tokens(ids[0].numpy().astype("int32"))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == tokens[0].tolist()


@pytest.mark.slow
def test_bfloat16_is_checked_in_float32(tmp_path: Path) -> None:
    result = export_onnx(build("Llama"), tmp_path / "out", dtype=torch.bfloat16)
    assert result.target == "decoder"
    if "CUDA" not in result.checked_on:
        assert result.checked_on == "CPUExecutionProvider, in float32"
        with pytest.raises(ExportError, match="bfloat16, which ONNX Runtime does not compute on a CPU"):
            load(tmp_path / "out")
