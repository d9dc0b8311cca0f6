"""Messages of the Python API reach the user of a command in the command's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flora_fx.cli import _flags, build_app
from flora_fx.commands.wording import in_flags

from ..house.rooms import ROOT

FLAGS = _flags(build_app())

PYTHONS_OWN = {
    "save_embedding_layers=True": "of PEFT's save_pretrained: adapters are trained and saved from Python",
    "save_pretrained(directory, selected_adapters=[name])": "likewise",
    "init_lora_weights=": "of PEFT's LoraConfig",
    "cuda_graph=": "of load: `generate` captures one where there can be one, and never insists",
    "=True needs return_dict_in_generate=True": "of Decoder.generate: the command streams",
    "pass slot=": "of Decoder.load_adapter: the command finds a slot by itself",
    "another name=": "likewise",
    "pass custom_ops=False": "of export_onnx: the command takes operators only where they have room",
    "pass tokenizer=": "of Decoder.stream, to which the command gives the directory's",
}
"""What stays Python in a message, and why it may."""

LIKE_PYTHON = re.compile(r"\b[a-z][a-z_]*=(?=[A-Z{'\[]|torch| |$)")


def messages(path: Path) -> Iterator[str]:
    """The texts of a file that are no docstrings; what is computed in them is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in docs | inner:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "'X'" for part in node.values)


def test_no_message_that_a_command_may_print_speaks_python() -> None:
    folders = ("flora_fx/checkpoint", "export", "flora_fx/graph", "flora_fx/storage", "flora_fx/commands")
    files = [
        ROOT / "flora_fx/fusing.py",
        *(file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))),
    ]
    python = {text for file in files for text in messages(file) if " " in text and LIKE_PYTHON.search(text)}
    assert len(python) > 10  # the net catches something
    left = {text: in_flags(text, FLAGS) for text in python}
    wrong = {said for said in left.values() if LIKE_PYTHON.search(said) and not any(own in said for own in PYTHONS_OWN)}
    assert not wrong
    unused = {own for own in PYTHONS_OWN if not any(own in text for text in python)}
    assert not unused


@pytest.mark.parametrize(
    ("python", "command"),
    [
        (
            "the LoRA cannot be replaced; export the model again with hot_swap=True",
            "export the model again with --hot-swap",
        ),
        ("check the path, or write one with export_onnx", "or write one with `flora-fx export`"),
        ("pass dtype= one of float32, float16", "pass --dtype one of float32, float16"),
        ("again with dtype=torch.float32", "again with --dtype float32"),
        ("pass task='ctc' (--task ctc)", "pass --task ctc"),
        ("pass task='masked-lm' or 'ctc' (--task masked-lm or ctc), whichever", "--task masked-lm or ctc, whichever"),
        ("pass example_inputs={'x': tensor}, as", "pass --inputs FILE, a safetensors file of {'x': tensor}, as"),
        ("stop_strings holds an empty string", "--stop holds an empty string"),
        ("input_ids holds 999; the tokens of", "the prompt holds 999; the tokens of"),
        ("temperature is -1.0; it must be 0", "temperature is -1.0; it must be 0"),
        ("is decoded without a CUDA graph, which cuda_graph=False asks for: odd", "without a CUDA graph: odd"),
        ("save_embedding_layers=True", "save_embedding_layers=True"),
    ],
)
def test_in_the_words_of_the_command_line(python: str, command: str) -> None:
    said = in_flags(python, FLAGS)
    assert said.endswith(command)
    if python != said:
        assert not LIKE_PYTHON.search(said)
