"""flora-fx: inspect, export, generate, doctor, demo, bench.

Results go to stdout, alone and as JSON with ``--json``; progress and errors go to stderr. What the exit codes mean is
in `flora_fx.commands.ending`, and what each command does in the files beside it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

from flora_fx import __version__
from flora_fx.checkout import checkout
from flora_fx.commands.ending import CODES, MISSING, Outcome, ending
from flora_fx.commands.leaving import leaving
from flora_fx.commands.stages import uncollected
from flora_fx.commands.waiting import wait_asleep
from flora_fx.errors import FloraError, MissingExtraError, require
from flora_fx.tasks import Task

# No `from __future__ import annotations` here: typer reads the annotations below, and typer itself is
# imported only when the command line is built, torch only when a command runs: help and version wait for neither.
if TYPE_CHECKING:
    import typer

__all__ = ["build_app", "main"]


_TABLES = 80
"""Columns from which on help stands in tables."""


class DType(StrEnum):
    """Names of the dtypes that an export can be written in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Target(StrEnum):
    """Names of the ways to export a causal LM."""

    auto = "auto"
    decoder = "decoder"
    general = "general"


class Verify(StrEnum):
    """Names of the ways to compare an export with its model."""

    auto = "auto"
    full = "full"
    quick = "quick"
    none = "none"


class Base(StrEnum):
    """Names of what may become of a quantized base."""

    auto = "auto"
    keep = "keep"
    dequantize = "dequantize"
    float = "float"


class Activations(StrEnum):
    """Names of what its operators multiply with."""

    exact = "exact"
    int8 = "int8"


def main() -> None:
    """The entry point of ``flora-fx``; the process ends with it."""
    try:
        app = build_app()
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    with leaving():
        app()


