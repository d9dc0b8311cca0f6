"""What code says in words: summaries, messages of errors, parameters and their types, signatures."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from .sources import Source

__all__ = [
    "Described",
    "Message",
    "Parameter",
    "Signature",
    "described",
    "messages",
    "parameters",
    "signatures",
    "words_of",
]

Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Described(NamedTuple):
    """The first sentence of a docstring.

    Attributes:
        kind: of what it describes: ``class``, ``function``, ``method`` or ``property``.
        name: of it.
        summary: the sentence.
    """

    kind: str
    name: str
    summary: str


class Message(NamedTuple):
    """What a ``raise`` says; a value that is put into the text is an ellipsis."""

    error: str
    text: str


class Parameter(NamedTuple):
    """A line of a docstring's list of arguments, in Google's or numpy's style."""

    name: str
    kind: str
    text: str


class Signature(NamedTuple):
    """A function's name and parameters, without annotations, and what it is annotated to return."""

    text: str
    returns: str


def described(source: Source) -> Iterator[Described]:
    """Every docstring's first sentence, in the order of the file."""
    for owner, node in _definitions(source.tree):
        if summary := _sentence(ast.get_docstring(node) or ""):
            yield Described(_kind(owner, node), node.name, summary)


def messages(source: Source) -> Iterator[Message]:
    """Every ``raise Error("…")``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call) and call.args:
            error = call.func.id if isinstance(call.func, ast.Name) else ""
            if error and (text := _literal(call.args[0])):
                yield Message(error, text)


def parameters(source: Source) -> Iterator[Parameter]:
    """Every described parameter of every docstring."""
    for _, node in _definitions(source.tree):
        text = ast.get_docstring(node) or ""
        for style in (_GOOGLE, _NUMPY):
            for name, kind, words in style.findall(text):
                yield Parameter(name, kind.strip(" `"), _flat(words))


def signatures(source: Source) -> Iterator[Signature]:
    """Every function that is annotated with what it returns."""
    for _, node in _definitions(source.tree):
        if isinstance(node, _FUNCTIONS) and node.returns is not None:
            arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            names = [argument for argument in arguments if argument not in ("self", "cls")]
            returns = ast.unparse(node.returns).strip("'\"")
            yield Signature(f"{words_of(node.name)} ({', '.join(map(words_of, names))})", returns)


def words_of(name: str) -> str:
    """A name as words.

    >>> words_of("_getFirstItem_of")
    'get first item of'
    """
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").lower().split())


_GOOGLE = re.compile(
    r"^ +(\w+) \(`?(?:~?[\w.]+\.)?([\w.]+)`?(?:, [^)\n]*)?\):?[ \n]+(?:\s{4,})?([A-Z][^\n]{10,})", re.MULTILINE
)
_NUMPY = re.compile(r"^ *(\w+) : ([\w.]+)[^\n]*\n +([A-Z][^\n]{10,})", re.MULTILINE)


def _definitions(tree: ast.AST, owner: ast.AST | None = None) -> Iterator[tuple[ast.AST | None, Defined]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Defined):
            yield owner, node
            yield from _definitions(node, node)
        else:
            yield from _definitions(node, owner)


def _kind(owner: ast.AST | None, node: Defined) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if not isinstance(owner, ast.ClassDef):
        return "function"
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    return "property" if decorators & {"property", "cached_property", "functools.cached_property"} else "method"


def _sentence(docstring: str) -> str:
    """
    >>> _sentence("Add `x` to\\n    y. Not z.\\n\\nArgs: none")
    'Add x to y'
    """
    first = _flat(docstring.strip().split("\n\n")[0]).split(". ")[0].rstrip(".:")
    return first if 3 <= len(first.split()) <= 40 and first.isascii() else ""


def _literal(node: ast.expr) -> str:
    """The words of a string, as far as they are written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.Add):
        text = _literal(node.left)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        text = _literal(node.func.value)
    else:
        text = ""
    text = _flat(re.sub(r"%[sdr]|\{[^}]*\}", "…", text))
    return text if len(text.split()) >= 3 else ""


def _flat(text: str) -> str:
    return " ".join(re.sub(r":\w+:`|`|\*\*?", "", text).split())
