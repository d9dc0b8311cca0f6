"""`export_onnx`: what it refuses, what it leaves alone, what it leaves behind."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import flora_fx.errors
from flora_fx.errors import AdapterError, ExportError, MissingExtraError
from flora_fx.export import Decoder, ExportResult, export_onnx, exporting, load
from tests.export.exported_models import Exported, build


def fails(*args: Any, **kwargs: Any) -> Any:
    raise OSError("the disk is full")


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["Llama", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_model_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    model = build(name)
    model.base_model.model.model.layers[0].eval()  # type: ignore[union-attr, index]  # a mode of its own
    core: Any = model.base_model.model  # type: ignore[union-attr]

    def state() -> Any:
        return (
            {name: (p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()},
            {name: (b.data_ptr(), b.dtype) for name, b in model.named_buffers()},
            {name: m.training for name, m in model.named_modules()},
            {name: sorted(vars(m)) for name, m in model.named_modules()},
            copy.deepcopy(core.config.to_dict()),
            core.config._attn_implementation,
        )

    before = state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    stages: list[str] = []
    result = export_onnx(model, tmp_path / "missing" / "parents" / "out", progress=stages.append)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert stages == ["capture", "fuse", "translate", "write", "check", "seal"] == list(result.seconds)
    assert result.max_rel_error < 1e-5
    assert result.greedy_tokens_equal is True
    assert result.target == ("decoder" if name == "Llama" else "general")


def test_the_result_shows_itself(llama: Exported) -> None:
    result = llama.result
    assert repr(result) == (
        f"ExportResult({str(result.directory)!r}, target 'general', {result.report.summary}, "
        f"max_abs_error {result.max_abs_error:.1e})"
    )
    page = result._repr_html_()
    assert f"<pre>exported to {result.directory}: 14 adapters fused" in page
    assert result._repr_svg_() == result.report._repr_svg_()
    assert result._repr_svg_() in page


def test_the_directory_and_its_manifest(llama: Exported) -> None:
    names = set(contents(llama.directory))
    assert names == {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "flora_fx.json"}
    manifest = json.loads((llama.directory / "flora_fx.json").read_text())
    assert (manifest["kind"], manifest["dtype"], manifest["architecture"]) == (
        "causal-lm",
        "float32",
        "LlamaForCausalLM",
    )
    assert (manifest["layers"], manifest["kv_heads"], manifest["head_dim"]) == (2, 2, 12)
    assert set(manifest["files"]) == names - {"flora_fx.json"}
    assert len(manifest["fusion"]["fused"]) == 14
    assert manifest["check"]["greedy_tokens_equal"] is True
    assert {"torch", "transformers", "onnxscript", "flora-fx"} <= set(manifest["versions"])
    assert manifest["eos_token_ids"] == [2]
    config = transformers.AutoConfig.from_pretrained(llama.directory)
    assert config.architectures == ["LlamaForCausalLM"]
    assert not [path.name for path in llama.directory.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("stage", ["trace", "check"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_or_the_old(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, existing: bool
) -> None:
    target = tmp_path / "a" / "out"
    if existing:
        target.parent.mkdir()
        shutil.copytree(llama.directory, target)
    before = contents(tmp_path)
    monkeypatch.setattr(exporting, stage, fails)
    with pytest.raises(OSError, match="the disk is full"):
        export_onnx(build("tiny"), target, overwrite=existing)
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([target.parent] if existing else [])


def test_a_check_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(core: nn.Module, dtype: Any = None) -> nn.Module:
        twin = private_copy(core, dtype)
        with torch.no_grad():
            parameter = next(iter(twin.parameters()))
            parameter.data = parameter.data * 1.01
        return twin

    private_copy = exporting.private_copy
    trace = exporting.trace
    model = build("tiny")
    monkeypatch.setattr(exporting, "trace", lambda twin, *rest, **more: trace(exporting.unwrap(model), *rest, **more))
    monkeypatch.setattr(exporting, "private_copy", other)
    with pytest.raises(ExportError, match=r"does not agree with PyTorch: the logits of a prompt differs by"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwriting(llama: Exported, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "trace", fails)  # it must be refused before the work
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(llama.directory)
    message = "is not an export of flora_fx" if overwrite else "pass overwrite=True"
    with pytest.raises(ExportError, match=message):
        export_onnx(llama.model, tmp_path / "mine", overwrite=overwrite)
    for name in ("file", "link"):
        with pytest.raises(ExportError, match="not a directory"):
            export_onnx(llama.model, tmp_path / name, overwrite=overwrite)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"all of it"}


def test_an_export_replaces_an_export(tmp_path: Path, llama: Exported) -> None:
    target = tmp_path / "out"
    shutil.copytree(llama.directory, target)
    with pytest.raises(ExportError, match="exists"):
        export_onnx(build("tiny"), target)
    result = export_onnx(build("tiny"), target, overwrite=True)
    assert isinstance(result, ExportResult)
    runner = load(target)
    assert isinstance(runner, Decoder)
    assert runner.manifest.architecture == "GPT2LMHeadModel"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_active_adapters_are_exported(tmp_path: Path) -> None:
    model: Any = build("tiny")
    other = peft.LoraConfig(r=2, lora_alpha=9, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model.add_adapter("other", other)
    model.set_adapter("other")
    result = export_onnx(model, tmp_path / "out")
    assert len(result.report.fused) == 1
    assert all(".other." in name for name in result.report.fused)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_export(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build("llama")
    result = export_onnx(model, tmp_path / "out", dtype=dtype, target="general")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    size = sum(p.numel() for p in model.parameters()) * 2
    assert result.files["model.onnx.data"] < size * 1.1 + 4096
    if dtype == torch.bfloat16 and "CUDA" not in result.checked_on:
        assert "in float32" in result.checked_on
        with pytest.raises(ExportError, match="bfloat16, which ONNX Runtime does not compute on a CPU"):
            load(tmp_path / "out")
        return
    runner = load(tmp_path / "out")
    assert isinstance(runner, Decoder)
    assert runner(torch.tensor([[1, 2, 3]])).dtype == dtype
    assert runner.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, eos_token_id=[]).shape == (1, 6)


@pytest.mark.slow
def test_adapters_in_another_dtype_than_their_base(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=1, n_head=3)
    base = transformers.GPT2LMHeadModel(config).half()
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(base, lora)
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}, "PEFT's default"
    as_is = export_onnx(model, tmp_path / "as-is")
    assert not as_is.report.fused
    assert "declined ×4: the adapter has another dtype" in str(as_is)
    assert len(export_onnx(model, tmp_path / "cast", dtype=torch.float16).report.fused) == 4


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def refused() -> list[tuple[Any, type[Exception], str]]:
    t5 = transformers.T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    mamba = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    gpt2 = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return [
        (transformers.T5Model(t5), ExportError, "encoder-decoder that generates no text; .* causal language model"),
        (transformers.MambaForCausalLM(mamba), ExportError, "recurrent state"),
        (peft.get_peft_model(transformers.GPT2LMHeadModel(gpt2), prefix), ExportError, "virtual tokens"),
        (Odd(), ExportError, "Odd is not a transformers model; .* encoder"),
        ("meta-llama/Llama-3.2-1B", TypeError, "model is a str"),
    ]


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    for model, error, message in refused():
        with pytest.raises(error, match=message):
            export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_refusals(llama: Exported, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"one of torch\.float32"):
        export_onnx(llama.model, tmp_path / "out", dtype=torch.float64)
    with pytest.raises(ExportError, match="none of the providers NoSuchProvider"):
        export_onnx(llama.model, tmp_path / "out", providers=["NoSuchProvider"])
    for name in ("llama", "Llama"):
        with pytest.raises(ExportError, match="takes input_ids only"):
            export_onnx(build(name), tmp_path / "out", example_inputs={"pixel_values": torch.zeros(1)})
    model = build("tiny")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="NaN"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(flora_fx.errors.importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"flora-fx\[onnx\]"):
        export_onnx(llama.model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
