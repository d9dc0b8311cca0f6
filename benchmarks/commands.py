"""The command line of the suites."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from flora_fx.errors import MissingExtraError, require
from flora_fx.progress import bars

from .gpu import command as gpu
from .show.page import write_page
from .show.results import RECORD, save
from .suites import SUITES, chapters

__all__ = ["main", "parser"]


def main(arguments: Sequence[str]) -> None:
    """Run one suite.

    Args:
        arguments: what was typed after ``python -m benchmarks``.

    Raises:
        SystemExit: 2 for arguments that make no sense, 1 for a GPU section that failed, or a model that does not load.
    """
    arguments_of = parser()
    options = arguments_of.parse_args(arguments)
    if options.suite == "page":
        print(f"written to {write_page(chapters(RECORD))}")
        return
    if options.suite == "gpu":
        try:
            status = gpu.run(options)
        except ValueError as error:
            arguments_of.error(str(error))
        sys.exit(status)
    suite = SUITES[options.suite]
    try:
        asked = suite.asked(options)
    except (ValueError, OSError) as error:
        arguments_of.error(str(error))
    console = require("rich.console", "cli").Console
    with bars(console(stderr=True)) as bar:
        result = suite.measure(asked, options, bar)
    name = options.name or suite.name
    path = save(name, result, options.output, f"python -m benchmarks {shlex.join(_repeatable(arguments))}")
    for sheet in suite.sheets(result):
        console(width=200).print(sheet.rich())
    print(f"written to {path}")
    try:
        for picture in suite.draw(result, options.output / name):
            print(f"drawn to {picture}")
    except MissingExtraError as error:
        print(error, file=sys.stderr)


def _repeatable(arguments: Sequence[str]) -> list[str]:
    """What repeats a measurement elsewhere: all but where its files went.

    >>> _repeatable(["latency", "--output", "/home/me/out", "--rounds", "3", "--output=here"])
    ['latency', '--rounds', '3']
    """
    places = {index + 1 for index, argument in enumerate(arguments) if argument == "--output"}
    return [a for index, a in enumerate(arguments) if index not in places and a.partition("=")[0] != "--output"]


def parser() -> argparse.ArgumentParser:
    """The suites and their options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = top.add_subparsers(dest="suite", required=True)
    for suite in SUITES.values():
        suite.options(suites.add_parser(suite.name, help=suite.help))
    gpu.add_options(suites.add_parser("gpu", help="all that a GPU host should run, in two phases"))
    suites.add_parser("page", help="write docs/benchmarks.md from the JSON of record")
    return top
