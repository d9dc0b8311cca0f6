"""The command line of the suites."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from flora_fx.errors import FloraError, MissingExtraError, require
from flora_fx.progress import Bar, bars

from .accuracy import accuracy, search, search_view, together_view
from .accuracy import data as accuracy_data
from .accuracy import view as accuracy_view
from .accuracy.methods import FULL, METHODS, VARIANTS
from .accuracy.model import Pretraining
from .accuracy.plan import Plan
from .accuracy.recipe import Recipe
from .accuracy.sequence import SEQUENCE
from .accuracy.text.suite import TEXT
from .accuracy.together import together
from .adapters import adapters
from .contenders.onnx_exports import GRAPHS
from .contenders.settings import DTYPES, PROJECTIONS, SHAPES, Settings
from .contenders.torch_contenders import LIVE, RUNNERS
from .generation import capacity, generation
from .gpu import PHASES
from .kernels import kernels
from .latency import goals, latency
from .latency import view as latency_view
from .quantized import quantized
from .quantized import view as quantized_view
from .scaling import exporting, forms, fusing, large, scaling
from .show.page import Chapter, setup, write_page
from .show.results import RECORD, read, save
from .show.sheet import Sheet
from .training import training

__all__ = ["chapters", "main", "parser"]

Options = argparse.Namespace
Result = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Run one suite.

    Args:
        arguments: what was typed after ``python -m benchmarks``.

    Raises:
        SystemExit: 2 for arguments that make no sense, 1 for a GPU section that failed, or a model that does not load.
    """
    arguments_of = parser()
    options = arguments_of.parse_args(arguments)
    command = f"python -m benchmarks {shlex.join(_repeatable(arguments))}"
    if options.suite == "page":
        print(f"written to {write_page(chapters(RECORD))}")
        return
    if options.suite == "gpu":
        try:
            status = PHASES[options.phase].run(
                options.folder
                or Path(tempfile.gettempdir(), "flora-gpu-rehearsal" if options.rehearse else "flora-gpu"),
                minutes=options.minutes,
                rehearse=options.rehearse,
                only=options.sections,
            )
        except ValueError as error:
            arguments_of.error(str(error))
        sys.exit(status)
    try:
        settings = _plan(options) if options.suite == "accuracy" else _settings(options)
    except (ValueError, OSError) as error:
        arguments_of.error(str(error))
    console = require("rich.console", "cli").Console
    with bars(console(stderr=True)) as bar:
        result = _SUITES[options.suite](settings, options, bar)
    name = options.name or options.suite
    path = save(name, result, options.output, command)
    for sheet in SHEETS[options.suite](result):
        console(width=200).print(sheet.rich())
    print(f"written to {path}")
    try:
        if draw := PICTURES.get(options.suite):
            for picture in draw(result, options.output / name):
                print(f"drawn to {picture}")
    except MissingExtraError as error:
        print(error, file=sys.stderr)


def _repeatable(arguments: Sequence[str]) -> list[str]:
    """What repeats a measurement elsewhere: all but where its files went.

    >>> _repeatable(["latency", "--output", "/home/me/out", "--rounds", "3", "--output=here"])
    ['latency', '--rounds', '3']
    """
    places = {index + 1 for index, argument in enumerate(arguments) if argument == "--output"}
    return [a for index, a in enumerate(arguments) if index not in places and a.partition("=")[0] != "--output"]


def _settings(options: Options) -> Settings:
    """What all suites but one measure.

    Raises:
        ValueError: an option makes no sense.
    """
    settings = Settings(
        **{name: getattr(options, name) for name in ("shape", "layers", "dtype", "rank", "batch", "threads")},
        targets=tuple(options.targets),
        device=options.device,
    )
    _check(options)
    if options.suite == "training":
        training.check(settings)
    return settings


_ACCURACY = {suite.name: suite for suite in (SEQUENCE, TEXT)}


def _plan(options: Options) -> Plan:
    """What the accuracy suite compares.

    Raises:
        ValueError: an option, or a line of the data, makes no sense.
        OSError: the data cannot be read.
    """
    suite = _ACCURACY[options.of]
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
        rows=tuple(accuracy_data.read(options.data)) if options.data else (),
        workers=options.workers,
    )


