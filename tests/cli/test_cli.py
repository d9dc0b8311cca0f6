"""The command line: results on stdout, one line for errors, JSON that parses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import flora_fx
from flora_fx import cli
from tests.patience import LIMIT_S

from .running import invoke


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_task_that_is_none(command: str, tmp_path: Path) -> None:
    result = invoke(command, "--model", tmp_path, "--adapter", tmp_path, "--output", tmp_path, "--task", "chess")
    assert result.exit_code == 2
    if command == "export":
        assert "'chess' is none of auto, causal-lm" in " ".join(result.stderr.replace("│", " ").split())


def test_user_errors_are_one_line_on_stderr(adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", "./gone", "--adapter", adapter_dir)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: no directory './gone'; check the path\n"


def test_an_error_as_json(adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", "./gone", "--adapter", adapter_dir, "--json")
    assert result.exit_code == 1
    message = "no directory './gone'; check the path"
    told = {"type": "CheckpointNotFoundError", "message": message, "exit_code": 1}
    assert json.loads(result.stdout) == {"error": told}
    assert result.stderr == f"error: {message}\n"


def test_a_misfit_is_one_line(encoder_dir: Path, adapter_dir: Path) -> None:
    result = invoke("inspect", "--model", encoder_dir, "--adapter", adapter_dir)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "is it the adapter of another model?" in result.stderr


def test_missing_extra_inside_a_command(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("inspect", "--model", model_dir, "--adapter", model_dir)
    assert result.exit_code == 2
    assert "pip install 'flora-fx[hf]'" in result.stderr


def test_missing_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'flora-fx[cli]'" in capsys.readouterr().err


def test_version() -> None:
    assert invoke("--version").stdout == f"flora-fx {flora_fx.__version__}\n"


def test_python_dash_m(model_dir: Path, adapter_dir: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "flora_fx.cli",
        "inspect",
        "--model",
        model_dir,
        "--adapter",
        adapter_dir,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
