"""The environments that are supported, and measured: a Python, a rule for the releases, a part of the suite."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

__all__ = ["ENVIRONMENTS", "NAME", "ROOT", "Environment", "minima", "requirements"]

ROOT = Path(__file__).resolve().parents[2]
NAME = "flora-fx"

_CORE = tuple(
    f"tests/{name}.py"
    for name in ("test_ops", "test_clean", "test_forms", "test_guards", "test_in_place", "test_widening", "test_report")
)


@dataclass(frozen=True)
class Environment:
    """What is installed, and what runs there.

    Attributes:
        name: of the environment, and of its folder.
        what: it shows, for the page.
        python: the version, as in ``python3.12``.
        releases: ``"oldest"``: each the minimum that pyproject.toml names; ``"newest"``: what pip finds; ``"pinned"``:
            those of constraints.txt.
        extras: of the package, to be installed with it.
        beside: what else the tests there need.
        tests: paths and modules that pytest is given; in the installed package and in benchmarks/ are doctests.
    """

    name: str
    what: str
    python: str
    releases: str
    extras: tuple[str, ...] = ("test",)
    beside: tuple[str, ...] = ()
    tests: tuple[str, ...] = ("tests", "flora_fx", "benchmarks")


ENVIRONMENTS = (
    Environment("oldest", "the minimum of every dependency, extras included: the default suite", "3.12", "oldest"),
    Environment("newest", "the newest that pip finds of every dependency: the default suite", "3.13", "newest"),
    Environment(
        "torch-alone",
        "the core without extras: the tests of the passes that need torch alone",
        "3.11",
        "pinned",
        extras=(),
        beside=("pytest", "pytest-xdist"),
        tests=(*_CORE, "tests/compatibility/test_installed.py"),
    ),
)


def requirements(pyproject: Mapping[str, Any]) -> list[Requirement]:
    """What the package and its extras ask of others on this platform; what lints and what builds the site is
    nobody's dependency.

    Args:
        pyproject: the table.

    >>> extras = {"all": ["flora-fx[hf]"], "lint": ["ruff"], "docs": ["mkdocs"]}
    >>> project = {"dependencies": ["torch>=2.11"], "optional-dependencies": extras}
    >>> [str(requirement) for requirement in requirements({"project": project})]
    ['torch>=2.11']
    """
    project = pyproject["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra not in ("lint", "docs")]
    found = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    return [one for one in found if one.name != NAME and (one.marker is None or one.marker.evaluate())]


def minima(pyproject: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The oldest release of each dependency that pyproject.toml promises.

    Args:
        pyproject: the table; the checkout's where none is given.

    Raises:
        ValueError: a dependency has no minimum.

    >>> minima({"project": {"dependencies": ["torch>=2.11,<3"], "optional-dependencies": {}}})
    {'torch': '2.11'}
    """
    if pyproject is None:
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {}
    for requirement in requirements(pyproject):
        lower = [one.version for one in requirement.specifier if one.operator == ">="]
        if len(lower) != 1:
            raise ValueError(f"pyproject.toml names no minimum for {requirement}: write {requirement.name}>=…")
        found[requirement.name] = lower[0]
    return found
