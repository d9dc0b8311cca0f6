"""docs/troubleshooting.md has every error class and every reason, and quotes messages that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flora_fx import Reason
from flora_fx.errors import FloraError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FOLDERS = ("flora_fx", "passes", "export")
BUILT_IN = {"ValueError", "RuntimeError", "ImportError", "FileNotFoundError"}


def trees() -> Iterator[ast.Module]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(path.read_text())


def error_classes() -> dict[str, set[str]]:
    """Every class that descends from FloraError, with what else it is."""
    classes = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {FloraError.__name__}
    while more := {name for name, bases in classes.items() if bases & found} - found:
        found |= more
    return {name: classes[name] & BUILT_IN for name in found}


def messages() -> str:
    """All texts of the code, one a line, with … for what is filled in."""
    found = []
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def quotes(page: str) -> list[str]:
    """What a page quotes of messages: italics at the beginning of a cell or of a line."""
    return re.findall(r"^(?:\| )?\*([^*\n]+)\*(?= \||:)", page, flags=re.MULTILINE)


def test_every_error_class_has_its_chapter() -> None:
    chapters = re.findall(r"^### `(\w+)`(?: \((\w+)\))?$", PAGE, flags=re.MULTILINE)
    assert {name: {built_in} - {""} for name, built_in in chapters} == error_classes()


def test_every_reason_has_its_row_with_the_words_of_the_report() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    assert [(name, said) for name, said, *_ in rows] == [(reason.name, reason.value) for reason in Reason]


def test_the_messages_it_quotes_are_the_codes() -> None:
    said = messages()
    found = quotes(PAGE)
    assert len(found) > 30
    assert [quote for quote in found if quote not in said] == []


def test_a_message_that_is_not_there_is_noticed() -> None:
    assert quotes("| *could not be written* | a |\n| *it never says this* | b |") == [
        "could not be written",
        "it never says this",
    ]
    assert "it never says this" not in messages()


def test_the_chapter_on_guards_runs_and_says_what_is_not_noticed() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(compile(block, "troubleshooting.md", "exec"), found)
    model, compiled, x, y = (found[name] for name in ("peft_model", "compiled", "x", "y"))
    torch.testing.assert_close(y, model(x))
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        with torch.no_grad():
            model.base_model.model.first.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
        with model.disable_adapter():
            assert (compiled(x) - model(x)).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), model(x))
