"""Suites of passes through a model: under every runner, in every form, as exported decoders."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_contenders, add_model, add_passes, compared, known, settings, some_names
from ..contenders.onnx_exports import GRAPHS
from ..contenders.settings import Settings
from ..contenders.torch_contenders import LIVE, RUNNERS
from . import goals, latency, view

__all__ = ["DECODER", "LATENCY", "LAYOUTS"]

_ONNX = "onnxruntime"
_KNOWN = (*RUNNERS, _ONNX)


def _add_reference(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--reference", default=default, help="contender that ratios are taken to (%(default)s)")


def _add_runners(parser: argparse.ArgumentParser, default: list[str]) -> None:
    add_model(parser)
    add_contenders(parser)
    parser.add_argument("--runners", type=some_names, default=default, help=f"with commas, of: {', '.join(_KNOWN)}")
    _add_reference(parser, "base")
    add_passes(parser, prompts=[128, 1024], new=64, rounds=30, processes=3)


def _asked(options: Options, runners: Sequence[str]) -> Settings:
    """The settings, once all names are known.

    Raises:
        ValueError: an option makes no sense.
    """
    found, contenders, reference = settings(options), options.contenders, options.reference
    known("runner", runners, _KNOWN)
    compared(contenders, reference, sorted({*GRAPHS, *LIVE, *itertools.chain(*RUNNERS.values())}))
    if reference in LIVE and not contenders:
        raise ValueError(f"--reference is {reference}, which takes part only if --contenders names it")
    for runner in runners:
        if reference not in ({*GRAPHS, *LIVE} if runner == _ONNX else RUNNERS[runner]):
            raise ValueError(f"--reference is {reference}, and {runner} has none")
    return found


def _measure(settings: Settings, options: Options, bar: Bar) -> Result:
    return latency.measure(
        settings,
        runners=options.runners,
        prompts=options.prompts,
        new=options.new,
        rounds=options.rounds,
        processes=options.processes,
        contenders=options.contenders,
        reference=options.reference,
        progress=bar,
    )


LATENCY = Command(
    name="latency",
    help="TTFT, TPOT and total latency beside every peer",
    options=lambda parser: _add_runners(parser, ["eager", "inductor", _ONNX]),
    measure=_measure,
    title="Latency",
    text="TTFT, TPOT and total latency of every form of the model under every runner.",
    sheets=view.sheets,
    draw=view.draw,
    asked=lambda options: _asked(options, options.runners),
)

LAYOUTS = Command(
    name="layouts",
    help="the same for every form of a fused graph",
    options=lambda parser: _add_runners(parser, ["forms-eager", "forms-inductor"]),
    measure=_measure,
    title="Forms of the fused graph",
    text="Every form that `FuseConfig` can write; all graphs are captured.",
    sheets=view.sheets,
    asked=LATENCY.asked,
)


def _add_decoder(parser: argparse.ArgumentParser) -> None:
    add_model(parser, layers=4)
    add_contenders(parser)
    _add_reference(parser, "base (genai)")
    add_passes(parser, prompts=[128], new=16, rounds=80, processes=8)


def _measure_decoder(settings: Settings, options: Options, bar: Bar) -> Result:
    return latency.measure(
        settings,
        runners=(_ONNX,),
        prompts=options.prompts,
        new=options.new,
        rounds=options.rounds,
        processes=options.processes,
        contenders=options.contenders or tuple(dict.fromkeys((*goals.CONTENDERS[settings.device], options.reference))),
        reference=options.reference,
        peers=goals.peers(settings.device),
        progress=bar,
    )


DECODER = Command(
    name="decoder",
    help="exported graphs beside other exporters'",
    options=_add_decoder,
    measure=_measure_decoder,
    title="The exported decoder",
    text="Our graphs beside the onnxruntime-genai builder's and the transformers exporter's, and what was to be shown. "
    "Ours and the builder's have one buffer per layer for past and present, the others a cache that grows. Each "
    "process loads them in another order: where in memory weights lie moves a token by some percent.",
    sheets=lambda result: [*view.sheets(result), *goals.sheets(result)],
    draw=view.draw,
    asked=lambda options: _asked(options, (_ONNX,)),
)
