"""The command line, run in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from flora_fx import cli


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])
