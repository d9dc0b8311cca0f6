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
from flora_fx.checkpoint import load_tokenizer
from flora_fx.commands.exporting import STAGES
from flora_fx.commands.generating import pieces
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


def save_seq2seq(place: Path) -> Path:
    """A small T5 and its LoRA."""
    import peft
    import transformers

    from .test_sample_inputs import t5

    model = transformers.T5ForConditionalGeneration(t5())
    model.save_pretrained(place / "t5")
    lora = peft.LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(place / "lora")
    return place


def test_inspect_encoder_decoder(tmp_path: Path) -> None:
    place = save_seq2seq(tmp_path)
    result = invoke("inspect", "--model", place / "t5", "--adapter", place / "lora", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["fused"]) == 6  # q and v of three attentions
    assert told["declines"] == []


def test_inspect_with_inputs_from_a_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    place = save_seq2seq(tmp_path)
    options = ("inspect", "--model", place / "t5", "--adapter", place / "lora", "--json", "--inputs")
    tokens = torch.ones(2, 4, dtype=torch.int64)
    save_file({"input_ids": tokens, "decoder_input_ids": tokens.clone()}, tmp_path / "inputs.safetensors")
    result = invoke(*options, tmp_path / "inputs.safetensors")
    assert result.exit_code == 0, result.output
    save_file({"input_ids": tokens}, tmp_path / "few.safetensors")
    result = invoke(*options, tmp_path / "few.safetensors")
    assert result.exit_code == 1
    assert "could not trace PeftModelForSeq2SeqLM" in result.stderr
    assert result.stderr.endswith(f"they were read from --inputs {tmp_path / 'few.safetensors'}\n")
    assert "dynamic_shapes" not in result.stderr
    result = invoke(*options, place / "t5" / "config.json")
    assert result.exit_code == 1
    assert "config.json is no safetensors file" in result.stderr.splitlines()[-1]
    result = invoke(*options, tmp_path / "gone.safetensors")
    assert result.exit_code == 1
    assert "gone.safetensors" in result.stderr


def test_inspect_of_inputs_that_cannot_be_made_up(
    model_dir: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "main_input_name", "point_cloud")
    result = invoke("inspect", "--model", model_dir, "--adapter", adapter_dir)
    assert result.exit_code == 1
    assert "reads 'point_cloud', of which its config does not tell the sizes" in result.stderr
    assert "pass your own: --inputs FILE" in result.stderr


def test_inspect_vision_language_model(tmp_path: Path) -> None:
    from .test_heads import adapted, made, qwen3_vl

    name = "Qwen3VLForConditionalGeneration"
    made(name, qwen3_vl()).save_pretrained(tmp_path / "base")
    lora = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "v_proj"]}
    adapted(made(name, qwen3_vl()), **lora).save_pretrained(tmp_path / "lora")
    result = invoke("inspect", "--model", tmp_path / "base", "--adapter", tmp_path / "lora", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["declines"] == []


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_task_that_is_none(command: str, tmp_path: Path) -> None:
    result = invoke(command, "--model", tmp_path, "--adapter", tmp_path, "--output", tmp_path, "--task", "chess")
    assert result.exit_code == 2
    if command == "export":
        assert "'chess' is none of auto, causal-lm" in " ".join(result.stderr.replace("│", " ").split())


# --- export and generate ----------------------------------------------------------------------------------


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


# --- the tokenizer ----------------------------------------------------------------------------------------


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
    stream = Decoder.stream
    monkeypatch.setattr(Decoder, "stream", lambda self, ids, **options: passed.update(options) or stream(self, ids))
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
    stream = Decoder.stream
    monkeypatch.setattr(Decoder, "stream", lambda self, ids, **options: passed.update(options) or stream(self, ids))
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
    assert "--repetition-penalty is 0.0; it must be above 0" in result.stderr


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
    result = invoke("inspect", "--model", "./gone", "--adapter", adapter_dir)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: no directory './gone'; check the path\n"


def test_an_error_as_json(adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", "./gone", "--adapter", adapter_dir, "--json")
    assert result.exit_code == 1
    message = "no directory './gone'; check the path"
    told = {"type": "CheckpointNotFoundError", "message": message, "exit_code": 1}
    assert json.loads(result.stdout) == {"error": told}
    assert result.stderr == f"error: {message}\n"


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
    assert "".join(pieces(Bytes(), text.encode())) == text
    assert "�" not in pieces(Bytes(), text.encode())
    assert "".join(pieces(Bytes(), text.encode()[:-1])) == "naïve �"


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
