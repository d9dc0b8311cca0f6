"""Names of flora_fx in the inline code of README.md and docs/ exist, and what is called takes what it is given."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flora_fx
from flora_fx.export.directory.manifest import MANIFEST

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FACES = ("flora_fx", "flora_fx.adapters", "flora_fx.backend", "flora_fx.checkpoint", "flora_fx.export")
"""Modules whose public names stand in the pages by themselves, too: `FuseConfig(…)`."""
INPUTS = {"ids", "inputs", "input_ids", "x"}
"""What the pages call example inputs: they go to a parameter of that name, or to ``*args``."""


def inline(text: str) -> Iterator[str]:
    """Inline code: blocks are run elsewhere."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
        yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", paragraph))


def public(name: str) -> Any:
    """What a name stands for, dotted or one of the faces'; None if it is none of ours.

    Raises:
        AttributeError: it begins with flora_fx, and there is no such thing.
    """
    if name.partition(".")[0] != "flora_fx":
        modules = map(importlib.import_module, FACES)
        return next((getattr(module, name) for module in modules if name in module.__all__), None)
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(".".join(parts[:index]))
            except ModuleNotFoundError:
                raise AttributeError(f"{name}: {'.'.join(parts[: index - 1])} has no {part}") from None
        found = getattr(found, part)
    return found


def faults(code: str) -> list[str]:
    """What is wrong with a piece of inline code."""
    found = []
    for name in re.findall(r"(?<![\w./-])flora_fx(?:\.[A-Za-z_]\w*)+(?!\w*/)", code):
        if name != MANIFEST:
            try:
                public(name)
            except AttributeError as error:
                found.append(str(error))
    if found:
        return found
    try:
        calls = [node for node in ast.walk(ast.parse(code.replace("…", "..."))) if isinstance(node, ast.Call)]
    except SyntaxError:
        return []
    return [fault for call in calls if (fault := _of_call(call))]


def _of_call(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    target = public(name) if re.fullmatch(r"[\w.]+", name) else None
    if target is None:
        return None
    signature = inspect.signature(target)
    left_out = any(isinstance(argument, ast.Constant) and argument.value is ... for argument in call.args)
    given = [argument for argument in call.args if not (isinstance(argument, ast.Constant) and argument.value is ...)]
    bind = signature.bind_partial if left_out else signature.bind
    try:
        bound = bind(*given, **{str(keyword.arg): keyword.value for keyword in call.keywords})
    except TypeError as error:
        return f"{ast.unparse(call)}: {error}"
    for parameter, value in bound.arguments.items():
        if isinstance(value, ast.Name) and value.id in INPUTS - {parameter}:
            return f"{ast.unparse(call)}: {value.id} is taken as {parameter}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_calls_in_inline_code_are_right(page: Path) -> None:
    assert [fault for code in inline(page.read_text()) for fault in faults(code)] == []


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("flora_fx.fused(graph)", "flora_fx has no fused"),
        ("flora_fx.checkpoints.load_model", "flora_fx has no checkpoints"),
        ("flora_fx.verify(graph, inputs)", "inputs is taken as fused"),
        ("flora_fx.fuse(flora_fx.capture(model, …), FuseConfig())", "too many positional arguments"),
        ('FuseConfig(layot="beside")', "unexpected keyword argument 'layot'"),
        ('load("exported", cuda_graphs=True)', "unexpected keyword argument 'cuda_graphs'"),
        ("flora_fx.adapters.rank_for_budget(base, config)", "argument: 'parameters'"),
    ],
)
def test_what_is_wrong_is_told(code: str, told: str) -> None:
    (fault,) = faults(code)
    assert told in fault


@pytest.mark.parametrize(
    "code",
    [
        "flora_fx.json",
        "flora_fx/ir.py",
        "flora_fx.fuse(flora_fx.capture(model, …))",
        "flora_fx.verify(graph, fused, ids)",
    ],
)
def test_what_is_right_is_left_alone(code: str) -> None:
    assert faults(code) == []


def test_help_begins_with_what_to_use() -> None:
    first, _, rest = (inspect.getdoc(flora_fx) or "").partition("\n\n")
    assert "\n" not in first  # what help and search engines show of a module
    opening, _, _ = rest.partition(">>>")
    assert opening.startswith("What to use:")
    used = re.findall(r"^    (\S.*?)  +\S", opening, flags=re.MULTILINE)
    assert [fault for code in used for fault in faults(code)] == []
    assert {f"flora_fx.{name}" for name in ("capture", "fuse", "report", "verify")} < {
        code.partition("(")[0] for code in used
    }


def test_inline_code_may_go_on_in_the_next_line() -> None:
    text = "Call `flora_fx.fuse(\ngraph)`.\n\n```python\nnot_inline()\n```\n\nThen ``two`` and `one`."
    assert list(inline(text)) == ["flora_fx.fuse( graph)", "one"]
