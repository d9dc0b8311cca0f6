"""docs/compatibility.md, from the record: ``python -m tests.compatibility.page``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .differences import DIFFERENCES
from .environments import ENVIRONMENTS, ROOT, Environment, minima

__all__ = ["PAGE", "RECORD", "markdown"]

PAGE = ROOT / "docs" / "compatibility.md"
RECORD = ROOT / "tests" / "compatibility" / "record.json"

_HEAD = """\
# Versions

Written by `python -m tests.compatibility.page` from `tests/compatibility/record.json`, which `make compat` writes: it
builds the wheel, installs it (not editable) into an environment of each kind below, and runs the tests there, where no
checkout is imported. It takes gigabytes, so it is not part of CI: it is run before a release. CI runs the default suite
in an editable installation, with Python 3.11 and what `constraints.txt` pins.
"""

_MINIMA = """\
## Minima

A minimum is a release that the suite has passed with, together with all the other minima; it is raised where that does
not hold. Some are what another package asks for: transformers 5.23 needs safetensors 0.8, onnxruntime-genai 0.18 needs
onnxruntime 1.31, diffusers below 0.37 cannot be imported beside torchao 0.18. No release is excluded from above.
"""

_PRIVATE = """\
## Names of torch that are not public

All of them are in `flora_fx/internals.py`, with the releases they were seen in.
"""

_BECAME = {"passed": "passed", "failed": "failed again", "skipped": "skipped", "xfailed": "known to differ"}


def markdown(record: Mapping[str, Any]) -> str:
    """The page.

    Args:
        record: an entry for every environment that was measured.
    """
    measured = [(one, record[one.name]) for one in ENVIRONMENTS if one.name in record]
    versions = [f"| | {' | '.join(one.name for one, _ in measured)} |", f"|---|{'---|' * len(measured)}"]
    versions += [f"| Python | {' | '.join(found['python'] for _, found in measured)} |"]
    for package in minima():
        cells = [found["versions"].get(package, "") for _, found in measured]
        versions.append(f"| {package} | {' | '.join(cells)} |")
    numbers = ["| | date | passed | failed | skipped | known differences |", "|---|---|---|---|---|---|"]
    numbers += [_numbers(one, found) for one, found in measured]
    parts = [
        _HEAD,
        _listed(measured),
        "\n".join(numbers) + "\n",
        *_again(measured),
        "\n".join(["## Releases", "", *versions]) + "\n",
    ]
    return "\n".join([*parts, _skips(measured), _differences(), _minima(), _PRIVATE])


def _listed(measured: list[tuple[Environment, Mapping[str, Any]]]) -> str:
    return "\n".join(f"- **{one.name}**: {one.what}." for one, _ in measured) + "\n"


def _numbers(one: Environment, found: Mapping[str, Any]) -> str:
    cells = (found["date"], *(f"{found[key]:,}" for key in ("passed", "failed", "skipped", "xfailed")))
    return f"| {one.name} | {' | '.join(cells)} |"


def _again(measured: list[tuple[Environment, Mapping[str, Any]]]) -> list[str]:
    lines = []
    for one, found in measured:
        for run in found.get("again", []):
            number = len(run["tests"])
            tests = f"{number:,} tests that failed were" if number > 1 else "1 test that failed was"
            became = [f"{run[key]:,} {word}" for key, word in _BECAME.items() if run[key]]
            tree = "the same tree" if run["tree"] == found["tree"] else "a later tree, after mends"
            lines.append(f"- **{one.name}**: {tests} run again, alone, on {tree} ({run['date']}): {', '.join(became)}.")
    if lines:
        lines = ["The numbers are of one run and, in their place, of what was run again:", "", *lines, ""]
    return ["\n".join(lines)] if lines else []


def _skips(measured: list[tuple[Environment, Mapping[str, Any]]]) -> str:
    lines = ["## Skipped", ""]
    for one, found in measured:
        reasons = [f"{number} × {reason}" for reason, number in found["skips"].items()] or ["none"]
        lines.append(f"- **{one.name}**: {'; '.join(reasons)}.")
    return "\n".join(lines) + "\n"


def _differences() -> str:
    lines = [
        f"- {' and '.join(one.releases)}: {one.reason} (`{one.tests.split('::')[-1]}`)." for one in DIFFERENCES
    ] or ["None."]
    head = ["## Known differences", "", "Strict expected failures of the suite.", ""]
    return "\n".join([*head, *lines]) + "\n"


def _minima() -> str:
    named = ", ".join(f"{package} {version}" for package, version in minima().items())
    return f"{_MINIMA}\n{named}.\n"


if __name__ == "__main__":
    PAGE.write_text(markdown(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE)