def _accuracy(plan: Plan, options: Options, bar: Bar) -> Result:
    journal = options.output / f"{options.name or options.suite}.runs.jsonl"
    try:
        if options.together:
            return together({name: read(name, options.output) for name in options.together})
        return (search.search if options.search else accuracy.measure)(plan, journal, progress=bar)
    except (FloraError, ValueError) as error:  # of the model, or of what it is to learn
        sys.exit(f"python -m benchmarks accuracy: {error}")


def _accuracy_view(result: Mapping[str, Any]) -> ModuleType:
    if "searches" in result:
        return together_view
    return search_view if "choice" in result else accuracy_view


def _latency(settings: Settings, options: Options, bar: Bar) -> Result:
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


def _decoder(settings: Settings, options: Options, bar: Bar) -> Result:
    return latency.measure(
        settings,
        runners=("onnxruntime",),
        prompts=options.prompts,
        new=options.new,
        rounds=options.rounds,
        processes=options.processes,
        contenders=options.contenders or tuple(dict.fromkeys((*goals.CONTENDERS[settings.device], options.reference))),
        reference=options.reference,
        peers=goals.peers(settings.device),
        progress=bar,
    )


def _generation(settings: Settings, options: Options, bar: Bar) -> Result:
    return generation.measure(
        settings,
        prompt=options.prompts[0],
        new=options.new,
        rounds=options.rounds,
        processes=options.processes,
        swaps=options.swaps,
        progress=bar,
    )


def _training(settings: Settings, options: Options, bar: Bar) -> Result:
    return training.measure(settings, rounds=options.rounds, sequence=options.sequence, progress=bar("training"))


def _scaling(settings: Settings, options: Options, bar: Bar) -> Result:
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


def _capacity(settings: Settings, options: Options, bar: Bar) -> Result:
    return capacity.measure(
        settings,
        batches=options.batches,
        prompt=options.prompts[0],
        new=options.new,
        seconds=options.seconds,
        progress=bar,
    )


def _large(settings: Settings, options: Options, bar: Bar) -> Result:
    return large.measure(settings, rounds=options.rounds, progress=bar("fuse"))


def _forms(settings: Settings, options: Options, bar: Bar) -> Result:
    return forms.measure(
        settings,
        ranks=options.ranks,
        tokens=options.tokens,
        rounds=options.rounds,
        sequence=options.sequence,
        progress=bar,
    )


def _adapters(settings: Settings, options: Options, bar: Bar) -> Result:
    return adapters.measure(
        settings,
        adapters=options.adapters,
        batches=options.batches,
        grid=options.grid,
        prompt=options.prompts[0],
        rounds=options.rounds,
        progress=bar,
    )


def _export(settings: Settings, options: Options, bar: Bar) -> Result:
    return exporting.measure(settings, depths=options.depths, rounds=options.rounds, progress=bar("export"))


def _quantized(settings: Settings, options: Options, bar: Bar) -> Result:
    return quantized.measure(
        settings,
        pretraining=Pretraining(hidden=128, steps=options.pretraining_steps),
        recipe=Recipe(options.steps),
        prompt=options.prompts[0],
        rounds=options.rounds,
        progress=bar,
    )


def _kernels(settings: Settings, options: Options, bar: Bar) -> Result:
    return kernels.measure(
        settings, runners=options.runners, variants=options.variants, prompt=options.prompts[0], progress=bar("kernels")
    )


_SUITES: dict[str, Callable[[Any, Options, Bar], Result]] = {
    "latency": _latency,
    "decoder": _decoder,
    "generation": _generation,
    "capacity": _capacity,
    "layouts": _latency,
    "training": _training,
    "scaling": _scaling,
    "forms": _forms,
    "large": _large,
    "adapters": _adapters,
    "export": _export,
    "quantized": _quantized,
    "kernels": _kernels,
    "accuracy": _accuracy,
}

SHEETS: dict[str, Callable[[Mapping[str, Any]], Sequence[Sheet]]] = {
    "latency": latency_view.sheets,
    "decoder": lambda result: [*latency_view.sheets(result), *goals.sheets(result)],
    "generation": generation.sheets,
    "capacity": capacity.sheets,
    "layouts": latency_view.sheets,
    "training": training.sheets,
    "scaling": lambda result: [*scaling.sheets(result), *fusing.sheets(result)],
    "forms": forms.sheets,
    "large": large.sheets,
    "adapters": adapters.sheets,
    "export": exporting.sheets,
    "quantized": quantized_view.sheets,
    "kernels": kernels.sheets,
    "accuracy": lambda result: _accuracy_view(result).sheets(result),
}

