"""The command line: results on stdout, one line for errors, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import flora_fx
from flora_fx import cli
from flora_fx.demo.train import build_tokenizer


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter exported through the command line, once for the whole file; no tokenizer."""
    from .conftest import llama, save_lora

    root = tmp_path_factory.mktemp("export")
    llama().save_pretrained(root / "model")
    save_lora(llama(), root / "adapter")
    result = invoke("export", "--model", root / "model", "--adapter", root / "adapter", "--output", root / "onnx")
    assert result.exit_code == 0, result.output
    return root / "onnx"


# --- inspect ----------------------------------------------------------------------------------------------


def test_inspect_prints_the_report(model_dir: Path, adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", model_dir, "--adapter", adapter_dir)
    assert result.exit_code == 0, result.output
    assert "q_proj" in result.stdout or "qkv" in result.stdout


def test_inspect_json_is_the_report(model_dir: Path, adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", model_dir, "--adapter", adapter_dir, "--json")
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout), dict)


def test_inspect_encoder(encoder_dir: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    from .conftest import save_lora

    adapter = save_lora(
        BertModel.from_pretrained(encoder_dir),
        tmp_path / "bert-lora",
        target_modules=["query", "key", "value"],
        task_type="FEATURE_EXTRACTION",
    )
    result = invoke("inspect", "--model", encoder_dir, "--adapter", adapter, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["fused"]) == 6
    assert told["declines"] == []


# --- export and generate ----------------------------------------------------------------------------------


def test_export_json(model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    result = invoke("export", "--model", model_dir, "--adapter", adapter_dir, "--output", tmp_path / "onnx", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["greedy_tokens_equal"] in (True, False)  # random weights: near ties may fall either way
    assert told["max_abs_error"] < 1e-4
    assert (Path(told["directory"]) / "model.onnx").is_file()


def test_export_refuses_to_overwrite(model_dir: Path, exported: Path) -> None:
    result = invoke("export", "--model", model_dir, "--output", exported)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr or "overwrite" in result.stderr


def test_generate_token_ids(exported: Path) -> None:
    options = ("--directory", exported, "--token-ids", "3,1,4", "--max-new-tokens", "5")
    plain = invoke("generate", *options)
    assert plain.exit_code == 0, plain.output
    told = invoke("generate", *options, "--json")
    tokens = json.loads(told.stdout)["token_ids"]
    assert 1 <= len(tokens) <= 5
    assert [int(token) for token in plain.stdout.split()] == tokens  # greedy: both the same


def test_generate_sampling_follows_the_seed(exported: Path) -> None:
    def sample(seed: int) -> list[int]:
        options = ("--token-ids", "3,1,4", "--max-new-tokens", "12", "--temperature", "1.5", "--top-k", "50")
        result = invoke("generate", "--directory", exported, *options, "--top-p", "0.95", "--seed", str(seed), "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["token_ids"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generate_passes_every_option_on(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flora_fx.export import Decoder

    passed: dict[str, object] = {}
    monkeypatch.setattr(Decoder, "stream", lambda self, ids, **options: passed.update(options) or iter(()))
    options = (
        "--min-p",
        "0.1",
        "--repetition-penalty",
        "1.2",
        "--temperature",
        "0.5",
        "--top-k",
        "3",
        "--top-p",
        "0.9",
    )
    build_tokenizer(["one two three"], exported, vocabulary=96)
    try:
        more = ("--stop", "two", "--stop", "\n\n", "--max-new-tokens", "7", "--seed", "5")
        result = invoke("generate", "--directory", exported, "--prompt", "a", *options, *more)
    finally:
        for file in exported.glob("tokenizer*"):
            file.unlink()
    assert result.exit_code == 0, result.output
    assert passed.pop("tokenizer") is not None
    assert passed == {
        "max_new_tokens": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "stop_strings": ["two", "\n\n"],
        "seed": 5,
    }


def test_generate_leaves_the_rest_to_the_model(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flora_fx.export import Decoder

    passed: dict[str, object] = {}
    monkeypatch.setattr(Decoder, "stream", lambda self, ids, **options: passed.update(options) or iter(()))
    assert invoke("generate", "--directory", exported, "--token-ids", "3,1", "--json").exit_code == 0
    assert passed == {"max_new_tokens": 64, "seed": 0, "tokenizer": None}
    result = invoke("generate", "--directory", exported, "--token-ids", "3,1", "--temperature", "0", "--json")
    assert result.exit_code == 0
    assert (passed["do_sample"], passed["temperature"]) == (False, 0.0)


def test_export_says_once_what_it_leaves_out(model_dir: Path, tmp_path: Path) -> None:
    path = model_dir / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4}))
    result = invoke("export", "--model", model_dir, "--output", tmp_path / "onnx", "--json")
    assert result.exit_code == 0, result.output
    assert sum("num_beams=4" in note for note in json.loads(result.stdout)["notes"]) == 1
    assert "num_beams" not in result.stderr


def test_generate_stops_at_a_string(exported: Path) -> None:
    build_tokenizer(["one two three"], exported, vocabulary=96)
    try:
        options = ("generate", "--directory", exported, "--prompt", "a", "--max-new-tokens", "12", "--json")
        free = json.loads(invoke(*options).stdout)
        stopped = json.loads(invoke(*options, "--stop", free["text"][3]).stdout)
    finally:
        for file in exported.glob("tokenizer*"):
            file.unlink()
    count = len(stopped["token_ids"])
    assert count < len(free["token_ids"])
    assert stopped["token_ids"] == free["token_ids"][:count]
    assert free["text"][3] in stopped["text"]


def test_generate_stop_without_tokenizer(exported: Path) -> None:
    result = invoke("generate", "--directory", exported, "--token-ids", "3,1", "--stop", "x")
    assert result.exit_code == 1
    assert "has no tokenizer, which --stop needs" in result.stderr


def test_generate_repetition_penalty_of_0(exported: Path) -> None:
    result = invoke("generate", "--directory", exported, "--token-ids", "3,1", "--repetition-penalty", "0")
    assert result.exit_code == 1
    assert "repetition_penalty is 0.0; it must be above 0" in result.stderr


def test_generate_text(exported: Path) -> None:
    build_tokenizer(["one two three"], exported, vocabulary=96)
    try:
        options = ("generate", "--directory", exported, "--prompt", "a", "--max-new-tokens", "6")
        told = json.loads(invoke(*options, "--json").stdout)
        assert invoke(*options).stdout == told["text"] + "\n"
    finally:
        for file in exported.glob("tokenizer*"):
            file.unlink()


def test_generate_prompt_without_tokenizer(exported: Path) -> None:
    result = invoke("generate", "--directory", exported, "--prompt", "Hello")
    assert result.exit_code == 1
    assert "has no tokenizer; pass --token-ids" in result.stderr


@pytest.mark.parametrize("options", [(), ("--prompt", "a", "--token-ids", "1")])
def test_generate_needs_one_prompt(tmp_path: Path, options: tuple[str, ...]) -> None:
    result = invoke("generate", "--directory", tmp_path, *options)
    assert result.exit_code == 2
    assert "either --prompt or --token-ids" in result.stderr


def test_generate_token_ids_that_are_not_numbers(exported: Path) -> None:
    result = invoke("generate", "--directory", exported, "--token-ids", "3,x")
    assert result.exit_code == 1
    assert "'3,x'; pass whole numbers" in result.stderr


def test_generate_token_outside_of_the_vocabulary(exported: Path) -> None:
    result = invoke("generate", "--directory", exported, "--token-ids", "3,999999")
    assert result.exit_code == 1
    assert "999999" in result.stderr
    assert result.stderr.count("\n") == 1


def test_generate_from_a_missing_directory(tmp_path: Path) -> None:
    result = invoke("generate", "--directory", tmp_path / "gone", "--token-ids", "1")
    assert result.exit_code == 1
    assert "gone" in result.stderr


# --- errors -----------------------------------------------------------------------------------------------


def test_user_errors_are_one_line_on_stderr(adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", "./gone", "--adapter", adapter_dir, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: no directory './gone'; check the path\n"


def test_a_misfit_is_one_line(encoder_dir: Path, adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", encoder_dir, "--adapter", adapter_dir)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "is it the adapter of another model?" in result.stderr


def test_missing_extra_inside_a_command(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("inspect", "--model", model_dir, "--adapter", model_dir)
    assert result.exit_code == 2
    assert "pip install 'flora-fx[hf]'" in result.stderr


def test_missing_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'flora-fx[cli]'" in capsys.readouterr().err


def test_version() -> None:
    assert invoke("--version").stdout == f"flora-fx {flora_fx.__version__}\n"


def test_pieces_wait_for_whole_characters() -> None:
    class Bytes:
        """One token per byte."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve 花"
    assert "".join(cli._pieces(Bytes(), text.encode())) == text
    assert "�" not in cli._pieces(Bytes(), text.encode())
    assert "".join(cli._pieces(Bytes(), text.encode()[:-1])) == "naïve �"


# --- as a program -----------------------------------------------------------------------------------------


def test_python_dash_m(model_dir: Path, adapter_dir: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "flora_fx.cli",
        "inspect",
        "--model",
        model_dir,
        "--adapter",
        adapter_dir,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
