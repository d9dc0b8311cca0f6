"""One suite: what is typed, what is measured, what is shown."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_fx.progress import Bar

from ..show.page import setup
from ..show.sheet import Sheet
from .options import Options, settings

__all__ = ["Command", "Result"]

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A suite, as the command line and the page know it.

    Attributes:
        name: that is typed, and of the JSON file.
        help: a line.
        options: adds them to the suite's parser.
        measure: what was asked, given the options and a bar of progress; the result is kept as JSON.
        title: of the page's chapter.
        text: what the chapter shows.
        sheets: a result's tables.
        draw: its pictures, each file at the path given and a suffix.
        setup: a result's model and settings, in sentences.
        asked: what the options ask for; raises ValueError or OSError where they make no sense.
    """

    name: str
    help: str
    options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[Any, Options, Bar], Result]
    title: str
    text: str
    sheets: Callable[[Mapping[str, Any]], Sequence[Sheet]]
    draw: Callable[[Mapping[str, Any], Path], Sequence[Path]] = lambda result, path: ()
    setup: Callable[[Mapping[str, Any]], str] = setup
    asked: Callable[[Options], Any] = settings
