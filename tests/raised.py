"""Which errors has no test seen? ``python -m tests.raised DATA...``: of what coverage wrote as the suite ran.

Every ``raise`` with a message in flora_fx/, passes/ and export/ is told that was not executed; the exit code is 1 if
there is one. Those that cannot be, as they stand on another platform or wait for a bug, say ``# pragma: no cover`` and
why.

    coverage run --source=flora_fx,passes,export -m pytest -m "not slow and not gpu"
    python -m tests.raised .coverage*
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

__all__ = ["Raise", "executed", "raises"]

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("flora_fx", "passes", "export")
_PRAGMA = re.compile(r"# pragma: no cover(?:: (?P<reason>.+))?")


@dataclass(frozen=True)
class Raise:
    """A ``raise`` statement with a message.

    Attributes:
        file: relative to the checkout.
        lines: first and last.
        text: as it is written.
        unreachable: why no test can execute it; empty if one can.
    """

    file: str
    lines: tuple[int, int]
    text: str
    unreachable: str = ""


def raises(root: Path = ROOT) -> Iterator[Raise]:
    """All of them.

    Raises:
        ValueError: a pragma that gives no reason.
    """
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    last = node.end_lineno or node.lineno
                    file = path.relative_to(root).as_posix()
                    found = _PRAGMA.search("\n".join(lines[node.lineno - 1 : last]))
                    if found is not None and found["reason"] is None:
                        raise ValueError(f"{file}:{node.lineno} says 'pragma: no cover' and not why")
                    yield Raise(file, (node.lineno, last), ast.unparse(node), found["reason"] if found else "")


def executed(data: Path, root: Path = ROOT) -> dict[str, set[int]]:
    """The lines that were executed, by file; also of a copy of the checkout."""
    found: dict[str, set[int]] = {}
    read = CoverageData(str(data))
    read.read()
    for measured in read.measured_files():
        parts = Path(measured).parts
        start = next((i for i in reversed(range(len(parts))) if parts[i] in FOLDERS), None)
        # flora_fx/export/x.py of an installed package is export/x.py here.
        name = "/".join(parts[start:]) if start is not None else ""
        if (root / name).is_file():
            found.setdefault(name, set()).update(read.lines(measured) or ())
    return found


def unseen(statements: Iterable[Raise], lines: dict[str, set[int]]) -> list[Raise]:
    """Those that were not executed and could have been."""
    nothing: Set[int] = frozenset()
    return [
        statement
        for statement in statements
        if not statement.unreachable
        and lines.get(statement.file, nothing).isdisjoint(range(statement.lines[0], statement.lines[1] + 1))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="what coverage wrote")
    options = parser.parse_args()
    statements = [*raises()]
    lines: dict[str, set[int]] = {}
    for data in options.data:
        for file, seen in executed(data).items():
            lines.setdefault(file, set()).update(seen)
    missing = unseen(statements, lines)
    for statement in missing:
        print(f"{statement.file}:{statement.lines[0]}: {statement.text[:160]}")
    excused = sum(bool(statement.unreachable) for statement in statements)
    print(f"{len(statements)} errors with a message: {len(missing)} not seen, {excused} that no test can cause")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
