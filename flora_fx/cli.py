"""flora-fx: inspect, export, generate, demo, bench.

Results go to stdout, alone and as JSON with ``--json``; progress and errors go to stderr. What a user can
repair is one red line and exit code 1; an extra that is not installed is exit code 2.
"""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

from flora_fx import __version__
from flora_fx.checkout import checkout
from flora_fx.errors import CaptureError, FloraError, MissingExtraError, require
from flora_fx.tasks import Task

# No `from __future__ import annotations` here: typer reads the annotations below, and typer itself is
# imported only when the command line is built, torch only when a command runs: help and version wait for neither.
if TYPE_CHECKING:
    import torch
    import typer

__all__ = ["build_app", "main"]


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


def main() -> None:
    """The entry point of ``flora-fx``."""
    try:
        app = build_app()
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    app()


def build_app() -> "typer.Typer":
    """The command line as a typer application.

    Raises:
        MissingExtraError: typer or rich is not installed.

    >>> sorted(command.name for command in build_app().registered_commands)
    ['bench', 'demo', 'export', 'generate', 'inspect']
    """
    require("typer", "cli")
    require("rich", "cli")
    import typer

    app = typer.Typer(
        name="flora-fx",
        help="Fuse adapters (LoRA, FFBA) into the projections of their base model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    model_option = typer.Option("--model", help="Directory or Hub id of the base model.")
    adapter_option = typer.Option("--adapter", help="Directory or Hub id of the adapter (LoRA or FFBA).")
    json_option = typer.Option("--json", help="Print JSON alone on stdout.")
    own = "The model's own, if left out."
    tasks = ", ".join(get_args(Task))

    def known_task(task: str) -> str:
        if task not in get_args(Task):
            raise typer.BadParameter(f"{task!r} is none of {tasks}")
        return task

    task_option = typer.Option(
        "--task",
        callback=known_task,
        help="What the model is for, which decides its head; auto: what the adapter was trained for, else what "
        f"config.json names. One of {tasks}.",
    )
    inputs_option = typer.Option(
        "--inputs", help="Safetensors file of example inputs by name, batch first, where none can be made up."
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"flora-fx {__version__}")
            raise typer.Exit

    @app.callback()
    def _root(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    @app.command("inspect", help="Show what would fuse, what would not, and why.")
    def _inspect(
        model: Annotated[str, model_option],
        adapter: Annotated[str, adapter_option],
        task: Annotated[str, task_option] = "auto",
        inputs: Annotated[Path | None, inputs_option] = None,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with _user_errors():
            report = inspect(model, adapter, cast(Task, task), inputs)
            typer.echo(report.to_json() if as_json else str(report))

    @app.command("export", help="Write a fused ONNX directory for ONNX Runtime.")
    def _export(
        model: Annotated[str, model_option],
        output: Annotated[Path, typer.Option("--output", help="The directory to write.")],
        adapter: Annotated[str | None, adapter_option] = None,
        dtype: Annotated[DType, typer.Option("--dtype", help="Of the weights.")] = DType.float32,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
        target: Annotated[
            Target, typer.Option("--target", help="Attention: GroupQueryAttention, or plain ONNX operators.")
        ] = Target.auto,
        hot_swap: Annotated[
            bool, typer.Option("--hot-swap", help="Let another LoRA take the place of this one when it runs.")
        ] = False,
        task: Annotated[str, task_option] = "auto",
        tokenizer: Annotated[
            str | None,
            typer.Option(
                "--tokenizer", help="Directory or Hub id of the tokenizer; else the adapter's or the model's."
            ),
        ] = None,
        inputs: Annotated[Path | None, inputs_option] = None,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with _user_errors():
            import torch

            options = {
                "dtype": getattr(torch, dtype.value),
                "overwrite": overwrite,
                "target": None if target is Target.auto else target.value,
                "hot_swap": hot_swap,
            }
            if inputs is not None:
                options["example_inputs"] = _read_inputs(inputs, options["dtype"])
            result = export(model, adapter, output, options, task=cast(Task, task), tokenizer=tokenizer)
            typer.echo(json.dumps(result, indent=2) if as_json else result["summary"])

    @app.command("generate", help="Continue a prompt with an exported directory.")
    def _generate(
        directory: Annotated[Path, typer.Option("--directory", help="What `flora-fx export` wrote.")],
        adapter: Annotated[
            Path | None, typer.Option("--adapter", help="Another LoRA, for an export with --hot-swap.")
        ] = None,
        prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
        token_ids: Annotated[
            str | None, typer.Option("--token-ids", help="Token ids to continue, as in 3,14,15.")
        ] = None,
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
        temperature: Annotated[
            float | None, typer.Option("--temperature", min=0.0, help=f"0 takes the likeliest token. {own}")
        ] = None,
        top_k: Annotated[int | None, typer.Option("--top-k", min=0, help=f"0 takes all. {own}")] = None,
        top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help=own)] = None,
        min_p: Annotated[
            float | None,
            typer.Option("--min-p", min=0.0, max=1.0, help=f"Of the likeliest token's probability. {own}"),
        ] = None,
        repetition_penalty: Annotated[
            float | None, typer.Option("--repetition-penalty", min=0.0, help=f"Above 1: repeats itself less. {own}")
        ] = None,
        stop: Annotated[
            list[str] | None, typer.Option("--stop", help="Text that ends the continuation; may be repeated.")
        ] = None,
        seed: Annotated[int, typer.Option("--seed")] = 0,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with _user_errors():
            if (prompt is None) is (token_ids is None):
                raise typer.BadParameter("pass either --prompt or --token-ids")
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
            generate(directory, adapter, prompt, token_ids, options, as_json=as_json)

    @app.command("demo", help="Train a small model and an adapter, fuse, verify, export and measure them.")
    def _demo(
        output: Annotated[Path, typer.Option("--output", help="The directory to write.")],
        fast: Annotated[bool, typer.Option("--fast", help="A few training steps: for tests.")] = False,
        as_json: Annotated[bool, json_option] = False,
    ) -> None:
        with _user_errors():
            demo(output, fast=fast, as_json=as_json)

    @app.command(
        "bench",
        help="Measure TTFT, TPOT and total latency beside every peer: `python -m benchmarks latency`.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        add_help_option=False,  # the options, and the help on them, are those of the benchmarks
        hidden=checkout() is None,
    )
    def _bench(context: typer.Context) -> None:
        with _user_errors():
            raise typer.Exit(bench(context.args))

    return app


# --- the commands -----------------------------------------------------------------------------------------


def inspect(model: str, adapter: str, task: Task = "auto", inputs: Path | None = None) -> Any:
    """Capture and fuse a checkpoint on inputs from a file, or made up: which ones does not matter to what fuses."""
    import torch

    import flora_fx
    from flora_fx.checkpoint import load_model
    from flora_fx.sample_inputs import sample_inputs

    with _working("loading", "capturing and fusing") as begin:
        loaded: Any = load_model(model, adapter, task=task)
        for config in (loaded.config, loaded.config.get_text_config()):
            config.use_cache = False  # a KV cache would only add outputs to the graph
        begin()
        try:
            named: dict[str, Any] = sample_inputs(loaded) if inputs is None else _read_inputs(inputs, loaded.dtype)
            with torch.no_grad():
                graph = flora_fx.capture(loaded, **named)
        except CaptureError as error:
            if inputs is not None:
                raise
            raise FloraError(
                f"{str(error).partition('Remedy:')[0].strip().rstrip('.')}. The inputs were made up; pass your own: "
                "--inputs FILE, written by safetensors.torch.save_file({name: tensor})"
            ) from error
        return flora_fx.report(flora_fx.fuse(graph))


def export(
    model: str,
    adapter: str | None,
    output: Path,
    options: dict[str, Any],
    *,
    task: Task = "auto",
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Write the fused ONNX directory and say what its own check found. Options are those of ``export_onnx``."""
    from flora_fx.checkpoint import load_model
    from flora_fx.export import export_onnx

    with _working("loading", "exporting and checking") as begin:
        loaded = load_model(model, adapter, task=task)
        chosen = _tokenizer(loaded, model, adapter, tokenizer)
        begin()
        result = export_onnx(loaded, output, tokenizer=chosen, **options)
    return {
        "directory": str(output),
        "max_abs_error": result.max_abs_error,
        "greedy_tokens_equal": result.greedy_tokens_equal,
        "target": result.target,
        "notes": list(result.notes),
        "summary": str(result),
    }


def generate(
    directory: Path,
    adapter: Path | None,
    prompt: str | None,
    token_ids: str | None,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Continue the prompt; text appears token by token, JSON at the end. Options are those of ``Decoder.stream``."""
    import torch

    from flora_fx.checkpoint import load_tokenizer
    from flora_fx.export import Decoder, load

    runner = load(directory)
    if adapter is not None:
        if not isinstance(runner, Decoder):
            raise FloraError(f"--adapter is for causal LMs exported with --hot-swap; {directory} is none")
        runner.load_adapter(adapter)
    tokenizer: Any = load_tokenizer(directory)
    if prompt is not None and tokenizer is None:
        raise FloraError(f"{directory} has no tokenizer; pass --token-ids instead of --prompt")
    if options.get("stop_strings") and tokenizer is None:
        raise FloraError(f"{directory} has no tokenizer, which --stop needs")
    ids = _parse_ids(token_ids) if token_ids is not None else tokenizer(prompt)["input_ids"]
    try:
        stream = runner.stream(torch.tensor([ids], dtype=torch.int64), tokenizer=tokenizer, **options)
    except ValueError as error:  # a token outside of the vocabulary, an empty prompt, a top_p of 0
        raise FloraError(str(error)) from error
    new: list[int] = []

    def tokens() -> Iterator[int]:
        for token in stream:
            new.append(int(token))
            yield new[-1]

    pieces = (f"{token} " for token in tokens()) if tokenizer is None else _pieces(tokenizer, tokens())
    text = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the last position: it is said in the end
        for piece in pieces:
            text += piece
            if not as_json:
                print(piece, end="", flush=True)
    (reason,) = stream.finish_reasons
    if as_json:
        text_or_none = None if tokenizer is None else text
        answer = {"prompt_ids": list(ids), "token_ids": new, "text": text_or_none, "finish_reason": reason}
        print(json.dumps(answer, indent=2))
    else:
        print()
        if reason == "positions":
            limit = runner.manifest.max_positions
            print(f"(the text ends at the last of the model's {limit} positions)", file=sys.stderr)


def demo(output: Path, *, fast: bool, as_json: bool) -> None:
    """Run the demo and show what it found."""
    from rich.console import Console

    from flora_fx.demo import run
    from flora_fx.demo.table import show

    _quiet()
    result = run(output, fast=fast, console=Console(stderr=True))
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(result, output, Console())


# --- what is loaded beside the model ----------------------------------------------------------------------


def _tokenizer(loaded: Any, model: str, adapter: str | None, tokenizer: str | None) -> Any:
    """The one that is asked for, else the one beside the adapter, else the model's."""
    from flora_fx.checkpoint import load_tokenizer
    from flora_fx.checkpoint.vocabulary import token_embedding

    if tokenizer is not None:
        found: Any = load_tokenizer(tokenizer)
        if found is None:
            raise FloraError(f"{tokenizer} has no tokenizer; pass the directory where tokenizer.json is")
        return found
    found = load_tokenizer(model, adapter)
    embedding = token_embedding(loaded) if found is not None and adapter is not None else None
    rows = None if embedding is None else len(embedding.weight)
    if rows is not None and len(found) > rows:
        raise FloraError(
            f"the tokenizer in {found.name_or_path} has {len(found)} tokens and the model's embedding {rows} rows: "
            "those of its new tokens are not in the adapter. Save them with it (save_embedding_layers=True), or pass "
            "the tokenizer that fits: --tokenizer"
        )
    return found


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


def _read_inputs(path: Path, dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    """Tensors by name; floats in the dtype of the model."""
    safetensors = require("safetensors.torch", "hf")
    try:
        found: dict[str, torch.Tensor] = safetensors.load(path.read_bytes())
    except Exception as error:  # a SafetensorError, or what its parser raises
        if isinstance(error, OSError):
            raise
        raise FloraError(
            f"{path} is no safetensors file ({error}); write it with safetensors.torch.save_file({{name: tensor}})"
        ) from error
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


# --- text in pieces ---------------------------------------------------------------------------------------


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise FloraError(f"--token-ids is {text!r}; pass whole numbers, as in 3,14,15") from None


def _pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens so far, piece by piece; a character split over tokens waits for its end."""
    ids: list[int] = []
    said = 0
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[said:]
            said = len(text)
    if said < len(text):
        yield text[said:]


# --- progress and errors, on stderr -----------------------------------------------------------------------


@contextlib.contextmanager
def _working(*stages: str) -> Iterator[Any]:
    """A spinner with the first stage's name; what it yields is called when the next one begins."""
    from rich.console import Console

    _quiet()
    names = iter(stages)
    with Console(stderr=True).status(next(names)) as status:
        yield lambda: status.update(next(names))


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """One red line for what a user can repair; everything else is a bug and keeps its traceback."""
    import typer
    from rich.console import Console
    from rich.markup import escape

    try:
        yield
    except (FloraError, OSError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] [red]{escape(message)}[/]", highlight=False)
        raise typer.Exit(2 if isinstance(error, MissingExtraError) else 1) from None


def _quiet() -> None:
    """transformers' own bars and warnings would stand between ours; errors still come through."""
    logging = require("transformers", "hf").logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="generation")  # what an export's notes say as well


if __name__ == "__main__":
    main()
