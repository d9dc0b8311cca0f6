"""Suites of whole texts: loops from an export, and what a host serves."""

from __future__ import annotations

import argparse

from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_model, add_passes, add_prompt, at_least, some_numbers
from ..contenders.settings import Settings
from . import capacity, generation

__all__ = ["CAPACITY", "GENERATION"]


def _add_generation(parser: argparse.ArgumentParser) -> None:
    add_model(parser, layers=4)
    parser.add_argument("--swaps", type=at_least(1, int), default=100, help="of the adapter (%(default)s)")
    add_passes(parser, prompts=[128], new=32, rounds=40, processes=8)


def _measure_generation(settings: Settings, options: Options, bar: Bar) -> Result:
    return generation.measure(
        settings,
        prompt=options.prompts[0],
        new=options.new,
        rounds=options.rounds,
        processes=options.processes,
        swaps=options.swaps,
        progress=bar,
    )


GENERATION = Command(
    name="generation",
    help="whole loops from an export, and swaps",
    options=_add_generation,
    measure=_measure_generation,
    title="Generation",
    text="Whole loops on an exported directory, from `load` and from onnxruntime-genai: tokens are chosen, not given. "
    "Then what of a token is our Python, and swaps of the adapter between generations.",
    sheets=generation.sheets,
)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--batches", type=some_numbers, default=[1, 2, 4, 8], help="requests answered together (1,2,4,8)"
    )
    add_prompt(parser)
    parser.add_argument("--new", type=at_least(1, int), default=64, help="tokens of an answer (%(default)s)")
    parser.add_argument(
        "--seconds", type=at_least(1.0, float), default=10.0, help="that each arrangement is measured (%(default)s)"
    )


def _measure_capacity(settings: Settings, options: Options, bar: Bar) -> Result:
    return capacity.measure(
        settings,
        batches=options.batches,
        prompt=options.prompts[0],
        new=options.new,
        seconds=options.seconds,
        progress=bar,
    )


CAPACITY = Command(
    name="capacity",
    help="what a host serves, and the hosts a load takes",
    options=_add_capacity,
    measure=_measure_capacity,
    title="Capacity",
    text="Replicas of the exported decoder on all cores of a host, each with requests one after the other, and the "
    "hosts that a load takes; docs/serving.md says how to put them behind a load balancer.",
    sheets=capacity.sheets,
)
