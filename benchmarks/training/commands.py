"""The suite of a training step."""

from __future__ import annotations

import argparse

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_model, at_least
from ..asking.options import settings as settings_of
from ..contenders.settings import Settings
from . import training

__all__ = ["TRAINING"]


def _add(parser: argparse.ArgumentParser) -> None:
    few = at_least(1, int)
    add_model(parser)
    parser.add_argument("--sequence", type=few, default=128, help="tokens per sequence (%(default)s)")
    parser.add_argument("--rounds", type=few, default=30, help="steps by each contender (%(default)s)")


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
