"""The suite of counted launches."""

from __future__ import annotations

import argparse
import itertools

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_model, add_prompt, known, some_names
from ..asking.options import settings as settings_of
from ..contenders.settings import Settings
from . import kernels

__all__ = ["KERNELS"]

_RUNNERS = [*kernels.RUNNERS, "onnxruntime"]
_VARIANTS = dict.fromkeys(itertools.chain.from_iterable(runner.variants for runner in kernels.RUNNERS.values()))


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    of = f"separated by commas, of: {', '.join(_RUNNERS)}"
    parser.add_argument("--runners", type=some_names, default=_RUNNERS, help=of)
    only = f"only these, of: {', '.join(_VARIANTS)}"
    parser.add_argument("--variants", nargs="+", default=(), metavar="NAME", help=only)
    add_prompt(parser)


def _asked(options: Options) -> Settings:
    known("runner", options.runners, _RUNNERS)
    known("variant", options.variants, _VARIANTS)
    return settings_of(options)


def _measure(settings: Settings, options: Options, bar: Bar) -> Result:
    return kernels.measure(
        settings, runners=options.runners, variants=options.variants, prompt=options.prompts[0], progress=bar("kernels")
    )


KERNELS = Command(
    name="kernels",
    help="launches per decoder layer, counted",
    options=_add,
    measure=_measure,
    title="Kernels per decoder layer",
    text="Counted, not timed: what one more layer adds to a call. `cuda-code` is what Inductor writes for an H100, "
    "with attention spelled out; nothing of it ran.",
    sheets=kernels.sheets,
    asked=_asked,
)