PICTURES: dict[str, Callable[[Mapping[str, Any], Path], Sequence[Path]]] = {
    "latency": latency_view.draw,
    "decoder": latency_view.draw,
    "scaling": scaling.draw,
    "adapters": adapters.draw,
    "accuracy": lambda result, path: _accuracy_view(result).draw(result, path),
}

SETUPS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "accuracy": lambda result: _accuracy_view(result).setup(result),
    "quantized": quantized_view.setup,
}
"""Of the suites that do not measure `Settings` alone."""

TITLES = {
    "latency": ("Latency", "TTFT, TPOT and total latency of every form of the model under every runner."),
    "decoder": (
        "The exported decoder",
        "Our graphs beside the onnxruntime-genai builder's and the transformers exporter's, and what was to be shown. "
        "Ours and the builder's have one buffer per layer for past and present, the others a cache that grows. Each "
        "process loads them in another order: where in memory weights lie moves a token by some percent.",
    ),
    "generation": (
        "Generation",
        "Whole loops on an exported directory, from `load` and from onnxruntime-genai: tokens are chosen, not given. "
        "Then what of a token is our Python, and swaps of the adapter between generations.",
    ),
    "capacity": (
        "Capacity",
        "Replicas of the exported decoder on all cores of a host, each with requests one after the other, and the "
        "hosts that a load takes; docs/serving.md says how to put them behind a load balancer.",
    ),
    "layouts": ("Forms of the fused graph", "Every form that `FuseConfig` can write; all graphs are captured."),
    "training": ("Training step", "Forward, backward and AdamW on A and B; the same losses and gradients are checked."),
    "scaling": ("Scaling", "TPOT with one setting varied at a time, and what `fuse` itself takes."),
    "forms": (
        "Forms of an up-projection",
        "Through the backend under Inductor, live models: `addmm`, a GEMM and an `add`, or `unrolled`, a product and a "
        "sum. With one token on a CPU all products are loops already.",
    ),
    "adapters": (
        "Many adapters in one batch",
        "Rows that have adapters of their own, which take turns: a token of all rows, beside PEFT's `adapter_names` "
        "and beside the base.",
    ),
    "large": ("A model of 70B parameters", "Fused without its weights: shapes are all that the passes read."),
    "export": (
        "Export",
        "What an export takes, beside the onnxruntime-genai builder's, from the same checkpoint and adapter: whole "
        "commands, with Python's start and all imports. Layers that are alike are traced once, so time hardly grows "
        "with them.",
    ),
    "quantized": (
        "A base in few bits",
        "A QLoRA as it was trained, its adapter live, beside what else may be done with it; docs/qlora.md says how.",
    ),
    "kernels": (
        "Kernels per decoder layer",
        "Counted, not timed: what one more layer adds to a call. `cuda-code` is what Inductor writes for an H100, with "
        "attention spelled out; nothing of it ran.",
    ),
    "accuracy": (
        "Accuracy at equal budgets",
        "LoRA, FFBA adapters and, as a ceiling, full fine-tuning; each adapter has the largest rank that the budget "
        "buys, and a scaling of 2.",
    ),
}


def chapters(record: Path) -> dict[str, Chapter]:
    """What the page is made of: ``SUITE.json``, then ``SUITE-anything.json``, then what a GPU host left."""
    found = {}
    for gpu_host, suite in itertools.product(("", "gpu-"), TITLES):
        title, text = TITLES[suite]
        for name in (f"{gpu_host}{suite}", *sorted(file.stem for file in record.glob(f"{gpu_host}{suite}-*.json"))):
            if detail := name.removeprefix(gpu_host).removeprefix(suite).replace("-", " "):
                heading = f"{title}:{detail}"
            else:
                heading = title
            draw = PICTURES.get(suite, lambda result, path: ())
            heading = f"GPU: {heading}" if gpu_host else heading
            found[name] = Chapter(heading, text, SHEETS[suite], draw, SETUPS.get(suite, setup))
    return found


