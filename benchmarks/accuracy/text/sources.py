"""Python files of installed packages, parsed: the text that the tasks are made of."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from flora_fx.errors import MissingExtraError

__all__ = ["PACKAGES", "Source", "order", "sources", "versions"]

PACKAGES: Mapping[str, str] = {
    "torch": "torch",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "torchao": "torchao",
    "onnxscript": "onnxscript",
    "peft": "peft",
    "numpy": "numpy",
    "sympy": "sympy",
    "networkx": "networkx",
    "matplotlib": "matplotlib",
    "huggingface_hub": "huggingface_hub",
    "accelerate": "accelerate",
}
"""Modules, and the distributions that bring them."""

_FILES = 400
_LARGEST = 200_000


@dataclass(frozen=True)
class Source:
    """A file.

    Attributes:
        package: that it belongs to.
        module: its dotted name.
        tree: of its code.
    """

    package: str
    module: str
    tree: ast.Module


def order(*words: str) -> str:
    """A place in an order that does not change between machines and means nothing.

    >>> sorted(["a", "b", "c"], key=order)
    ['c', 'b', 'a']
    """
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def versions(packages: Mapping[str, str] = PACKAGES) -> dict[str, str]:
    """The version of each distribution: the text is that of these.

    Raises:
        MissingExtraError: one is not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        named = " ".join(packages[name] for name in missing)
        raise MissingExtraError(f"the text suite reads {', '.join(missing)}: pip install -c constraints.txt {named}")
    return {name: version(distribution) for name, distribution in packages.items()}


def sources(packages: Sequence[str] = tuple(PACKAGES), files: int = _FILES) -> Iterator[Source]:
    """Files of every package; nothing is imported.

    Args:
        packages: names of modules.
        files: of a package at most; which, `order` says.
    """
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        names = sorted((file.relative_to(root).as_posix() for file in root.rglob("*.py")), key=order)
        for name in [name for name in names if _wanted(root / name, name)][:files]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes in other people's strings
                tree = ast.parse((root / name).read_text(encoding="utf-8"))
            yield Source(package, ".".join((package, *Path(name).with_suffix("").parts)), tree)


def _wanted(file: Path, name: str) -> bool:
    parts = {part.strip("_") for part in name.removesuffix(".py").split("/")}
    return not parts & {"tests", "test", "testing", "vendor", "vendored"} and 500 < file.stat().st_size < _LARGEST
