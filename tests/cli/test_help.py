"""The help: every option has a text, a default or what it is if left out, and choices that hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flora_fx.cli import build_app
from flora_fx.commands.ending import CODES

GROUP: Any = typer.main.get_command(build_app())


def options() -> Iterator[Any]:
    for name, command in GROUP.commands.items():
        for option in command.params:
            if option.name not in ("help", "context"):
                yield pytest.param(option, id=f"{name} {option.opts[-1]}")


@pytest.mark.parametrize("option", list(options()))
def test_each_option_says_what_it_is_for_and_what_holds_without_it(option: Any) -> None:
    assert option.help
    assert option.help.endswith(".")
    if not (option.required or option.is_flag):
        shown = option.default is not None and option.show_default
        assert shown or "if left out" in option.help


def test_what_is_typed_often_is_short() -> None:
    short = {
        command: {
            option.name: flag for option in GROUP.commands[command].params for flag in option.opts if len(flag) == 2
        }
        for command in ("inspect", "export", "generate", "demo")
    }
    assert short == {
        "inspect": {"model": "-m", "adapter": "-a"},
        "export": {"model": "-m", "output": "-o", "adapter": "-a"},
        "generate": {"directory": "-d", "adapter": "-a", "prompt": "-p", "max_new_tokens": "-n"},
        "demo": {"output": "-o"},
    }
    runner = CliRunner()
    assert runner.invoke(build_app(), ["-V"]).stdout == runner.invoke(build_app(), ["--version"]).stdout
    for command in GROUP.commands:
        if command != "bench":  # its help is the benchmarks'
            assert "Usage" in runner.invoke(build_app(), [command, "-h"]).stdout


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", [name for name in GROUP.commands if name != "bench"])
def test_a_narrow_terminal_cuts_no_word(command: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", columns)
    text = CliRunner().invoke(build_app(), [command, "--help"], terminal_width=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    words = text.replace("NAME=…", "").split()
    assert [word for word in words if word.endswith("…")] == []


def test_the_help_says_what_the_exit_codes_mean() -> None:
    text = " ".join(CliRunner().invoke(build_app(), ["--help"], env={"COLUMNS": "200"}).stdout.split())
    for code, meaning in CODES.items():
        assert f"{code} {meaning}" in text


def test_a_shell_can_complete_without_torch() -> None:
    program = (
        "import atexit, sys; sys.argv = ['flora-fx']\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from flora_fx.cli import main\n"
        "main()"
    )
    environment = {"_FLORA_FX_COMPLETE": "complete_bash", "COMP_WORDS": "flora-fx ex", "COMP_CWORD": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["export", "False"], done.stderr
