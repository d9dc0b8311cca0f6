"""The main job on a model made on the spot: train, adapt, capture, fuse, verify, export, generate, measure.

Nothing is downloaded. The base learns to write like Python's language reference, the LoRA makes it recite the
Zen of Python, and everything after that is what a user does with their own checkpoints.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flora_fx.checkpoint import load_model
from flora_fx.demo.contenders import onnx_latency, torch_latency
from flora_fx.demo.job import capture_and_fuse, export_all, write_texts
from flora_fx.demo.text import prose, zen
from flora_fx.demo.train import adapter_recipe, base_recipe, build_tokenizer, train_adapter, train_base
from flora_fx.measuring.bars import draw_bars
from flora_fx.measuring.environment import environment
from flora_fx.measuring.method import pinned
from flora_fx.progress import Bar, bars

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

__all__ = ["run"]

THREADS = 2
"""Two, so that runs on different machines can be compared and a shared machine stays usable."""

COLOURS = {"unmerged": "#c9cdd3", "fused": "#2f7d5b", "merged": "#cfe0c4"}
"""The picture's contenders."""


def run(output: str | Path, *, fast: bool = False, seed: int = 0, console: Console | None = None) -> dict[str, Any]:
    """Do the main job and leave everything that came of it in a directory.

    Args:
        output: the directory; made when missing, what an earlier demo left in it is replaced. It will hold
            ``base/`` and ``adapter/`` (checkpoints), ``onnx/`` (exported directories), ``graph.svg``,
            ``latency.svg``, ``latency.png`` and ``demo.json``.
        fast: a few training steps and rounds: everything runs, the texts and the numbers say nothing.
        seed: of the training and of the order of measurements.
        console: where progress bars go; None for silence.

    Returns:
        What ``demo.json`` holds.

    Raises:
        MissingExtraError: one of the extras ``hf``, ``onnx`` and ``cli`` is not installed.

    >>> result = run("demo-output")  # doctest: +SKIP
    >>> result["verification"]["prefill"]["max_rel"] < 1e-5  # doctest: +SKIP
    True
    """
    started = time.perf_counter()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rounds = 6 if fast else 80
    with pinned(THREADS), bars(console) as bar:
        tokenizer, training = _train(output, fast=fast, seed=seed, bar=bar)
        models = _load(output)
        prompt = torch.tensor([tokenizer(prose()[:2000])["input_ids"][: 16 if fast else 64]])

        graphs, report, verification = capture_and_fuse(models, prompt, bar("capture, fuse, verify"))
        report.draw(output / "graph.svg")
        new = 8 if fast else 28
        texts = write_texts(models, tokenizer, new=new)
        runners, onnx = export_all(models, tokenizer, output / "onnx", texts, bar("export to ONNX"), new=new)
        latency = {
            "PyTorch": torch_latency(models, graphs, prompt, rounds, seed, bar("measure PyTorch")),
            "ONNX Runtime": onnx_latency(runners, prompt, rounds, seed, bar("measure ONNX Runtime")),
        }
    parameters = sum(parameter.numel() for parameter in models["base"].parameters())
    rank = models["unmerged"].peft_config["default"].r
    draw_bars(
        latency,
        COLOURS,
        output / "latency",
        title="What a LoRA on all seven projections costs",
        note=f"Llama of {parameters / 1e6:.1f} M parameters, rank {rank}, float32, {THREADS} CPU threads, "
        f"prompt of {prompt.shape[1]} tokens; medians of {rounds} paired rounds, 95% intervals",
    )
    result: dict[str, Any] = {
        "environment": environment("flora-fx demo") | {"threads": THREADS},
        "model": {"parameters": parameters, "rank": rank, "prompt_tokens": prompt.shape[1]},
        "training": training,
        "report": json.loads(report.to_json()),
        "report_text": str(report),
        "verification": verification,
        "texts": texts,
        "onnx": onnx,
        "rounds": rounds,
        "latency": {
            runner: {phase: {name: asdict(timing) for name, timing in row.items()} for phase, row in phases.items()}
            for runner, phases in latency.items()
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _train(
    output: Path, *, fast: bool, seed: int, bar: Bar
) -> tuple[PreTrainedTokenizerFast, dict[str, dict[str, float]]]:
    """Make tokenizer, base and adapter, save them, and say how long each took and what its loss became."""
    tokenizer = build_tokenizer([prose(), zen()], output / "base")
    history: dict[str, dict[str, float]] = {}

    def note(name: str, losses: list[float], started: float) -> None:
        last = losses[-20:]
        history[name] = {
            "steps": len(losses),
            "first_loss": round(losses[0], 3),
            "last_loss": round(sum(last) / len(last), 3),
            "seconds": round(time.perf_counter() - started, 1),
        }

    started, tick = time.perf_counter(), bar("train the base")
    losses = train_base(
        prose(), tokenizer, output / "base", base_recipe(fast=fast), tick, seed=seed, layers=2 if fast else 4
    )
    note("base", losses, started)
    started, tick = time.perf_counter(), bar("train the adapter")
    base = load_model(output / "base")
    losses = train_adapter(base, zen(), tokenizer, output / "adapter", adapter_recipe(fast=fast), tick, seed=seed)
    note("adapter", losses, started)
    return tokenizer, history


def _load(output: Path) -> dict[str, Any]:
    """The models by contender, each with weights of its own.

    Models that were loaded from one file share its pages in memory, and a contender whose weights another one
    has just used finds them in the cache: two equal graphs then differed by 3 to 7%.
    """
    base, adapter = output / "base", output / "adapter"
    models: dict[str, Any] = {
        "base": load_model(base),
        "unmerged": load_model(base, adapter),
        "merged": load_model(base, adapter).merge_and_unload(),  # type: ignore[operator]
    }
    for model in models.values():
        for parameter in model.requires_grad_(False).parameters():
            parameter.data = parameter.data.clone()
    return models
