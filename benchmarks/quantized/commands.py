"""The suite of a base in few bits."""

from __future__ import annotations

import argparse

from flora_fx.progress import Bar

from ..accuracy.model import Pretraining
from ..accuracy.recipe import Recipe
from ..asking.command import Command, Result
from ..asking.options import Options, add_model, add_prompt, add_rounds
from ..contenders.settings import Settings
from . import quantized, view

__all__ = ["QUANTIZED"]


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser, layers=4)
    parser.add_argument("--steps", type=int, default=600, help="of training the adapter (%(default)s)")
    parser.add_argument("--pretraining-steps", type=int, default=1500, help="of the small model (%(default)s)")
    add_prompt(parser)
    add_rounds(parser, 80, "tokens that are timed")


def _measure(settings: Settings, options: Options, bar: Bar) -> Result:
    return quantized.measure(
        settings,
        pretraining=Pretraining(hidden=128, steps=options.pretraining_steps),
        recipe=Recipe(options.steps),
        prompt=options.prompts[0],
        rounds=options.rounds,
        progress=bar,
    )


QUANTIZED = Command(
    name="quantized",
    help="a base in few bits: size, error, tokens",
    options=_add,
    measure=_measure,
    title="A base in few bits",
    text="A QLoRA as it was trained, its adapter live, beside what else may be done with it; docs/qlora.md says how.",
    sheets=view.sheets,
    setup=view.setup,
)
