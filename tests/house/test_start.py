"""What is imported when: a program that waits for nothing but what it uses starts soon."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flora_fx

EXTRAS = {"transformers", "peft", "safetensors", "onnx", "onnxscript", "onnxruntime", "onnxruntime_genai"} | {
    *("typer", "rich", "matplotlib", "tokenizers", "huggingface_hub", "accelerate", "diffusers", "torchao", "triton"),
}
"""What only an extra installs, and what that brings along."""


def imported(program: str) -> set[str]:
    """The packages, and torch's own, that a program of its own process has imported when it ends.

    Args:
        program: Python.
    """
    end = "import atexit, sys; atexit.register(lambda: print('imported', *sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", end + program], capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert last.startswith("imported "), done.stderr
    modules = last.split()[1:]
    return {name.split(".")[0] for name in modules} | {name for name in modules if name.startswith("torch.")}


def test_flora_fx_waits_for_torch_alone() -> None:
    torch = imported("import torch")
    found = imported("import flora_fx\nassert [getattr(flora_fx, name) for name in flora_fx.__all__]")
    assert "torch" in found
    assert not found & (EXTRAS | {"sympy"}) - torch
    assert not [name for name in found if name.startswith(("torch._dynamo", "torch._inductor"))]


@pytest.mark.parametrize("option", ["--version", "--help", "export --help"])
def test_the_command_line_says_what_it_can_without_torch(option: str) -> None:
    pytest.importorskip("typer")
    found = imported(f"import sys\nsys.argv = ['flora-fx', *{option!r}.split()]\nfrom flora_fx.cli import main\nmain()")
    assert "typer" in found
    assert not found & {"torch", "numpy", "transformers", "peft", "onnx", "onnxruntime"}


def test_every_public_name_is_where_the_package_says() -> None:
    tree = ast.parse(Path(flora_fx.__file__).read_text(encoding="utf-8"))
    [typed] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        name.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for name in node.names
    }  # what type checkers read
    assert told == flora_fx._HOMES
    assert set(told) == set(flora_fx.__all__)
    assert set(flora_fx.__all__) <= set(dir(flora_fx))
    with pytest.raises(AttributeError, match="module 'flora_fx' has no attribute 'fuze'"):
        _ = flora_fx.fuze
