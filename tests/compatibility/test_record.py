"""The page is that of the record, the record is of the minima there are, and nothing in it failed."""

from __future__ import annotations

import json
import os
import tomllib
from typing import Any

import pytest
from packaging.version import Version

from .environments import ENVIRONMENTS, ROOT, Environment, minima, requirements
from .page import PAGE, RECORD, markdown

pytestmark = pytest.mark.skipif("FLORA_FX_SOURCE" in os.environ, reason="`make compat` is writing the record")


@pytest.fixture
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def test_the_page_is_that_of_the_record(recorded: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(recorded), "run `python -m tests.compatibility.page`"


@pytest.mark.parametrize("one", ENVIRONMENTS, ids=lambda one: one.name)
def test_every_environment_was_measured_and_nothing_failed(one: Environment, recorded: dict[str, Any]) -> None:
    found = recorded[one.name]
    assert found["python"].startswith(f"{one.python}.")
    assert found["failures"] == []
    assert found["passed"] > 0


def test_the_minima_are_those_that_were_measured(recorded: dict[str, Any]) -> None:
    measured = recorded["oldest"]["versions"]
    for package, version in minima().items():
        found = Version(Version(measured[package]).public)  # without what a build calls itself
        assert found == Version(version), f"{package}: run `make compat`"


def test_torch_ends_below_the_first_release_that_was_not_measured(recorded: dict[str, Any]) -> None:
    """Its private names may move in any release: one that was measured is allowed, the next one is not."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (torch,) = (one for one in requirements(pyproject) if one.name == "torch")
    newest = max(Version(Version(found["versions"]["torch"]).public) for found in recorded.values())
    assert newest in torch.specifier
    assert Version(f"{newest.major}.{newest.minor + 1}") not in torch.specifier
