"""Suites of what grows: with rank, batch and depth, with tokens, with a model's size."""

from __future__ import annotations

import argparse

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_model, add_prompt, add_rounds, at_least, known, numbers, some_numbers
from ..asking.options import settings as settings_of
from ..contenders.settings import Settings
from ..contenders.torch_contenders import RUNNERS
from . import exporting, forms, fusing, large, scaling

__all__ = ["EXPORT", "FORMS", "LARGE", "SCALING"]


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--runner", default="eager", help="one of those of latency (%(default)s)")
    axes = scaling.AXES
    parser.add_argument("--ranks", type=numbers, default=axes["rank"], help="with commas; empty for none")
    parser.add_argument("--batches", type=numbers, default=axes["batch"], help="likewise")
    parser.add_argument("--depths", type=numbers, default=axes["layers"], help="likewise")
    add_prompt(parser)
    parser.add_argument("--new", type=at_least(1, int), default=16, help="tokens after the prompt (%(default)s)")
    add_rounds(parser, 6, "generations by each contender")


def _asked_scaling(options: Options) -> Settings:
    known("runner", [options.runner], (*RUNNERS, "onnxruntime"))
    return settings_of(options)


def _measure_scaling(settings: Settings, options: Options, bar: Bar) -> Result:
    axes = {"rank": options.ranks, "batch": options.batches, "layers": options.depths}
    result = scaling.measure(
        settings,
        runner=options.runner,
        axes={axis: values for axis, values in axes.items() if values},
        prompt=options.prompts[0],
        new=options.new,
        rounds=options.rounds,
        progress=bar,
    )
    return result | fusing.measure(settings, progress=bar("fuse"))


SCALING = Command(
    name="scaling",
    help="cost against rank, batch and depth; fuse time",
    options=_add_scaling,
    measure=_measure_scaling,
    title="Scaling",
    text="TPOT with one setting varied at a time, and what `fuse` itself takes.",
    sheets=lambda result: [*scaling.sheets(result), *fusing.sheets(result)],
    draw=scaling.draw,
    asked=_asked_scaling,
)


def _add_forms(parser: argparse.ArgumentParser) -> None:
    add_model(parser, layers=4)
    parser.add_argument("--ranks", type=some_numbers, default=forms.RANKS, help="with commas (8,16,32,64)")
    parser.add_argument("--tokens", type=some_numbers, default=forms.TOKENS, help="of a forward (1,128,512)")
    add_rounds(parser, 20, "forwards by each contender")
    parser.add_argument(
        "--sequence", type=at_least(0, int), default=128, help="of a training step; 0: none (%(default)s)"
    )


def _measure_forms(settings: Settings, options: Options, bar: Bar) -> Result:
    return forms.measure(
        settings,
        ranks=options.ranks,
        tokens=options.tokens,
        rounds=options.rounds,
        sequence=options.sequence,
        progress=bar,
    )


FORMS = Command(
    name="forms",
    help="up-projections through the backend, each form",
    options=_add_forms,
    measure=_measure_forms,
    title="Forms of an up-projection",
    text="Through the backend under Inductor, live models: `addmm`, a GEMM and an `add`, or `unrolled`, a product and "
    "a sum. With one token on a CPU all products are loops already.",
    sheets=forms.sheets,
)


def _add_large(parser: argparse.ArgumentParser) -> None:
    add_model(parser, shape="llama-3.1-70b", dtype="bfloat16")
    add_rounds(parser, 3, "fuses")


def _measure_large(settings: Settings, options: Options, bar: Bar) -> Result:
    return large.measure(settings, rounds=options.rounds, progress=bar("fuse"))


LARGE = Command(
    name="large",
    help="fuse on a graph too large for this machine's memory",
    options=_add_large,
    measure=_measure_large,
    title="A model of 70B parameters",
    text="Fused without its weights: shapes are all that the passes read.",
    sheets=large.sheets,
)


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--depths", type=numbers, default=[], help="in layers, with commas (a third of all, and all)")
    add_rounds(parser, 3, "exports by each, at each depth")


def _measure_export(settings: Settings, options: Options, bar: Bar) -> Result:
    return exporting.measure(settings, depths=options.depths, rounds=options.rounds, progress=bar("export"))


EXPORT = Command(
    name="export",
    help="time and memory of an export, beside the builder's",
    options=_add_export,
    measure=_measure_export,
    title="Export",
    text="What an export takes, beside the onnxruntime-genai builder's, from the same checkpoint and adapter: whole "
    "commands, with Python's start and all imports. Layers that are alike are traced once, so time hardly grows "
    "with them.",
    sheets=exporting.sheets,
)
