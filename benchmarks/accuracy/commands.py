"""The suite of methods at equal budgets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from flora_fx.errors import FloraError
from flora_fx.progress import Bar

from ..asking.command import Command, Result
from ..asking.options import Options, add_output, names, numbers
from ..show.results import read
from . import accuracy, data, search, search_view, together_view, view
from .methods import FULL, METHODS, VARIANTS
from .model import Pretraining
from .plan import Plan
from .recipe import Recipe
from .sequence import SEQUENCE
from .text.suite import TEXT
from .together import together

__all__ = ["ACCURACY"]

_SUITES = {suite.name: suite for suite in (SEQUENCE, TEXT)}


def _add(parser: argparse.ArgumentParser) -> None:
    add_output(parser)
    named = "; ".join([FULL, *METHODS, *VARIANTS])
    parser.add_argument(
        "--suite", dest="of", choices=_SUITES, default=SEQUENCE.name, help="the tasks, and their model (%(default)s)"
    )
    parser.add_argument(
        "--search", action="store_true", help="choose variants on half of the tasks, report on the other half"
    )
    parser.add_argument(
        "--together",
        nargs="+",
        default=(),
        metavar="NAME",
        help="no training: what these searches' records say together",
    )
    parser.add_argument("--methods", nargs="+", default=(), metavar="NAME", help=f"of: {named} (the suite's)")
    parser.add_argument("--tasks", nargs="+", default=(), metavar="NAME", help="only these, as they are")
    parser.add_argument("--budgets", type=numbers, help=f"as ranks of a LoRA ({_defaults('budgets')})")
    parser.add_argument("--rates", type=_rates, help="learning rates, with commas (the suite's)")
    parser.add_argument("--seeds", type=int, help=f"at the best rate ({_defaults('seeds')})")
    parser.add_argument(
        "--until", type=float, default=0.0, help="add seeds until every 95%% interval is within ± so many points"
    )
    parser.add_argument("--most-seeds", type=int, default=Plan.most_seeds, help="that there may be then (%(default)s)")
    parser.add_argument("--tuning-seeds", type=int, help=f"per rate; 0: all ({_defaults('tuning_seeds')})")
    parser.add_argument("--steps", type=int, help="of fine-tuning (the suite's)")
    parser.add_argument("--batch", type=int, help="examples of a step (the suite's)")
    parser.add_argument(
        "--pretraining-steps", type=int, default=Pretraining.steps, help="of the small model (%(default)s)"
    )
    parser.add_argument("--model", help="a causal language model instead of the small one: directory or Hub id")
    parser.add_argument("--data", type=Path, help="for it: JSONL with task, split, prompt and answer in each line")
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread (a core each; on a GPU 8)")
    parser.add_argument(
        "--lanes", type=int, default=0, help="trainings of a method that a process does at once (8; on a GPU 128)"
    )
    parser.add_argument("--device", default=Recipe.device, help="cpu or cuda (%(default)s)")


def _rates(text: str) -> list[float]:
    return [float(number) for number in names(text)]


def _defaults(name: str) -> str:
    """What the suites have for an option."""
    values = {suite.name: getattr(suite, name) for suite in _SUITES.values()}
    listed = {of: ",".join(map(str, value)) if isinstance(value, tuple) else value for of, value in values.items()}
    return "; ".join(f"{of}: {value}" for of, value in listed.items())


def _plan(options: Options) -> Plan:
    """What is compared.

    Raises:
        ValueError: an option, or a line of the data, makes no sense.
        OSError: the data cannot be read.
    """
    suite = _SUITES[options.of]
    for name in ("methods", "tasks", "model", "data"):
        if options.search and getattr(options, name):
            raise ValueError(f"--search goes without --{name}: what it tries, and on what, is registered")
    given = {name: value for name in ("steps", "batch") if (value := getattr(options, name)) is not None}
    return Plan(
        suite=suite,
        methods=tuple(dict.fromkeys(options.methods or suite.methods)),
        tasks=tuple(dict.fromkeys(options.tasks)),
        screened=not options.tasks,
        budgets=tuple(dict.fromkeys(suite.budgets if options.budgets is None else options.budgets)),
        rates=tuple(sorted(set(suite.rates if options.rates is None else options.rates))),
        seeds=suite.seeds if options.seeds is None else options.seeds,
        until=options.until,
        most_seeds=options.most_seeds,
        tuning_seeds=suite.tuning_seeds if options.tuning_seeds is None else options.tuning_seeds,
        recipe=replace(suite.recipe, device=options.device, **given),
        pretraining=Pretraining(steps=options.pretraining_steps),
        model=options.model,
        rows=tuple(data.read(options.data)) if options.data else (),
        workers=options.workers,
        lanes=options.lanes,
    )


def _measure(plan: Plan, options: Options, bar: Bar) -> Result:
    journal = options.output / f"{options.name or ACCURACY.name}.runs.jsonl"
    try:
        if options.together:
            return together({name: read(name, options.output) for name in options.together})
        return (search.search if options.search else accuracy.measure)(plan, journal, progress=bar)
    except (FloraError, ValueError) as error:  # of the model, or of what it is to learn
        sys.exit(f"python -m benchmarks accuracy: {error}")


def _view(result: Mapping[str, Any]) -> ModuleType:
    if "searches" in result:
        return together_view
    return search_view if "choice" in result else view


ACCURACY = Command(
    name="accuracy",
    help="LoRA, FFBA adapters and full fine-tuning compared",
    options=_add,
    measure=_measure,
    title="Accuracy at equal budgets",
    text="LoRA, FFBA adapters and, as a ceiling, full fine-tuning; each adapter has the largest rank that the budget "
    "buys, and a scaling of 2.",
    sheets=lambda result: _view(result).sheets(result),
    draw=lambda result, path: _view(result).draw(result, path),
    setup=lambda result: _view(result).setup(result),
    asked=_plan,
)
