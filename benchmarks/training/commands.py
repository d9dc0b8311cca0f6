"""The suite of a training step."""

from __future__ import annotations

import argparse

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_model, add_rounds, at_least
from ..asking.options import settings as settings_of
from ..contenders.settings import Settings
from . import training

__all__ = ["TRAINING"]


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--sequence", type=at_least(1, int), default=128, help="tokens per sequence (%(default)s)")
    add_rounds(parser, 30, "steps by each contender")


def _asked(options: Options) -> Settings:
    found = settings_of(options)
    training.check(found)
    return found


def _measure(settings: Settings, options: Options, bar: Bar) -> Result:
    return training.measure(settings, rounds=options.rounds, sequence=options.sequence, progress=bar("training"))


TRAINING = Command(
    name="training",
    help="time and peak memory of a training step",
    options=_add,
    measure=_measure,
    title="Training step",
    text="Forward, backward and AdamW on A and B; the same losses and gradients are checked.",
    sheets=training.sheets,
    asked=_asked,
)
