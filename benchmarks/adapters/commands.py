"""The suite of rows that have adapters of their own."""

from __future__ import annotations

import argparse

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import (
    Options,
    add_contenders,
    add_model,
    add_prompt,
    add_rounds,
    compared,
    settings,
    some_numbers,
)
from ..contenders.settings import Settings
from . import adapters
from .torch_contenders import PEFT

__all__ = ["ADAPTERS"]


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser, layers=4)
    add_contenders(parser)
    parser.add_argument("--adapters", type=some_numbers, default=adapters.ADAPTERS, help="with commas (1,2,4,8,16,32)")
    parser.add_argument("--batches", type=some_numbers, default=adapters.BATCHES, help="rows, with commas (1,4,8,16)")
    parser.add_argument("--grid", action="store_true", help="all pairs, not each with 8 of the other")
    add_prompt(parser, 32)
    add_rounds(parser, 30, "tokens of each")


def _measure(settings: Settings, options: Options, bar: Bar) -> Result:
    return adapters.measure(
        settings,
        adapters=options.adapters,
        batches=options.batches,
        grid=options.grid,
        prompt=options.prompts[0],
        rounds=options.rounds,
        contenders=options.contenders,
        progress=bar,
    )


def _asked(options: Options) -> Settings:
    """The settings, once all names are known.

    Raises:
        ValueError: an option makes no sense.
    """
    found = settings(options)
    compared(options.contenders, PEFT, adapters.everyone(found.device))
    return found


ADAPTERS = Command(
    name="adapters",
    help="rows that have adapters of their own",
    options=_add,
    measure=_measure,
    title="Many adapters in one batch",
    text="Rows that have adapters of their own, which take turns: a token of all rows, beside PEFT's `adapter_names` "
    "and beside the base.",
    sheets=adapters.sheets,
    draw=adapters.draw,
    asked=_asked,
)
