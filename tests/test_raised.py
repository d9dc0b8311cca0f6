"""`raised` finds every error with a message, and knows which were executed."""

from __future__ import annotations

from pathlib import Path

import coverage
import pytest

from tests.raised import executed, raises, unseen

SOURCE = """
def f(x):
    if x == 1:
        raise ValueError("one")
    if x == 2:
        raise ValueError(
            f"two, or {x}"
        ) from None
    if x == 3:
        raise KeyError("three")  # pragma: no cover: nobody is three
    if x == 4:
        raise StopIteration
    try:
        raise TypeError("four")
    except TypeError:
        raise
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("flora_fx", "passes", "export"):
        (tmp_path / folder).mkdir()
    (tmp_path / "export" / "f.py").write_text(SOURCE)
    return tmp_path


def test_what_was_not_executed(checkout: Path) -> None:
    data = coverage.CoverageData(str(checkout / "data"))
    # As an installed package: flora_fx/export/f.py. Line 7 is inside of the second statement.
    data.add_lines(
        {str(Path("/elsewhere/flora_fx/export/f.py")): [2, 3, 4, 7], str(checkout / "export" / "f.py"): [13]}
    )
    data.write()
    statements = [*raises(checkout)]
    assert sorted(statement.lines for statement in statements) == [(4, 4), (6, 8), (10, 10), (14, 14)]
    assert {statement.unreachable for statement in statements} == {"", "nobody is three"}
    missing = unseen(statements, executed(checkout / "data", checkout))
    assert [(statement.file, statement.lines, statement.text) for statement in missing] == [
        ("export/f.py", (14, 14), "raise TypeError('four')")
    ]


def test_an_excuse_has_a_reason(checkout: Path) -> None:
    path = checkout / "passes" / "f.py"
    path.write_text(SOURCE.replace(": nobody is three", ""))
    with pytest.raises(ValueError, match=r"passes/f\.py:10 says 'pragma: no cover' and not why"):
        list(raises(checkout))


def test_every_excuse_of_ours_has_one() -> None:
    statements = [*raises()]
    assert len(statements) > 150
    assert sum(bool(statement.unreachable) for statement in statements) < 10