def _check(options: Options) -> None:
    """Refuse what the settings do not cover.

    Raises:
        ValueError: an option makes no sense.
    """
    known = [*(kernels.RUNNERS if options.suite == "kernels" else RUNNERS), "onnxruntime"]
    for runner in (*getattr(options, "runners", ()), *filter(None, [getattr(options, "runner", None)])):
        if runner not in known:
            raise ValueError(f"unknown runner {runner!r}; it must be one of {', '.join(known)}")
    contenders = getattr(options, "contenders", ())
    named = {*GRAPHS, *LIVE, *itertools.chain(*RUNNERS.values())}
    for contender in (*contenders, *filter(None, [getattr(options, "reference", None)])):
        if contender not in named:
            raise ValueError(f"unknown contender {contender!r}; it must be one of {', '.join(sorted(named))}")
    if unknown := set(getattr(options, "variants", ())) - {
        *itertools.chain(*(r.variants for r in kernels.RUNNERS.values()))
    }:
        raise ValueError(f"unknown variant {min(unknown)!r}; `python -m benchmarks kernels --help` lists them")
    if hasattr(options, "reference"):
        _check_reference(options.reference, contenders, getattr(options, "runners", ["onnxruntime"]))
    for name in ("rounds", "processes", "new", "sequence", "swaps", "seconds"):
        least = 0 if (options.suite, name) == ("forms", "sequence") else 1
        if getattr(options, name, least) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    for name in ("runners", "prompts", "tokens", *(["batches"] if options.suite in ("capacity", "adapters") else [])):
        if not getattr(options, name, True):
            raise ValueError(f"--{name} names none")


def _check_reference(reference: str, contenders: Sequence[str], runners: Sequence[str]) -> None:
    if contenders and reference not in contenders:
        raise ValueError(f"--contenders must have {reference} among them: ratios are taken to it")
    if reference in LIVE and not contenders:
        raise ValueError(f"--reference is {reference}, which takes part only if --contenders names it")
    for runner in runners:
        if reference not in ({*GRAPHS, *LIVE} if runner == "onnxruntime" else RUNNERS[runner]):
            raise ValueError(f"--reference is {reference}, and {runner} has none")


