"""What is measured, how it is counted, and how what is known to differ is marked."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .differences import DIFFERENCES, TESTS, Difference, expect
from .environments import ENVIRONMENTS, ROOT, minima
from .outcome import outcome
from .run import interpreter


def test_every_python_that_is_promised_was_measured() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    promised = re.findall(r":: (3\.\d+)", "\n".join(project["classifiers"]))
    assert sorted(one.python for one in ENVIRONMENTS) == promised
    assert project["requires-python"] == f">={promised[0]}"


def test_a_dependency_without_a_minimum_is_no_promise() -> None:
    project = {"dependencies": ["torch<3"], "optional-dependencies": {}}
    with pytest.raises(ValueError, match="no minimum for torch<3: write torch>="):
        minima({"project": project})


def test_what_is_for_other_platforms_is_left_out() -> None:
    lines = ["a>=1; sys_platform == 'plan9'", "b>=2; sys_platform != 'plan9'", "flora-fx[hf]"]
    assert minima({"project": {"dependencies": ["torch>=3"], "optional-dependencies": {"x": lines}}}) == {
        "torch": "3",
        "b": "2",
    }


def test_the_outcome_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    became = {
        "b": "",
        "c": '<failure message="AssertionError">…</failure>',
        "d": '<error message="fixture">…</error>',
        "e": '<skipped type="pytest.skip" message="no mount">…</skipped>',
        "f": '<skipped type="pytest.xfail" message="torch" />',
    }
    cases = [
        f'<testcase classname="tests.test_a" name="test_{name}">{what}</testcase>' for name, what in became.items()
    ]
    file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>", encoding="utf-8")
    assert outcome(file) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "xfailed": 1,
        "failures": ["tests.test_a::test_c", "tests.test_a::test_d"],
        "skips": {"no mount": 1},
    }


def test_every_known_difference_is_of_tests_that_there_are() -> None:
    for difference in DIFFERENCES:
        file, _, test = difference.tests.partition("::")
        assert all(Requirement(one).specifier for one in difference.releases)
        assert f"def {re.split(r'[*?[]', test)[0]}" in (ROOT / file).read_text(encoding="utf-8")


@dataclass
class Collected:
    """A test, as pytest hands it to a conftest."""

    path: Path
    nodeid: str
    marks: list[pytest.MarkDecorator] = field(default_factory=list)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark)


def test_a_known_difference_is_a_strict_xfail_under_its_releases_alone() -> None:
    names = ("test_b[1]", "test_b[2]", "test_bc")
    items = [Collected(TESTS / "x" / "test_a.py", f"wherever/test_a.py::{name}") for name in names]
    elsewhere = Collected(Path("/elsewhere/tests/x/test_a.py"), "tests/x/test_a.py::test_b[1]")
    differences = [
        Difference("tests/x/test_a.py::test_b[[]*", ("pytest>=8", "pluggy>=1"), "so it is"),
        Difference("tests/x/test_a.py::*", ("pytest>=8", "pluggy<1"), "not now"),
        Difference("tests/x/test_a.py::*", ("no-such-package>=0",), "not here"),
    ]
    expect([*items, elsewhere], differences)
    assert [[mark.kwargs for mark in item.marks] for item in [*items, elsewhere]] == [
        [{"reason": "so it is", "strict": True}],
        [{"reason": "so it is", "strict": True}],
        [],
        [],
    ]


def test_torchs_private_modules_are_named_in_one_file() -> None:
    private = re.compile(r"\bfrom torch\S* import .*\b_\w+|\btorch(?:\.\w+)*\._(?!_)\w+")
    found = []
    for folder in ("flora_fx", "passes", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            code = re.sub(r'"""(?s:.*?)"""|``[^`]*``|#.*', "", path.read_text(encoding="utf-8"))
            found += [(path.name, name) for name in private.findall(code) if not name.startswith("torch.ops.")]
    assert {file for file, _ in found} == {"internals.py"}, found


def test_a_python_that_is_not_here_is_asked_for() -> None:
    with pytest.raises(FileNotFoundError, match=r"3\.99 is not installed here: name it with --python 3\.99=PATH"):
        interpreter("3.99", {"3.12": "/usr/bin/python3.12"})
