"""What a run of pytest came to, from its JUnit file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

__all__ = ["outcome"]


def outcome(file: Path) -> dict[str, Any]:
    """Numbers of tests, by what became of them; names of those that failed; reasons of those that were skipped.

    Args:
        file: as ``--junitxml`` writes it.
    """
    numbers = Counter({"passed": 0, "failed": 0, "skipped": 0, "xfailed": 0})
    failures, skips = [], Counter[str]()
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            numbers["failed"] += 1
            failures.append(name)
        elif skip is None:
            numbers["passed"] += 1
        elif skip.get("type") == "pytest.xfail":
            numbers["xfailed"] += 1
        else:
            numbers["skipped"] += 1
            skips[skip.get("message", "")] += 1
    return {**numbers, "failures": sorted(failures), "skips": dict(sorted(skips.items()))}