def parser() -> argparse.ArgumentParser:
    """The suites and their options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    suites = top.add_subparsers(dest="suite", required=True)
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "--output",
        type=Path,
        default=RECORD,
        help="folder for JSON and pictures (%(default)s)",
    )

    def model(layers: int = 0) -> argparse.ArgumentParser:  # anew each time: parsers share their parents' defaults
        model = argparse.ArgumentParser(add_help=False, parents=[output])
        model.add_argument("--name", help="of the JSON file; the suite's by default")
        model.add_argument("--shape", default="smollm-135m", help=f"one of {', '.join(SHAPES)} (%(default)s)")
        model.add_argument(
            "--layers", type=int, default=layers, help="cut to so many decoder layers (%(default)s; 0: all)"
        )
        model.add_argument("--dtype", default="float32", help=f"one of {', '.join(DTYPES)} (%(default)s)")
        model.add_argument("--rank", type=int, default=16, help="of the LoRA (%(default)s)")
        model.add_argument("--targets", type=_names, default=PROJECTIONS, help="adapted projections, with commas (all)")
        model.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
        model.add_argument("--threads", type=int, default=2, help="CPU threads and cores (%(default)s)")
        model.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
        return model

    turns = argparse.ArgumentParser(add_help=False)
    turns.add_argument(
        "--contenders", nargs="+", default=(), metavar="NAME", help="only these, the reference among them"
    )
    layouts = ["forms-eager", "forms-inductor"]
    for name, runners, text in (
        ("latency", ["eager", "inductor", "onnxruntime"], "TTFT, TPOT and total latency beside every peer"),
        ("layouts", layouts, "the same for every form of a fused graph"),
    ):
        suite = suites.add_parser(name, parents=[model(), turns], help=text)
        known = ", ".join([*RUNNERS, "onnxruntime"])
        suite.add_argument("--runners", type=_names, default=runners, help=f"with commas, of: {known}")
        suite.add_argument("--reference", default="base", help="contender that ratios are taken to (%(default)s)")
        _passes(suite, prompts=[128, 1024], new=64, rounds=30, processes=3)

    suite = suites.add_parser(
        "decoder", parents=[model(layers=4), turns], help="exported graphs beside other exporters'"
    )
    suite.add_argument("--reference", default="base (genai)", help="contender that ratios are taken to (%(default)s)")
    _passes(suite, prompts=[128], new=16, rounds=80, processes=8)

    suite = suites.add_parser("generation", parents=[model(layers=4)], help="whole loops from an export, and swaps")
    suite.add_argument("--swaps", type=int, default=100, help="of the adapter (%(default)s)")
    _passes(suite, prompts=[128], new=32, rounds=40, processes=8)

    suite = suites.add_parser("capacity", parents=[model()], help="what a host serves, and the hosts a load takes")
    suite.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8], help="requests answered together (1,2,4,8)")
    suite.add_argument("--prompts", type=_numbers, default=[128], help="prompt length (128)")
    suite.add_argument("--new", type=int, default=64, help="tokens of an answer (%(default)s)")
    suite.add_argument("--seconds", type=float, default=10.0, help="that each arrangement is measured (%(default)s)")

    suite = suites.add_parser("training", parents=[model()], help="time and peak memory of a training step")
    suite.add_argument("--sequence", type=int, default=128, help="tokens per sequence (%(default)s)")
    suite.add_argument("--rounds", type=int, default=30, help="steps by each contender (%(default)s)")

    suite = suites.add_parser("scaling", parents=[model()], help="cost against rank, batch and depth; fuse time")
    suite.add_argument("--runner", default="eager", help="one of those of latency (%(default)s)")
    suite.add_argument("--ranks", type=_numbers, default=scaling.AXES["rank"], help="with commas; empty for none")
    suite.add_argument("--batches", type=_numbers, default=scaling.AXES["batch"], help="likewise")
    suite.add_argument("--depths", type=_numbers, default=scaling.AXES["layers"], help="likewise")
    suite.add_argument("--prompts", type=_numbers, default=[128], help="prompt length (128)")
    suite.add_argument("--new", type=int, default=16, help="tokens after the prompt (%(default)s)")
    suite.add_argument("--rounds", type=int, default=6, help="generations by each contender (%(default)s)")

    suite = suites.add_parser("adapters", parents=[model(layers=4)], help="rows that have adapters of their own")
    suite.add_argument("--adapters", type=_numbers, default=adapters.ADAPTERS, help="with commas (1,2,4,8,16,32)")
    suite.add_argument("--batches", type=_numbers, default=adapters.BATCHES, help="rows, with commas (1,4,8,16)")
    suite.add_argument("--grid", action="store_true", help="all pairs, not each with 8 of the other")
    suite.add_argument("--prompts", type=_numbers, default=[32], help="prompt length (32)")
    suite.add_argument("--rounds", type=int, default=30, help="tokens of each (%(default)s)")

    suite = suites.add_parser("forms", parents=[model(layers=4)], help="up-projections through the backend, each form")
    suite.add_argument("--ranks", type=_numbers, default=forms.RANKS, help="with commas (8,16,32,64)")
    suite.add_argument("--tokens", type=_numbers, default=forms.TOKENS, help="of a forward (1,128,512)")
    suite.add_argument("--rounds", type=int, default=20, help="forwards by each contender (%(default)s)")
    suite.add_argument("--sequence", type=int, default=128, help="of a training step; 0: none (%(default)s)")

    suite = suites.add_parser("large", parents=[model()], help="fuse on a graph too large for this machine's memory")
    suite.set_defaults(shape="llama-3.1-70b", dtype="bfloat16")
    suite.add_argument("--rounds", type=int, default=3, help="fuses (%(default)s)")

    suite = suites.add_parser("export", parents=[model()], help="time and memory of an export, beside the builder's")
    suite.add_argument("--depths", type=_numbers, default=[], help="in layers, with commas (a third of all, and all)")
    suite.add_argument("--rounds", type=int, default=3, help="exports by each, at each depth (%(default)s)")

    suite = suites.add_parser("quantized", parents=[model(layers=4)], help="a base in few bits: size, error, tokens")
    suite.add_argument("--steps", type=int, default=600, help="of training the adapter (%(default)s)")
    suite.add_argument("--pretraining-steps", type=int, default=1500, help="of the small model (%(default)s)")
    suite.add_argument("--prompts", type=_numbers, default=[128], help="prompt length (128)")
    suite.add_argument("--rounds", type=int, default=80, help="tokens that are timed (%(default)s)")

    suite = suites.add_parser("kernels", parents=[model()], help="launches per decoder layer, counted")
    counted = [*kernels.RUNNERS, "onnxruntime"]
    suite.add_argument("--runners", type=_names, default=counted, help=f"separated by commas, of: {', '.join(counted)}")

    variants = dict.fromkeys(itertools.chain.from_iterable(runner.variants for runner in kernels.RUNNERS.values()))
    only = f"only these, of: {', '.join(variants)}"
    suite.add_argument("--variants", nargs="+", default=(), metavar="NAME", help=only)
    suite.add_argument("--prompts", type=_numbers, default=[128], help="prompt length (128)")

    suite = suites.add_parser("accuracy", parents=[output], help="LoRA, FFBA adapters and full fine-tuning compared")
    suite.add_argument("--name", help="of the JSON file; the suite's by default")
    named = "; ".join([FULL, *METHODS, *VARIANTS])
    suite.add_argument(
        "--suite", dest="of", choices=_ACCURACY, default=SEQUENCE.name, help="the tasks, and their model (%(default)s)"
    )
    suite.add_argument(
        "--search", action="store_true", help="choose variants on half of the tasks, report on the other half"
    )
    suite.add_argument(
        "--together",
        nargs="+",
        default=(),
        metavar="NAME",
        help="no training: what these searches' records say together",
    )
    suite.add_argument("--methods", nargs="+", default=(), metavar="NAME", help=f"of: {named} (the suite's)")
    suite.add_argument("--tasks", nargs="+", default=(), metavar="NAME", help="only these, as they are")
    suite.add_argument("--budgets", type=_numbers, help=f"as ranks of a LoRA ({_defaults('budgets')})")
    suite.add_argument("--rates", type=_rates, help="learning rates, with commas (the suite's)")
    suite.add_argument("--seeds", type=int, help=f"at the best rate ({_defaults('seeds')})")
    suite.add_argument(
        "--until", type=float, default=0.0, help="add seeds until every 95%% interval is within ± so many points"
    )
    suite.add_argument("--most-seeds", type=int, default=Plan.most_seeds, help="that there may be then (%(default)s)")
    suite.add_argument("--tuning-seeds", type=int, help=f"per rate ({_defaults('tuning_seeds')})")
    suite.add_argument("--steps", type=int, help="of fine-tuning (the suite's)")
    suite.add_argument("--batch", type=int, help="examples of a step (the suite's)")
    suite.add_argument(
        "--pretraining-steps", type=int, default=Pretraining.steps, help="of the small model (%(default)s)"
    )
    suite.add_argument("--model", help="a causal language model instead of the small one: directory or Hub id")
    suite.add_argument("--data", type=Path, help="for it: JSONL with task, split, prompt and answer in each line")
    suite.add_argument("--workers", type=int, default=0, help="processes of one thread (one per core, or per GPU)")
    suite.add_argument("--device", default=Recipe.device, help="cpu or cuda (%(default)s)")

    suite = suites.add_parser("gpu", help="all that a GPU host should run, in two phases")
    suite.add_argument("phase", choices=PHASES, help="first prepare, then measure")
    suite.add_argument("--folder", type=Path, help="of both phases (flora-gpu, in the folder of temporary files)")
    suite.add_argument("--sections", nargs="+", default=(), metavar="NAME", help="only these")
    minutes = ", ".join(f"{phase.minutes:g} to {name}" for name, phase in PHASES.items())
    suite.add_argument("--minutes", type=float, help=f"in all ({minutes})")
    suite.add_argument("--rehearse", action="store_true", help="the same sections, tiny and on the CPU")

    suites.add_parser("page", help="write docs/benchmarks.md from the JSON of record")
    return top


def _defaults(name: str) -> str:
    """What the suites have for an option."""
    values = {suite.name: getattr(suite, name) for suite in _ACCURACY.values()}
    listed = {of: ",".join(map(str, value)) if isinstance(value, tuple) else value for of, value in values.items()}
    return "; ".join(f"{of}: {value}" for of, value in listed.items())


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rates(text: str) -> list[float]:
    return [float(number) for number in _names(text)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def _passes(suite: argparse.ArgumentParser, *, prompts: list[int], new: int, rounds: int, processes: int) -> None:
    lengths = ",".join(map(str, prompts))
    suite.add_argument("--prompts", type=_numbers, default=prompts, help=f"prompt lengths ({lengths})")
    suite.add_argument("--new", type=int, default=new, help="tokens after the prompt (%(default)s)")
    suite.add_argument("--rounds", type=int, default=rounds, help="generations by each contender (%(default)s)")
    suite.add_argument("--processes", type=int, default=processes, help="spread over so many processes (%(default)s)")