def build_app() -> "typer.Typer":
    """The command line as a typer application.

    Raises:
        MissingExtraError: typer or rich is not installed.

    >>> sorted(command.name for command in build_app().registered_commands)
    ['bench', 'demo', 'doctor', 'export', 'generate', 'inspect']
    """
    require("typer", "cli")
    require("rich", "cli")
    import typer

    app = typer.Typer(
        name="flora-fx",
        help="Fuse adapters (LoRA, FFBA) into the projections of their base model.",
        epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in CODES.items())}.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        # A narrow table cuts words; plain help wraps them.
        rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _TABLES else None,
    )
    model_option = typer.Option("-m", "--model", help="Directory or Hub id of the base model.")
    adapter_option = typer.Option("-a", "--adapter", help="Directory or Hub id of the adapter (LoRA or FFBA).")
    output_option = typer.Option("-o", "--output", help="The directory to write.")
    json_option = typer.Option("--json", help="Print JSON alone on stdout, an error too.")
    own = "The model's own, if left out."
    tasks = ", ".join(get_args(Task))

    def known_task(task: str) -> str:
        if task not in get_args(Task):
            raise typer.BadParameter(f"{task!r} is none of {tasks}")
        return task

    task_option = typer.Option(
        "--task",
        callback=known_task,
        help="What the model is for, which decides its head: one of those below. auto: what the adapter was trained "
        "for, else what config.json names.",
    )
    tasks_below = f"Tasks: {tasks}."  # not in the column beside the option, which narrow terminals cut
    inputs_option = typer.Option(
        "--inputs", help="Safetensors file of example inputs by name, batch first; made up, if left out."
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"flora-fx {__version__}")
            raise typer.Exit

    @app.callback()
    def _root(
        version: Annotated[
            bool, typer.Option("-V", "--version", callback=show_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    @app.command("inspect", help="Show what would fuse, what would not, and why.", epilog=tasks_below)
    def _inspect(
        model: Annotated[str, model_option],
        adapter: Annotated[str, adapter_option],
        task: Annotated[str, task_option] = "auto",
        inputs: Annotated[Path | None, inputs_option] = None,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with uncollected(), ending(_flags(app), as_json=as_json) as outcome:
            wait_asleep()
            from flora_fx.commands.inspecting import inspect

            report = inspect(model, adapter, cast(Task, task), inputs)
            outcome.document.update(report.to_dict())
            if not as_json:
                typer.echo(str(report))

    @app.command("export", help="Write a fused ONNX directory for ONNX Runtime.", epilog=tasks_below)
    def _export(
        model: Annotated[str, model_option],
        output: Annotated[Path, output_option],
        adapter: Annotated[
            list[str] | None,
            typer.Option(
                "-a",
                "--adapter",
                help="Directory or Hub id of the adapter; the base alone, if left out. NAME=… of several: each row of "
                "a batch chooses one when it runs.",
            ),
        ] = None,
        dtype: Annotated[
            DType,
            typer.Option("--dtype", help="What the weights are written in."),
        ] = DType.float32,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
        target: Annotated[
            Target,
            typer.Option(
                "--target",
                help="Of a causal LM. decoder: attention is GroupQueryAttention, for ONNX Runtime and "
                "onnxruntime-genai; general: plain ONNX operators; auto: decoder where the model's attention is such.",
            ),
        ] = Target.auto,
        hot_swap: Annotated[
            bool, typer.Option("--hot-swap", help="Let another LoRA take the place of this one when it runs.")
        ] = False,
        base: Annotated[
            Base,
            typer.Option(
                "--base",
                help="Of a quantized base. keep: in operators of its own; dequantize: few bits in the file, plain "
                "weights once it is loaded; float: plain weights; auto: kept where MatMulNBits can, else dequantized.",
            ),
        ] = Base.auto,
        activations: Annotated[
            Activations,
            typer.Option("--activations", help="What a kept base is multiplied with; int8 is faster, and not exact."),
        ] = Activations.exact,
        slots: Annotated[
            int | None,
            typer.Option(
                "--slots",
                min=1,
                help="So many places for LoRAs, which can be filled when it runs. The adapters alone, which then stay, "
                "if left out.",
            ),
        ] = None,
        rank: Annotated[
            int | None, typer.Option("--rank", min=1, help="Of every slot; the adapters' highest, if left out.")
        ] = None,
        verify: Annotated[
            Verify,
            typer.Option(
                "--verify",
                help="How the result is compared with PyTorch. full: as it will run; quick: a causal LM on a CPU part "
                "by part, in little memory, without greedy tokens; none: not at all; auto: quick for weights of more "
                "than 2 GiB.",
            ),
        ] = Verify.auto,
        task: Annotated[str, task_option] = "auto",
        tokenizer: Annotated[
            str | None,
            typer.Option(
                "--tokenizer",
                help="Directory or Hub id of the tokenizer; the adapter's, else the model's, if left out.",
            ),
        ] = None,
        inputs: Annotated[Path | None, inputs_option] = None,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with uncollected(), ending(_flags(app), as_json=as_json) as outcome:
            wait_asleep()
            import torch

            from flora_fx.commands.exporting import export
            from flora_fx.commands.inspecting import read_inputs

            options = {
                "dtype": getattr(torch, dtype.value),
                "overwrite": overwrite,
                "target": None if target is Target.auto else target.value,
                "hot_swap": hot_swap,
                "base": None if base is Base.auto else base.value,
                "activations": activations.value,
                **{name: value for name, value in (("slots", slots), ("rank", rank)) if value is not None},
                "verify": None if verify is Verify.auto else verify.value,
            }
            if inputs is not None:
                options["example_inputs"] = read_inputs(inputs, options["dtype"])
            result = export(model, adapter or (), output, options, outcome, task=cast(Task, task), tokenizer=tokenizer)
            if not as_json:
                typer.echo(str(result))

    @app.command("generate", help="Continue a prompt with an exported directory.")
    def _generate(
        directory: Annotated[Path, typer.Option("-d", "--directory", help="What `flora-fx export` wrote.")],
        adapter: Annotated[
            Path | None,
            typer.Option(
                "-a",
                "--adapter",
                help="Another LoRA, for an export with --hot-swap; the one that was exported, if left out. Of an "
                "export with several the name of one, or a further one; the base alone, if left out.",
            ),
        ] = None,
        prompt: Annotated[
            str | None, typer.Option("-p", "--prompt", help="Text to continue; --token-ids, if left out.")
        ] = None,
        token_ids: Annotated[
            str | None, typer.Option("--token-ids", help="Token ids to continue, as in 3,14,15; --prompt, if left out.")
        ] = None,
        max_new_tokens: Annotated[
            int, typer.Option("-n", "--max-new-tokens", min=1, help="At most so many new tokens.")
        ] = 64,
        temperature: Annotated[
            float | None,
            typer.Option("--temperature", min=0.0, help=f"Above 0: sample; 0 takes the likeliest token. {own}"),
        ] = None,
        top_k: Annotated[
            int | None,
            typer.Option("--top-k", min=0, help=f"Sample among so many likeliest tokens; 0: all. {own}"),
        ] = None,
        top_p: Annotated[
            float | None,
            typer.Option(
                "--top-p",
                min=0.0,
                max=1.0,
                help=f"Sample among the likeliest that have this share together. {own}",
            ),
        ] = None,
        min_p: Annotated[
            float | None,
            typer.Option(
                "--min-p",
                min=0.0,
                max=1.0,
                help=f"Sample among those with this share of the likeliest token's probability. {own}",
            ),
        ] = None,
        repetition_penalty: Annotated[
            float | None,
            typer.Option("--repetition-penalty", min=0.0, help=f"Above 1: repeats itself less. {own}"),
        ] = None,
        stop: Annotated[
            list[str] | None,
            typer.Option("--stop", help="Text that ends the continuation; may be repeated. No text, if left out."),
        ] = None,
        seed: Annotated[int, typer.Option("--seed", help="Of what is drawn in sampling.")] = 0,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with ending(_flags(app), as_json=as_json) as outcome:
            if (prompt is None) is (token_ids is None):
                raise typer.BadParameter("pass either --prompt or --token-ids")
            from flora_fx.commands.generating import generate

            told = {
                "do_sample": None if temperature is None else temperature > 0,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "stop_strings": stop,
            }
            options = {name: value for name, value in told.items() if value is not None}
            options |= {"max_new_tokens": max_new_tokens, "seed": seed}
            generate(directory, adapter, prompt, token_ids, options, outcome, silent=as_json)

    @app.command(
        "doctor", help="Show versions, devices, what is installed and what will be used: to paste in a report."
    )
    def _doctor(as_json: Annotated[bool, json_option] = False) -> None:
        with ending(_flags(app), as_json=as_json) as outcome:
            from flora_fx.commands.doctor import as_text, examine

            outcome.document.update(examine())
            if not as_json:
                typer.echo(as_text(outcome.document))

    @app.command("demo", help="Train a small model and an adapter, fuse, verify, export and measure them.")
    def _demo(
        output: Annotated[Path, output_option],
        fast: Annotated[bool, typer.Option("--fast", help="A few training steps: for tests.")] = False,
        quantized: Annotated[
            bool, typer.Option("--quantized", help="Train the adapter over a base in 4 bits, and deploy that.")
        ] = False,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with ending(_flags(app), as_json=as_json) as outcome:
            demo(output, outcome, fast=fast, quantized=quantized, as_json=as_json)

    @app.command(
        "bench",
        help="Measure TTFT, TPOT and total latency beside every peer: `python -m benchmarks latency`.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,  # the options, and the help on them, are those of the benchmarks
        hidden=checkout() is None,
    )
    def _bench(context: typer.Context) -> None:
        with ending({}, as_json=False):
            raise typer.Exit(bench(context.args))

    return app


def _flags(app: "typer.Typer") -> dict[str, str]:
    """Every flag that gives an argument of the Python API, by the argument's name."""
    import typer

    commands = getattr(typer.main.get_command(app), "commands", {}).values()
    own = {option.name: max(option.opts, key=len) for command in commands for option in command.params}
    return {**own, "adapters": own["adapter"], "example_inputs": own["inputs"], "stop_strings": own["stop"]}


def demo(output: Path, outcome: Outcome, *, fast: bool, quantized: bool, as_json: bool) -> None:
    """Run the demo and show what it found."""
    from rich.console import Console

    from flora_fx.commands.quiet import quiet
    from flora_fx.demo import run
    from flora_fx.demo.quantized import run_quantized, show_quantized
    from flora_fx.demo.table import show

    outcome.left = lambda: f"{output} holds what was made so far"
    quiet()
    make, tell = (run_quantized, show_quantized) if quantized else (run, show)
    outcome.document.update(make(output, fast=fast, console=Console(stderr=True)))
    if not as_json:
        tell(outcome.document, output, Console())


def bench(arguments: Sequence[str]) -> int:
    """Measure latency with a checkout's benchmarks, which are no part of the package.

    Args:
        arguments: of ``python -m benchmarks latency``.

    Returns:
        its exit code.

    Raises:
        FloraError: flora_fx runs from an installation.
    """
    folder = checkout()
    if folder is None:
        raise FloraError("the benchmarks are not installed: run `python -m benchmarks latency` in a checkout")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: not a folder of that name where the user stands
    command = [sys.executable, "-P", "-m", "benchmarks", "latency", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    main()
