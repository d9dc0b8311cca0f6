"""Which tokenizer an export gets: the adapter's, the model's, or the one that is named."""

from __future__ import annotations

from pathlib import Path

import pytest

import flora_fx
from flora_fx.checkpoint import load_tokenizer
from flora_fx.demo.train import build_tokenizer

from .running import invoke


@pytest.fixture
def not_exported(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The tokenizers that an export was asked to write; none is written."""
    from flora_fx import export

    asked: list[object] = []

    def noted(*_: object, tokenizer: object, **__: object) -> object:
        asked.append(tokenizer)
        raise flora_fx.errors.ExportError("not today")

    monkeypatch.setattr(export, "export_onnx", noted)
    return asked


def test_the_adapters_tokenizer_comes_first(tmp_path: Path, not_exported: list[object]) -> None:
    from .conftest import llama, save_lora

    model_dir, adapter_dir = tmp_path / "model", tmp_path / "adapter"
    llama(vocab_size=300).save_pretrained(model_dir)
    save_lora(llama(vocab_size=300), adapter_dir)
    build_tokenizer(["one two three"], model_dir, vocabulary=300)
    command = ("export", "--model", model_dir, "--adapter", adapter_dir, "--output", tmp_path / "onnx")
    invoke(*command)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = load_tokenizer(model_dir)
    assert other is not None
    other.chat_template = template
    other.save_pretrained(adapter_dir)
    invoke(*command)
    invoke(*command, "--tokenizer", model_dir)
    assert [getattr(tokenizer, "chat_template", "") for tokenizer in not_exported] == [None, template, None]


def test_a_tokenizer_that_is_not_there(model_dir: Path, tmp_path: Path, not_exported: list[object]) -> None:
    command = ("export", "--model", model_dir, "--output", tmp_path / "onnx", "--tokenizer", model_dir)
    result = invoke(*command)
    assert result.exit_code == 1
    assert "has no tokenizer; pass the directory where tokenizer.json is" in result.stderr
    assert not_exported == []


def test_new_tokens_that_are_not_in_the_adapter(
    model_dir: Path, adapter_dir: Path, tmp_path: Path, not_exported: list[object]
) -> None:
    build_tokenizer(["one two three"], adapter_dir, vocabulary=96)
    other = load_tokenizer(adapter_dir)
    assert other is not None
    other.add_tokens([f"<|{number}|>" for number in range(97)])
    other.save_pretrained(adapter_dir)
    result = invoke("export", "--model", model_dir, "--adapter", adapter_dir, "--output", tmp_path / "onnx")
    assert result.exit_code == 1
    assert f"has {len(other)} tokens and the model's embedding 96 rows" in result.stderr
    assert not_exported == []
