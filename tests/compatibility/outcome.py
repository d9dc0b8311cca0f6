"""What a run of pytest came to, from its JUnit file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

__all__ = ["NUMBERS", "again", "outcome"]

NUMBERS = ("passed", "failed", "skipped", "xfailed")


def outcome(file: Path, folder: Path) -> dict[str, Any]:
    """Numbers of tests, by what became of them; ids of those that failed; reasons of those that were skipped.

    Args:
        file: as ``--junitxml`` writes it.
        folder: of the source, where pytest ran.
    """
    numbers = Counter(dict.fromkeys(NUMBERS, 0))
    failures, skips = [], Counter[str]()
    for case in ElementTree.parse(file).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            numbers["failed"] += 1
            failures.append(_id(case.get("classname", ""), case.get("name", ""), folder))
        elif skip is None:
            numbers["passed"] += 1
        elif skip.get("type") == "pytest.xfail":
            numbers["xfailed"] += 1
        else:
            numbers["skipped"] += 1
            skips[skip.get("message", "")] += 1
    return {**numbers, "failures": sorted(failures), "skips": dict(sorted(skips.items()))}


def _id(classname: str, name: str, folder: Path) -> str:
    """What ``pytest --pyargs`` takes for a test; the file has dots for slashes, and no ``.py``."""
    parts = classname.split(".")
    if parts[0] != "tests":  # a doctest of the installed package
        return f"flora_fx.{classname}::{name}"
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end]) + ".py"
        if (folder / path).is_file():
            return "::".join([path, *parts[end:], name])
    raise FileNotFoundError(f"no file of {folder} is that of the test {classname}::{name}")


def again(before: Mapping[str, Any], after: Mapping[str, Any], tree: str, date: str) -> dict[str, Any]:
    """The outcome of a whole run, with what became of the tests that failed in it when they were run once more.

    Args:
        before: the record of the whole run.
        after: the outcome of those tests.
        tree: they were run on.
        date: of that.

    Raises:
        ValueError: not each of those tests was run once.
    """
    numbers = {key: after[key] for key in NUMBERS}
    if sum(numbers.values()) != len(before["failures"]):
        raise ValueError(f"{sum(numbers.values())} tests were run again, but {len(before['failures'])} had failed")
    run = {"tree": tree, "date": date, "tests": before["failures"], **numbers}
    return {
        **before,
        **{key: before[key] + after[key] for key in NUMBERS},
        "failed": after["failed"],
        "failures": after["failures"],
        "skips": dict(sorted((Counter(before["skips"]) + Counter(after["skips"])).items())),
        "again": [*before.get("again", []), run],
    }
