"""`flora-fx generate`: prompts, options, text as it comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_fx.commands.generating import pieces
from flora_fx.demo.train import build_tokenizer

from .running import invoke


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


def test_pieces_wait_for_whole_characters() -> None:
    class Bytes:
        """One token per byte."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve 花"
    assert "".join(pieces(Bytes(), text.encode())) == text
    assert "�" not in pieces(Bytes(), text.encode())
    assert "".join(pieces(Bytes(), text.encode()[:-1])) == "naïve �"
