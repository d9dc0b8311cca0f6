"""How a command ends: its result or its error, for people or as JSON, and the exit code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from flora_fx.errors import FloraError, MissingExtraError, require

from .wording import in_flags

__all__ = ["CODES", "INTERRUPTED", "MISSING", "REFUSED", "Outcome", "ending", "left_of"]

REFUSED, MISSING, INTERRUPTED = 1, 2, 130
CODES = {
    0: "done",
    REFUSED: "an error, which is told in one line (with a traceback it is a bug: please report it)",
    MISSING: "an option that there is not or that cannot be; a package that is not installed",
    INTERRUPTED: "Ctrl-C; what is left is told",
}
"""What each exit code means."""


@dataclass
class Outcome:
    """What a command found so far.

    Attributes:
        document: for ``--json``, printed whether the command succeeds or not.
        left: says what an interrupted command leaves behind.
    """

    document: dict[str, Any] = field(default_factory=dict)
    left: Callable[[], str] = lambda: "nothing was written"


@contextmanager
def ending(flags: Mapping[str, str], *, as_json: bool) -> Iterator[Outcome]:
    """Turn what a user can repair into one red line and an exit code; everything else is a bug and keeps its traceback.

    With ``as_json`` stdout gets one JSON document in any case: what the command put into its outcome, and where it did
    not end well an ``error`` beside it, with type, message and exit code.

    Args:
        flags: of the command line, by the names of the arguments that they give.
        as_json: as asked for by the user.
    """
    console = require("rich.console", "cli").Console(stderr=True, soft_wrap=True)
    escape = require("rich.markup", "cli").escape
    outcome = Outcome()

    def failed(kind: str, message: str, code: int, label: str) -> Exception:
        if as_json:
            error = {"type": kind, "message": message, "exit_code": code}
            print(json.dumps({**outcome.document, "error": error}, indent=2))
        console.print(f"[bold red]{label}:[/] [red]{escape(message)}[/]", highlight=False)
        return require("typer", "cli").Exit(code)

    show = warnings.showwarning

    def told(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning | RuntimeWarning):
            text = escape(in_flags(" ".join(str(message).split()), flags))
            console.print(f"[bold yellow]warning:[/] {text}", highlight=False)
        else:
            show(message, category, filename, lineno, file, line)  # a developer's concern

    with warnings.catch_warnings():
        warnings.showwarning = told
        try:
            yield outcome
        except BrokenPipeError:
            raise  # whoever read has read enough
        except (FloraError, OSError) as error:
            message = in_flags(" ".join(str(error).split()), flags)
            code = MISSING if isinstance(error, MissingExtraError) else REFUSED
            raise failed(type(error).__name__, message, code, "error") from None
        except KeyboardInterrupt:
            raise failed("KeyboardInterrupt", outcome.left(), INTERRUPTED, "interrupted") from None
        if as_json:
            print(json.dumps(outcome.document, indent=2))


def left_of(place: Path) -> Callable[[], str]:
    """What an export that is interrupted leaves at a place, which is looked at now and again when it is asked.

    Args:
        place: of the directory that is to be written, whole or not at all.
    """

    def found() -> int | None:
        return place.stat().st_ino if place.exists() else None

    before = found()

    def told() -> str:
        now = found()
        if now is None:
            return f"nothing was written to {place}"
        return f"{place} is what it was" if now == before else f"{place} is written, and whole"

    return told
