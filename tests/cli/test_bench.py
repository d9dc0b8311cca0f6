"""`flora-fx bench`: a checkout's benchmarks in a process of their own; none in an installation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flora_fx import cli

ARGUMENTS = ["--shape", "tiny", "--help"]


def bench() -> Result:
    return CliRunner().invoke(cli.build_app(), ["bench", *ARGUMENTS])


def test_a_checkouts_benchmarks_get_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # found before any other folder of that name
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'got')!r}).write_text(' '.join(sys.argv[1:]))\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(cli, "checkout", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    assert bench().exit_code == 3
    assert (tmp_path / "got").read_text() == " ".join(["latency", *ARGUMENTS])
    assert os.environ["PYTHONPATH"] == str(tmp_path / "other")


def test_an_installation_has_none_and_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "checkout", lambda: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be run"))
    result = bench()
    assert result.exit_code == 1
    assert "run `python -m benchmarks latency` in a checkout" in result.stderr
    assert "bench" not in CliRunner().invoke(cli.build_app(), ["--help"]).stdout
