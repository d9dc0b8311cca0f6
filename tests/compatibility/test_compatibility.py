"""What is measured, how it is counted, and how what is known to differ is marked."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from . import page, run
from .differences import DIFFERENCES, TESTS, Difference, expect
from .environments import ENVIRONMENTS, ROOT, minima
from .outcome import NUMBERS, outcome
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
    folder = tmp_path / "tests" / "x"
    folder.mkdir(parents=True)
    (folder / "test_a.py").touch()
    became = {
        "b": "",
        "c": '<failure message="AssertionError">…</failure>',
        "d[1.5-x::y]": '<error message="fixture">…</error>',
        "e": '<skipped type="pytest.skip" message="no mount">…</skipped>',
        "f": '<skipped type="pytest.xfail" message="torch" />',
    }
    cases = [
        f'<testcase classname="tests.x.test_a" name="test_{name}">{what}</testcase>' for name, what in became.items()
    ]
    cases.append('<testcase classname="tests.x.test_a.TestG" name="test_g"><failure message="G">…</failure></testcase>')
    cases.append('<testcase classname="ops" name="flora_fx.ops.h"><failure message="doctest">…</failure></testcase>')
    file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>", encoding="utf-8")
    assert outcome(file, tmp_path) == {
        "passed": 1,
        "failed": 4,
        "skipped": 1,
        "xfailed": 1,
        "failures": [
            "flora_fx.ops::flora_fx.ops.h",
            "tests/x/test_a.py::TestG::test_g",
            "tests/x/test_a.py::test_c",
            "tests/x/test_a.py::test_d[1.5-x::y]",
        ],
        "skips": {"no mount": 1},
    }
    (folder / "test_a.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"is that of the test tests\.x\.test_a::test_c"):
        outcome(file, tmp_path)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of which four tests failed, its page, and stand-ins for pip and git: a folder of environments."""
    failures = [f"tests/test_a.py::test_{name}" for name in "abcd"]
    whole = {"python": "3.12.1", "tree": "whole", "date": "2020-01-01", "versions": {"torch": "2.11.0"}}
    whole |= {"passed": 9, "failed": 4, "skipped": 1, "xfailed": 2, "failures": failures, "skips": {"no mount": 1}}
    (tmp_path / "record.json").write_text(json.dumps({"oldest": whole}), encoding="utf-8")
    (tmp_path / "oldest" / "bin").mkdir(parents=True)
    (tmp_path / "oldest" / "bin" / "python").touch()
    for module in (run, page):
        monkeypatch.setattr(module, "RECORD", tmp_path / "record.json")
        monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(run, "copied", lambda place: run.Source("later", place, place / "wheel.whl"))
    monkeypatch.setattr(run, "releases", lambda python: {"torch": "2.11.0", "flora-fx": "1"})
    monkeypatch.setattr(run, "_run", lambda command: None)
    return tmp_path


def failed_again(measured: Path) -> int:
    return run.main(["--only", "oldest", "--failed", "--place", str(measured)])


def test_tests_that_failed_are_run_again_and_counted_once(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    outcomes = [
        {"passed": 1, "failed": 1, "skipped": 1, "xfailed": 1, "failures": ["tests/test_a.py::test_d"]},
        {"passed": 1, "failed": 0, "skipped": 0, "xfailed": 0, "failures": []},
    ]
    skips: list[dict[str, int]] = [{"no mount": 1}, {}]

    def tested(*arguments: Any) -> dict[str, Any]:
        given.append(arguments[-1])
        return outcomes[len(given) - 1] | {"skips": skips[len(given) - 1]}

    monkeypatch.setattr(run, "tested", tested)
    assert failed_again(measured) == 1
    assert failed_again(measured) == 0
    assert failed_again(measured) == 0
    four = [f"tests/test_a.py::test_{name}" for name in "abcd"]
    assert given == [four, four[-1:]], "nothing is run where nothing failed"
    found = json.loads((measured / "record.json").read_text(encoding="utf-8"))["oldest"]
    assert {key: found[key] for key in NUMBERS} == {"passed": 11, "failed": 0, "skipped": 2, "xfailed": 3}
    assert (found["tree"], found["date"], found["failures"]) == ("whole", "2020-01-01", [])
    assert found["skips"] == {"no mount": 2}
    assert [(one["tree"], one["tests"], one["failed"]) for one in found["again"]] == [
        ("later", four, 1),
        ("later", four[-1:], 0),
    ]
    text = (measured / "page.md").read_text(encoding="utf-8")
    assert "4 tests that failed were run again, alone, on a later tree, after mends (" in text
    assert "1 passed, 1 failed again, 1 skipped, 1 known to differ." in text
    assert "1 test that failed was run again" in text


def test_what_was_run_again_is_all_that_failed(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (measured / "record.json").read_text(encoding="utf-8")
    monkeypatch.setattr(run, "tested", lambda *_: dict.fromkeys(NUMBERS, 0) | {"passed": 3})
    with pytest.raises(ValueError, match="3 tests were run again, but 4 had failed"):
        failed_again(measured)
    assert (measured / "record.json").read_text(encoding="utf-8") == before


def test_tests_are_run_again_only_where_they_failed(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "releases", lambda python: {"torch": "2.14.0"})
    with pytest.raises(RuntimeError, match="torch differ in the environment oldest from the record's: run it whole"):
        failed_again(measured)
    (measured / "oldest" / "bin" / "python").unlink()
    with pytest.raises(RuntimeError, match="has no environment oldest: run it without --failed"):
        failed_again(measured)
    (measured / "record.json").unlink()
    with pytest.raises(RuntimeError, match="has no run in the environment oldest: run it without --failed"):
        failed_again(measured)


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
        Difference("tests/x/test_a.py::test_bc", ("pytest>=8",), "another"),
    ]
    expect([*items, elsewhere], differences)
    assert [[mark.kwargs for mark in item.marks] for item in [*items, elsewhere]] == [
        [{"reason": "so it is", "strict": True}],
        [{"reason": "so it is", "strict": True}],
        [{"reason": "another", "strict": True}],
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
